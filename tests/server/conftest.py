"""One server of each kind for all tests, and the figures that the tests measured."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

import pytest

from .process import Server

KINDS = ("gevent", "hub", "gthread", "sync", "werkzeug", "pywsgi")
CONCURRENT_KINDS = ("gevent", "hub", "gthread", "werkzeug", "pywsgi")
EXPECTED_TRACEBACKS = (
    "RuntimeError: scripted",
    "SystemExit: scripted",
    "LookupError",
)

_figures = defaultdict(list)


@pytest.fixture(scope="session")
def measure():
    """Note a duration in seconds, for the summary at the end of the run."""

    def note(what, kind, seconds):
        _figures[what, kind].append(seconds)

    return note


def pytest_terminal_summary(terminalreporter):
    if not _figures:
        return
    terminalreporter.section("measured, in ms")
    for (what, kind), values in sorted(_figures.items()):
        p50, worst = median(values) * 1000, max(values) * 1000
        terminalreporter.write_line(
            f"{what:36} {kind:9} n={len(values):<4} p50={p50:8.2f} max={worst:8.2f}"
        )


@pytest.fixture(scope="session")
def servers():
    """A server by its kind, started when it is first asked for."""
    running = {}

    def get(kind):
        if kind not in running:
            running[kind] = Server(kind)
        return running[kind]

    yield get
    for server in running.values():
        server.kill()


@pytest.fixture
def server(request, servers):
    """The server of the kind that the test is parametrized with."""
    server = servers(request.param)
    seen = len(server.tracebacks())
    yield server
    new = server.tracebacks()[seen:]
    assert not [line for line in new if not line.startswith(EXPECTED_TRACEBACKS)], server.log
