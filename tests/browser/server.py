"""The server under test: gunicorn as the example configures it, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent
GUNICORN = (sys.executable, "-m", "gunicorn", "-c", "example_app/gunicorn.conf.py")
DEADLINE_SECONDS = 20.0


class Server:
    """
    Serves `app.create_app()`, configured through the environment.

    Args:
        directory: For its database and its log.
    """

    def __init__(self, directory: Path) -> None:
        self._log = directory / "server.log"
        # The socket is made here and inherited: no other process can take its port, and
        # who connects before the server is ready waits.
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("wb") as log:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self._process = subprocess.Popen(
                [*GUNICORN, "browser.app:create_app()"],
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT / "tests"),
                    "BIND": f"fd://{listener.fileno()}",
                    "FLASK_DATABASE": str(directory / "suggestions.sqlite3"),
                    "FLASK_LLMSTREAM_DEFAULT_MODEL": "remote",
                },
                pass_fds=[listener.fileno()],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._control = httpx.Client(base_url=f"{self.url}/control", timeout=DEADLINE_SECONDS)
        self._number = 0
        try:
            self._count()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def close(self) -> None:
        self._control.close()
        self._process.send_signal(signal.SIGQUIT)  # Nobody is here to wait for.
        try:
            status = self._process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        log = self._log.read_text("utf-8")
        assert status == 0, log
        raised = set(
            re.findall(r"^([\w.]+(?:Error|Exit|Exception|Interrupt))\b", log, re.MULTILINE)
        )
        assert not raised, log

    def start_over(self) -> None:
        """Forget the requests that a test before this one has left."""
        self._number = self._count()

    def next_answer(self) -> Answer:
        """The answer to the next request for the model "remote", once it has arrived."""
        answer = Answer(self._control, self._number)
        self._number += 1
        return answer

    def kill_worker(self) -> None:
        """End every connection at once; gunicorn puts a new process in the worker's place."""
        try:
            self._control.post("/kill")
        except httpx.TransportError:
            self._number = 0
        else:
            raise AssertionError("the worker lives")

    def has_other_requests(self) -> bool:
        """Whether there were more requests than were asked for with `next_answer`."""
        return self._count() > self._number

    def _count(self) -> int:
        try:
            return self._control.get("/runs").raise_for_status().json()["count"]
        except httpx.HTTPError as error:
            raise AssertionError(self._log.read_text("utf-8")) from error


class Answer:
    """
    An answer that a test writes.

    Attributes:
        messages: The conversation that was sent, the system's message aside: (role, text).
    """

    def __init__(self, control: httpx.Client, number: int) -> None:
        self._control = control
        self._path = f"/runs/{number}"
        arrived = control.get(self._path).raise_for_status().json()
        self.messages = [(role, text) for role, text in arrived["messages"] if role != "system"]

    @property
    def question(self) -> str:
        return self.messages[-1][1]

    def write(self, text: str) -> None:
        assert self._post("text", text=text)["goes_on"]

    def finish(self, reason="stop", *, completion_tokens=3) -> None:
        usage = {"prompt_tokens": 7, "completion_tokens": completion_tokens}
        self._post("finish", reason=reason, usage=usage)

    def fail(self, error: str, message: str, *, retry_after=None) -> None:
        """End with the package's exception of this name."""
        self._post("error", error=error, message=message, retry_after=retry_after)

    def wait_for_cancel(self) -> None:
        """Fails where the backend is not told to stop within ten seconds."""
        self._control.get(f"{self._path}/cancelled").raise_for_status()

    def _post(self, what: str, **body) -> dict:
        return self._control.post(f"{self._path}/{what}", json=body).raise_for_status().json()
