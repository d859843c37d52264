"""Servers as processes: started on a port of their own choice, watched, ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

from .control import Control
from .wire import Client

START_SECONDS = 20.0
TESTS = Path(__file__).parent.parent
APP = "server.app:create_app()"

_GUNICORN = [sys.executable, "-m", "gunicorn", APP, "--bind", "127.0.0.1:0", "--log-level", "info"]

COMMANDS = {
    "gevent": [*_GUNICORN, "-k", "gevent"],
    "hub": [*_GUNICORN, "-k", "flask_llmstream.gunicorn.StreamingGeventWorker"],
    "gthread": [*_GUNICORN, "-k", "gthread", "--threads", "8"],
    "sync": [*_GUNICORN, "-k", "sync"],
    "werkzeug": [sys.executable, "-m", "flask", "--app", APP, "run", "--port", "0"],
    "pywsgi": [sys.executable, "-m", "server.serve_pywsgi"],
}

_LISTENING = re.compile(r"(?:Listening at|Running on):? (?:https?://127\.0\.0\.1:(\d+)|unix:(\S+))")


class Process:
    """
    A process that listens on a port and says so.

    Attributes:
        address: Where it listens: host and port, or the path of a Unix socket.
    """

    def __init__(self, command, *, environment=None):
        self._folder = tempfile.TemporaryDirectory(prefix="server")
        self.folder = Path(self._folder.name)
        self._log = self.folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
                    "PYTHONUNBUFFERED": "1",
                    "SERVER_TEST_CONTROL": str(self.folder),
                    "HOME": str(self.folder),  # gunicorn keeps a socket there.
                    **(environment or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            match = self.wait_for(lambda: _LISTENING.search(self.log), START_SECONDS)
            self.address = match[2] or ("127.0.0.1", int(match[1]))
        except BaseException:
            self.kill()
            raise

    @property
    def log(self):
        return self._log.read_text(errors="replace")

    def wait_for(self, condition, seconds=10.0):
        """Poll until *condition* is true, and return what it returned."""
        until = monotonic() + seconds
        while not (found := condition()):
            ended = self.process.poll()
            assert ended is None, f"the server ended with {ended}:\n{self.log}"
            assert monotonic() < until, f"it did not come true:\n{self.log}"
            sleep(0.005)
        return found

    def terminate(self):
        """SIGTERM: the graceful way. Returns when."""
        self.process.terminate()
        return monotonic()

    def wait_for_exit(self, seconds=10.0):
        return self.process.wait(seconds)

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10.0)
        self._folder.cleanup()


class Server(Process):
    """
    The app of these tests in a server.

    Args:
        kind: One of `COMMANDS`.
        arguments: More for the command line.
        config: More for the app's config.
        workers: How many processes serve.
        app: Where it is.
        environment: More for the environment.
    """

    def __init__(self, kind, *arguments, config=None, workers=1, app=APP, environment=None):
        self.controls = []
        command = [app if part == APP else part for part in COMMANDS[kind]]
        super().__init__(
            [*command, *arguments],
            environment={"SERVER_TEST_CONFIG": json.dumps(config or {}), **(environment or {})},
        )
        self.kind = kind
        try:
            self.wait_for(lambda: len(self.meet()) >= workers, START_SECONDS)
        except BaseException:
            self.kill()
            raise

    @property
    def control(self):
        """Of the newest worker."""
        return self.controls[-1]

    def meet(self):
        """Ask for something, to meet workers; returns the controls of all met so far."""
        with self.client() as client:
            client.ask("GET", "/ping", headers={"Connection": "close"})
            client.answer().read_all()
        known = {control.pid for control in self.controls}
        paths = self.folder.glob("*.sock")
        self.controls += [Control(path) for path in paths if int(path.stem) not in known]
        return self.controls

    def client(self, **options):
        return Client(self.address, **options)

    def kill(self):
        for control in self.controls:
            control.close()
        super().kill()

    def tracebacks(self):
        """The last lines of the tracebacks in the log so far, but for one half written."""
        return re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)*(\S.*)\n", self.log, re.MULTILINE)
