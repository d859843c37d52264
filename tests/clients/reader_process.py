"""Readers in a process of their own, that do one job a line."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from contextlib import suppress
from dataclasses import asdict

from .answers import answer_of_json

ANSWER_SECONDS = 30


class ReaderProcess:
    """
    A process that gets jobs as lines of JSON and prints each answer as one.

    It starts with the first job, and again after one that it did not survive. What it
    writes to stderr goes where the tests' own does: pytest shows it with a failure.

    Args:
        command: Its arguments.
        environment: All of it; None is ours.
    """

    def __init__(self, command, environment=None):
        self._command = command
        self._environment = environment
        self._process = None

    def ask(self, reader, job):
        """What *reader* reads when it does *job*."""
        if self._process is None:
            self._start()
        line = json.dumps({"reader": reader.name, "job": asdict(job)})
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            self.close()
            raise TimeoutError(f"No answer came within {ANSWER_SECONDS} s.") from None
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.close()
            raise ConnectionError(f"{self._command[0]} is gone; stderr has its last words.")
        return answer_of_json(answer)

    def close(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait(ANSWER_SECONDS)
            self._receiver.join(ANSWER_SECONDS)
            self._process.stdout.close()
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process = None

    def _start(self):
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def _receive(self):
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)
