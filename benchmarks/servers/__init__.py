"""The servers of the suite, and how each is started."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STREAMING_WORKER = "flask_llmstream.gunicorn.StreamingGeventWorker"


@dataclass(frozen=True)
class Kind:
    """
    A server that answers ``POST /v1/chat/completions``.

    Attributes:
        command: Its command line, of a port and the folder of the compiled programs.
        has_worker: A child of the process that is started does the work.
    """

    title: str
    command: Callable[[int, Path], list[str]]
    has_worker: bool = False


def gunicorn(title, app, worker="gevent"):
    def command(port, programs):  # noqa: ARG001
        return [
            *(sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "-k", worker),
            *("--worker-connections", "12000", "--graceful-timeout", "1"),
            *("--log-level", "warning", f"benchmarks.{app}"),
        ]

    return Kind(title, command, has_worker=True)


def uvicorn(title, app):
    def command(port, programs):  # noqa: ARG001
        return [
            *(sys.executable, "-m", "uvicorn", "--port", str(port)),
            *("--loop", "uvloop", "--http", "httptools", "--ws", "none"),
            *("--no-access-log", "--log-level", "warning", "--timeout-graceful-shutdown", "1"),
            f"benchmarks.{app}",
        ]

    return Kind(title, command)


OURS = "servers.ours:create_app()"
PLAIN = "servers.plain:create_app()"

KINDS = {
    "limit": Kind(
        "C, one send a token (the limit)",
        lambda port, programs: [str(programs / "limit"), str(port)],
    ),
    "ours-worker": gunicorn("this package, StreamingGeventWorker", OURS, STREAMING_WORKER),
    "ours-gevent": gunicorn("this package, gunicorn's gevent worker", OURS),
    "fastapi-orjson": uvicorn("FastAPI + orjson", "servers.fastapi_orjson:app"),
    "fastapi-pydantic": uvicorn(
        "FastAPI + a pydantic model a chunk", "servers.fastapi_pydantic:app"
    ),
    "flask-generator": gunicorn("Flask generator + json.dumps", "servers.flask_generator:app"),
    "plain-worker": gunicorn("a plain view, StreamingGeventWorker", PLAIN, STREAMING_WORKER),
    "plain-gevent": gunicorn("a plain view, gunicorn's gevent worker", PLAIN),
    "parked": gunicorn("a bare generator, gunicorn's gevent worker", "servers.parked:app"),
    "embedded": gunicorn("the embedded model", "model:create_app()"),
}

STREAMING = (
    *("limit", "ours-worker", "ours-gevent"),
    *("fastapi-orjson", "fastapi-pydantic", "flask-generator"),
)
"""Those that stream the step engine's tokens, this package and its peers."""
