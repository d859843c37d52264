"""
What a test sees of a server's inside, and its hand on the backends there.

A worker process listens on a Unix socket named by its pid, on native threads, so that it
answers also where the server's only thread or greenlet is busy. One JSON object a line
goes in, one comes back.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from pathlib import Path
from time import monotonic

from flask_llmstream.core import runtime
from flask_llmstream.testing import Signal

WAIT_SECONDS = 10.0
REMEMBERED = 400
"""Requests whose events are kept, and events of one: a worker's memory is looked at, too."""


class Recorder:
    """
    The worker's side: what happened lately, and gates that hold backends.

    Attributes:
        progress: How many tokens of its flood a request has yielded, by id.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(self):
        self.progress = {}
        self._events = {}
        self._signals = {}
        self._ids = deque()

    def _signal(self, id, *key):
        if id not in self._signals:
            self._ids.append(id)
            if len(self._ids) > REMEMBERED:
                self._forget(self._ids.popleft())
        return self._signals.setdefault(id, {}).setdefault(key, Signal())

    def _forget(self, id):
        for kept in (self.progress, self._events, self._signals):
            kept.pop(id, None)

    def record(self, id, name, **details):
        """*name* happened to request *id*, now."""
        events = self._events.setdefault(id, deque(maxlen=REMEMBERED))
        events.append({"name": name, "at": monotonic(), **details})
        self._signal(id, "event", name).set()

    def events(self, id):
        return list(self._events.get(id, ()))

    def wait(self, id, name):
        self._signal(id, "event", name).wait(WAIT_SECONDS)

    def open_gate(self, id, number):
        self._signal(id, "gate", number).set()

    def pass_gate(self, id, number):
        self._signal(id, "gate", number).wait(30.0)


class Listener:
    """The worker's Unix socket. *answer* maps a command to its answer, both dicts."""

    def __init__(self, answer):
        self._answer = answer
        self._pid = 0

    def start(self):
        """Once a process: threads do not survive a fork."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        # Not `socket.socket`: its accept() makes a patched socket in a patched process.
        self._socket_type = runtime.original("_socket", "socket")
        listener = self._socket_type(socket.AF_UNIX, socket.SOCK_STREAM)
        path = Path(os.environ["SERVER_TEST_CONTROL"]) / f"{self._pid}.sock"
        unready = path.with_suffix(".new")
        listener.bind(str(unready))
        listener.listen()
        runtime.start_thread(lambda: self._accept(listener))
        unready.rename(path)

    def _accept(self, listener):
        while True:
            fileno, _ = listener._accept()
            connection = self._socket_type(fileno=fileno)
            runtime.start_thread(lambda connection=connection: self._serve(connection))

    def _serve(self, connection):
        buffer = b""
        while data := connection.recv(65536):
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                try:
                    answer = self._answer(json.loads(line))
                except Exception as error:
                    answer = {"failed": repr(error)}
                connection.sendall(json.dumps(answer).encode() + b"\n")
        connection.close()


class Control:
    """The test's side of one worker process."""

    def __init__(self, path):
        self.pid = int(path.stem)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_SECONDS + 5)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")

    def close(self):
        self._file.close()
        self._socket.close()

    def tell(self, command, **arguments):
        self._socket.sendall(json.dumps({"do": command, **arguments}).encode() + b"\n")
        answer = json.loads(self._file.readline())
        if isinstance(answer, dict) and "failed" in answer:
            raise AssertionError(f"{command} {arguments}: {answer['failed']}")
        return answer

    def open_gate(self, id, number=0):
        """Let the backend of request *id* pass its gate *number*, now or later."""
        self.tell("open", id=id, number=number)

    def wait(self, id, name):
        """The event *name* of request *id*, once it happened."""
        return self.tell("wait", id=id, name=name)

    def events(self, id, name=None):
        """What happened to request *id*, in order."""
        events = self.tell("events", id=id)
        return events if name is None else [event for event in events if event["name"] == name]

    def progress(self, id):
        """How many tokens of its flood request *id* has yielded."""
        return self.tell("progress", id=id)

    def stats(self, model):
        """The engine's queue and worker stats together."""
        return self.tell("stats", model=model)

    def wait_for_stats(self, model, **expected):
        """Poll until *model*'s engine has the *expected* figures."""
        until = monotonic() + WAIT_SECONDS
        while True:
            stats = self.stats(model)
            if expected.items() <= stats.items():
                return stats
            assert monotonic() < until, f"expected {expected}, not {stats}"

    def look(self):
        """What the process holds; see `probe`."""
        return self.tell("look")

    # What the kernel says of the process.

    def _status(self, field):
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise LookupError(field)

    @property
    def threads(self):
        return self._status("Threads")

    @property
    def resident_bytes(self):
        return self._status("VmRSS") * 1024

    @property
    def file_descriptors(self):
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
