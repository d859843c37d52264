"""Two threads' steps in every order that one switch from the first to the second can make."""

from __future__ import annotations

import sys
import threading
from math import inf
from pathlib import Path

import flask_llmstream.core
from flask_llmstream.core.runtime import ThreadParker

CORE = str(Path(flask_llmstream.core.__file__).parent)


def interleave(prepare, within=CORE):
    """
    Try a switch before every bytecode of the package's core, or of the modules *within*.

    *prepare* makes a fresh scene and returns ``act``, ``intrude`` and ``check``. ``act``
    runs traced; at one bytecode, one later each time, ``intrude`` runs as a whole, as
    another thread might; then ``check``. Where a thread may be switched differs between
    Python versions: 3.10 does it almost anywhere.
    """
    act, intrude, _ = prepare()
    _run(act, intrude, inf, within)  # Python 3.12 reports bytecodes only once it saw them traced.
    step = 0
    while True:
        act, intrude, check = prepare()
        if not _run(act, intrude, step, within):
            assert step > 5, "nothing was traced"
            return
        check()
        step += 1


def _run(act, intrude, step, within):
    """Whether *act* took as many steps."""
    passed = 0

    def trace(frame, event, argument):
        nonlocal passed
        if not frame.f_code.co_filename.startswith(within):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            passed += 1
            if passed == step + 1:
                intrude()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    return passed > step


class Once:
    """A call that happens at most once, however many may make it."""

    def __init__(self, function):
        self._function = function
        self.is_done = False
        self.result = None

    def __call__(self):
        if not self.is_done:
            self.is_done = True
            self.result = self._function()


class ModelParker:
    """A parker that knows a lost wake-up: nobody else is left who could unpark it."""

    def __init__(self, let_others_run):
        self._let_others_run = let_others_run
        self._has_permit = False

    def park(self, until=None):
        if not self._has_permit:
            self._let_others_run()
        assert self._has_permit, "a lost wake-up"
        self._has_permit = False

    def unpark(self):
        self._has_permit = True

    def is_usable_here(self):
        return True


class SeenParker(ThreadParker):
    """Tells when somebody is about to wait on it."""

    __slots__ = ("is_waited_on",)

    def __init__(self):
        super().__init__()
        self.is_waited_on = threading.Event()

    def park(self, until=inf):
        self.is_waited_on.set()
        super().park(until)
