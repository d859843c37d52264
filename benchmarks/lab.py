"""What a measurement is given: servers on one processor, load from the other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from . import machine
from .programs import BenchmarkError, run_program
from .servers import KINDS

PATH = "/v1/chat/completions"
START_SECONDS = 30.0
STREAMS_WARM_UP_SECONDS = 2.0
ANSWERS_WARM_UP_SECONDS = 1.0


def chat_body(model, *, stream=True):
    return json.dumps(
        {"model": model, "stream": stream, "messages": [{"role": "user", "content": "go"}]},
        separators=(",", ":"),
    )


class Server:
    """
    A server in a process, pinned to a processor.

    Attributes:
        pid: Of the process that answers.
    """

    def __init__(self, kind, programs, environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        with machine.starting_servers():
            self._process = subprocess.Popen(
                kind.command(self.port, programs),
                cwd=machine.ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_for_answer()
            self.pid = self._worker() if kind.has_worker else self._process.pid
        except BaseException:
            self.stop()
            raise

    def _wait_for_answer(self):
        """Any will do, a 404 too."""
        until = monotonic() + START_SECONDS
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    if connection.recv(1):
                        return
            except OSError:
                pass
            if self._process.poll() is not None or monotonic() > until:
                raise BenchmarkError(f"The server did not start:\n{self.log}")
            sleep(0.05)

    def _worker(self):
        pid = self._process.pid
        (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(worker)

    @property
    def log(self):
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self):
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


@dataclass(frozen=True)
class Lab:
    """
    Args:
        programs: The folder of the compiled programs.
        rounds: How often each figure is taken; the servers take turns within one.
        seconds: How long each time.
        streams: The numbers of streams to try.
    """

    programs: Path
    rounds: int
    seconds: float
    streams: tuple[int, ...]

    @contextmanager
    def serving(self, name, **environment):
        server = Server(KINDS[name], self.programs, environment)
        try:
            yield server
        finally:
            server.stop()

    def load(self, server, streams, *, model="steps", seconds=None, on_start=None):
        """
        What ``load`` measured; where not all streams started, only how many did.

        Args:
            on_start: Called once all streams are open and have had a token.
        """
        found = {}
        for result in run_program(
            self.programs / "load",
            *(server.port, PATH, chat_body(model), streams),
            *(STREAMS_WARM_UP_SECONDS, seconds or self.seconds, server.pid),
        ):
            if "counting" in result:
                busy = machine.busy_seconds()
            elif "seconds" in result:
                share = (machine.busy_seconds() - busy) / result["seconds"]
                found = {**result, "others_share": max(0.0, share - result["cpu_share"])}
            else:
                found = result
                if on_start is not None:
                    on_start()
        return found

    def request(self, server, body, *, connections=1):
        """What ``requests`` measured."""
        (result,) = run_program(
            self.programs / "requests",
            *(server.port, PATH, body, connections),
            *(ANSWERS_WARM_UP_SECONDS, self.seconds, server.pid),
        )
        return result

    def say(self, text):
        """Progress, apart from the results."""
        print(text, file=sys.stderr, flush=True)
