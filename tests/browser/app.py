"""
The example app, and one more model: "remote", whose every item a test lets out over HTTP.

It runs in the server's process; `server.Server` is the test's side.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flask import Blueprint, Response, request

import flask_llmstream
from example_app import create_app as create_example_app
from example_app.extensions import llm
from flask_llmstream import FEATURES, Finish, Usage
from flask_llmstream.testing import Signal

if TYPE_CHECKING:
    from flask import Flask

    from flask_llmstream import Emit, InferenceRequest

WAIT_SECONDS = 10.0


@dataclass
class Run:
    """One request, and the way to its answer."""

    request: InferenceRequest
    emit: Emit
    cancelled: Signal


class RemoteBackend:
    """A callback backend: the control's routes emit, so nothing here waits for a test."""

    supports = FEATURES

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._arrivals: defaultdict[int, Signal] = defaultdict(Signal)

    def submit(self, request, emit):
        run = Run(request, emit, Signal())
        self.runs.append(run)
        self._arrivals[len(self.runs) - 1].set()
        return run.cancelled.set

    def wait_for(self, number: int) -> Run:
        """The run of this number, from 0, once it is there."""
        self._arrivals[number].wait(WAIT_SECONDS)
        return self.runs[number]


def create_app() -> Flask:
    app = create_example_app()
    backend = RemoteBackend()
    llm.add_backend("remote", backend)
    app.register_blueprint(_control(backend))
    return app


def _control(backend: RemoteBackend) -> Blueprint:
    control = Blueprint("control", __name__, url_prefix="/control")

    @control.get("/runs")
    def count_runs():
        return {"count": len(backend.runs)}

    @control.get("/runs/<int:number>")
    def get_run(number: int):
        asked = backend.wait_for(number).request
        return {"messages": [[message.role, message.text] for message in asked.messages]}

    @control.post("/runs/<int:number>/text")
    def emit_text(number: int):
        return {"goes_on": backend.wait_for(number).emit(request.json["text"])}

    @control.post("/runs/<int:number>/finish")
    def finish(number: int):
        run = backend.wait_for(number)
        run.emit(Usage(**request.json["usage"]))
        run.emit(Finish(request.json["reason"]))
        return {}

    @control.post("/runs/<int:number>/error")
    def fail(number: int):
        asked = request.json
        error = getattr(flask_llmstream, asked["error"])
        backend.wait_for(number).emit(error(asked["message"], retry_after=asked["retry_after"]))
        return {}

    @control.get("/runs/<int:number>/cancelled")
    def wait_for_cancel(number: int):
        backend.wait_for(number).cancelled.wait(WAIT_SECONDS)
        return {}

    @control.post("/kill")
    def kill() -> Response:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")

    return control
