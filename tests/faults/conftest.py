"""
One warm server of each kind for all faults, and their table at the end.

As a part of the whole suite each fault is made on one kind of server, in turns, and in small
numbers, but for those that the tests of servers make as well. `make faults`, or
``FAULTS=full``, is all of it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from server.asking import ask
from server.process import Server
from server.wire import Client

from . import report
from .backends import QUEUES, WORKERS
from .baseline import wait_until_idle
from .crowd import crowd, question

HERE = Path(__file__).parent
APP = "faults.app:create_app()"
KINDS = ("gevent", "hub", "gthread")
THREADS = 72
"""More than the 64 that the model ``thread`` works on, so that gthread can queue for it."""
IS_FULL = os.environ.get("FAULTS") == "full"
ARGUMENTS = {
    "gthread": ("--threads", str(THREADS)),
    "gevent": ("--worker-connections", "5000"),
    "hub": ("--worker-connections", "5000"),
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""What is larger goes back to the system when it is freed. glibc would learn from the first
large piece to keep as much for later, in each thread's arena, which looks like a leak."""
EXPECTED_TRACEBACKS = (
    *("ValueError: scripted", "RuntimeError: scripted", "MemoryError: scripted"),
    *("SystemExit", "KeyboardInterrupt: scripted", "RecursionError", "greenlet.GreenletExit"),
    "flask_llmstream.exceptions.EngineError: The model backend ",
)


def size(short, full):
    """How many, here."""
    return full if IS_FULL else short


def serve(kind, *arguments, **options):
    """A server as it starts."""
    options = {"app": APP, "environment": MALLOC, **options}
    return Server(kind, *ARGUMENTS.get(kind, ()), *arguments, **options)


def start_server(kind, *arguments, **options):
    """A server that has made all the threads that it will ever have."""
    server = serve(kind, *arguments, **options)
    try:
        warm_up(server)
    except BaseException:
        server.kill()
        raise
    return server


def warm_up(server):
    """Use every pool to its end, and everything that is made at its first use."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(THREADS)]
        ids = [ask(client, ["emit", "a"], ["gate"]) for client in clients]
        server.control.wait_for_stats("thread", running=64, waiting=THREADS - 64)
        for id in ids:
            server.control.open_gate(id)
        for client in clients:
            assert client.answer().read_all().tokens() == "a"
        for model in ("wayward", "wayward-greenlet"):
            ids = [ask(c, ["hangs in the middle"], model=model) for c in clients[:WORKERS]]
            server.control.wait_for_stats(model, running=WORKERS)
            for id in ids:
                server.control.open_gate(id)
            for client in clients[:WORKERS]:
                client.answer().read_all()
        for model in QUEUES:
            for client in clients[:WORKERS]:
                ask(client, ["work", 0.1], model=model)
            for client in clients[:WORKERS]:
                client.answer().read_all()
        for model, step, more in (
            ("single", ["emit", "a"], {}),
            ("full", ["emit", "a"], {}),
            ("batching", [], {"prompt": "any"}),
            ("steps", ["steps", 1, 1], {}),
        ):
            ask(clients[0], step, model=model, **more)
            clients[0].answer().read_all()
        id = ask(clients[0], ["calls late"], model="callback")
        clients[0].answer().read_until(b'"a"')
        clients[0].close()
        server.control.wait(id, "closed")
    wait_until_idle(server.control)


def fill(server):
    """Take the memory that streams take, which the allocators keep a part of for the next."""
    count = size(100, 500)
    crowd(server.address, [question("steps", "steps", 20, 1)] * count, at_once=count)
    wait_until_idle(server.control)


def pytest_configure(config):
    config.addinivalue_line("markers", "full: made by `make faults` alone")


def pytest_collection_modifyitems(config, items):
    """Leave one kind of server for each fault, the next one for the next."""
    if IS_FULL:
        return
    left = {item for item in items if item.get_closest_marker("full")}
    kinds_of = {}
    for item in items:
        if item in left:
            continue
        fault, kind = _fault_and_kind(item)
        if kind is not None:
            kinds_of.setdefault(fault, []).append(kind)
    chosen = {
        (fault, kinds[turn % len(kinds)]) for turn, (fault, kinds) in enumerate(kinds_of.items())
    }
    chosen.add((None, None))
    left |= {item for item in items if _fault_and_kind(item) not in chosen}
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


def _fault_and_kind(item):
    """The test without its server, and which one that is; None for no test of a fault."""
    if item.path.parent != HERE or not hasattr(item, "callspec"):
        return None, None
    others = dict(item.callspec.params)
    kind = others.pop("server", None) or others.pop("kind", None)
    if kind is None:
        return None, None
    return (item.path, item.originalname, repr(sorted(others.items()))), kind


def pytest_terminal_summary(terminalreporter):
    if IS_FULL and report.rows:
        terminalreporter.section("faults")
        for line in report.table():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def servers():
    """A warm server by its kind, started when it is first asked for."""
    running = {}

    def get(kind):
        if kind not in running:
            running[kind] = start_server(kind)
            if kind != "gthread":
                fill(running[kind])
        return running[kind]

    yield get
    for server in running.values():
        server.kill()


@pytest.fixture(params=KINDS)
def server(request, servers):
    """A warm server, of each kind in turn."""
    server = servers(request.param)
    seen = len(server.tracebacks())
    yield server
    new = server.tracebacks()[seen:]
    assert not [line for line in new if not line.startswith(EXPECTED_TRACEBACKS)], server.log


def _starter(begin):
    with ExitStack() as stack:

        def start(*arguments, **options):
            server = begin(*arguments, **options)
            stack.callback(server.kill)
            return server

        yield start


@pytest.fixture
def start():
    """Start a warm server that ends with the test."""
    yield from _starter(start_server)


@pytest.fixture
def start_cold():
    """Start a server that ends with the test."""
    yield from _starter(serve)
