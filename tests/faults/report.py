"""The table of faults: what was seen of each, on each server."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from time import monotonic

from .baseline import Baseline, wait_for_return

TOLD_SECONDS = 0.5
"""How soon a backend must know that its client left; 50 ms is what is aimed for."""

HEADINGS = (
    *("fault", "server", "the client saw", "backend told, ms", "back"),
    *("slots", "threads", "greenlets", "files", "memory, KiB"),
)

rows = []
"""In the order of the tests."""


@dataclass
class Fault:
    """
    One fault on one server, while it is made.

    Attributes:
        saw: What the client saw.
        told_seconds: From the fault until the backend knew, each time.
        is_process_gone: The fault ended the worker: there is nothing to look at.
    """

    name: str
    server: object
    control: object
    saw: str = ""
    told_seconds: list = field(default_factory=list)
    is_process_gone: bool = False

    def told(self, id, at, event="cancelled"):
        """Wait until the backend of request *id* knows what happened *at*."""
        seconds = self.control.wait(id, event)["at"] - at
        self.told_seconds.append(seconds)
        assert seconds < TOLD_SECONDS


class watching:  # noqa: N801 - reads like the function that it could be
    """
    Put a fault into the table, and see that nothing of it is left in the worker.

    Args:
        name: As ``class: fault``.
        server: Where.
        control: Of the worker that must be as it was; None is the server's newest.
        ignoring: Figures that may be higher afterwards, of a server that is not warm.
    """

    def __init__(self, name, server, control=None, *, ignoring=()):
        self._fault = Fault(name, server, control or server.control)
        self._ignoring = ignoring

    def __enter__(self):
        self._start = Baseline.of(self._fault.control)
        self._begun_at = monotonic()
        return self._fault

    def __exit__(self, kind, error, _):
        if error is not None:
            return
        fault = self._fault
        if fault.is_process_gone:
            rows.append(_row(fault, "worker gone", {}))
            return
        end = wait_for_return(fault.control, self._start, ignoring=self._ignoring)
        rows.append(_row(fault, "yes", end.change(self._start)))


def _row(fault, back, change):
    told = f"{max(fault.told_seconds) * 1000:.1f}" if fault.told_seconds else ""
    figures = [_signed(change.get(name)) for name in ("slots", "threads", "greenlets", "files")]
    memory = _signed(change["memory"] // 1024) if change else ""
    return (fault.name, fault.server.kind, fault.saw, told, back, *figures, memory)


def _signed(number):
    return "" if number is None else f"{number:+d}" if number else "0"


def table():
    """All rows so far, as Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def what_was_seen(answer):
    """An answer that was read, in a few words."""
    return seen_of(answer.status, answer.headers, answer.body, answer.ending)


def seen_of(status, headers, body, ending):
    """The same, of its parts."""
    if headers.get("content-type", "").startswith("application/json"):
        document = json.loads(body)
        said = document["error"]["code"] if "error" in document else "the answer"
        after = headers.get("retry-after")
        return f"{status} {said}" + (f", Retry-After {after}" if after else "")
    events = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    objects = [json.loads(event) for event in events if event != "[DONE]"]
    tokens = sum(bool(event.get("token")) for event in objects)
    seen = [str(status), f"{tokens} token{'s' * (tokens != 1)}"]
    seen += [f"error {event['error']['code']}" for event in objects if "error" in event]
    seen += ["[DONE]"] * ("[DONE]" in events)
    endings = {"complete": "clean end", "eof": "cut (EOF)", "reset": "cut (RST)", None: "left"}
    return ", ".join([*seen, endings[ending]])
