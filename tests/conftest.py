"""How the whole suite runs: on a developer's machine, on CI, and under coverage."""

import _thread
import os
import sys
import threading

import pytest
from hypothesis import settings

pytest_plugins = ["engine_fixture", "gate_fixture", "model_fixture", "scripted_service"]

IS_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")

# A busy machine is no fault of the code. On CI every run tries the same examples: one that
# fails there fails here, too.
settings.register_profile("here", deadline=None)
settings.register_profile("on_ci", deadline=None, derandomize=True)
settings.load_profile("on_ci" if IS_CI else "here")


def trace_native_threads():
    """
    Let coverage see the threads that the package makes.

    It follows those of `threading`; ours come from `_thread`, since `threading` makes
    greenlets in a patched process.
    """
    start = _thread.start_new_thread

    def start_traced(function, arguments, keywords=None):
        def run(*arguments, **keywords):
            sys.settrace(threading.gettrace())
            function(*arguments, **keywords)

        return start(run, arguments, keywords or {})

    _thread.start_new_thread = start_traced


if threading.gettrace() is not None:
    trace_native_threads()


def pytest_sessionfinish(session):
    """On CI what is skipped was not tested: it fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if IS_CI and reporter.stats.get("skipped") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped")
    if IS_CI and skipped:
        terminalreporter.section("nothing may be skipped on CI", red=True)
        terminalreporter.line(f"{len(skipped)} tests were; the summary below names each", red=True)
