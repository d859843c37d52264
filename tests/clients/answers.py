"""What a client is asked to do, and what it reads: the same words for every dialect."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

LONG_TEXT = 500


@dataclass(frozen=True)
class ToolCall:
    """A whole call; some clients give the arguments as text, here they are always parsed."""

    id: str | None
    name: str
    arguments: Any


@dataclass(frozen=True)
class Failure:
    """
    An error, as far as the client tells.

    Args:
        status: None where it came in the middle of a stream.
        code: None where the dialect has no codes.
        message: As the server wrote it.
    """

    status: int | None
    code: str | None
    message: str | None


@dataclass(frozen=True)
class Answer:
    """
    What a client makes of a response, as far as it got.

    Args:
        finish: ``stop``, ``length`` or ``tool_calls``; None where the end was not told.
        usage: Prompt and completion tokens.
        failure: What the client raised.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    usage: tuple[int, int] | None = None
    failure: Failure | None = None

    def without(self, untold):
        """The same as a client gives it that cannot tell what is in *untold*."""
        answer = replace(self, **dict.fromkeys(untold & {"finish", "usage"}))
        if "reasoning" in untold:
            answer = replace(answer, reasoning="")
        if "call ids" in untold:
            answer = replace(answer, calls=tuple(replace(call, id=None) for call in answer.calls))
        if isinstance(answer.failure, Failure):
            unknown = {"status", "code", "message"} & untold
            answer = replace(answer, failure=replace(answer.failure, **dict.fromkeys(unknown)))
        return answer

    def brief(self):
        """The same with a digest for a long text: a diff of two megabytes helps nobody."""
        if len(self.text) < LONG_TEXT:
            return self
        digest = sha256(self.text.encode()).hexdigest()[:16]
        return replace(self, text=f"{self.text[:20]}… ({len(self.text)} characters, {digest})")


@dataclass(frozen=True)
class Job:
    """
    One request, for one reader.

    Args:
        base_url: What the client's own setting of this name takes.
        body: The fields of the request's body, `stream` apart.
        api_key: The caller's.
        headers: To be sent besides the client's own.
        leaves: Close the stream after the first text.
        timeout_seconds: The client's own setting; None is its default.
    """

    base_url: str
    body: dict[str, Any]
    api_key: str
    headers: dict[str, str]
    leaves: bool = False
    timeout_seconds: float | None = None


class LeftError(Exception):
    """The reader has seen enough: it leaves in the middle of the stream."""


class Reading:
    """
    Where a reader notes what it sees.

    Args:
        leaves: Raise `LeftError` after the first text.
    """

    def __init__(self, *, leaves=False):
        self.finish = None
        self.usage = None
        self.failure = None
        self._leaves = leaves
        self._texts = []
        self._reasonings = []
        self._calls = {}

    def text(self, text):
        self._texts.append(text or "")
        if text and self._leaves:
            raise LeftError

    def reasoning(self, text):
        self._reasonings.append(text or "")

    def call(self, index, id=None, name=None, arguments=""):
        """
        Another piece of the call *index*; each is joined as the SDKs' users join them.

        Args:
            index: None for a call that comes whole, after the others.
            arguments: Text of them, or all of them as an object.
        """
        index = len(self._calls) if index is None else index
        call = self._calls.setdefault(index, {"id": None, "name": "", "arguments": ""})
        call["id"] = id or call["id"]
        call["name"] += name or ""
        call["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments)

    @property
    def has_calls(self):
        return bool(self._calls)

    def answer(self):
        return Answer(
            text="".join(self._texts),
            reasoning="".join(self._reasonings),
            calls=tuple(
                ToolCall(call["id"], call["name"], _parsed(call["arguments"]))
                for _, call in sorted(self._calls.items())
            ),
            finish=self.finish,
            usage=self.usage,
            failure=self.failure,
        )


def answer_of_json(line):
    """An answer that a reader in another process printed."""
    fields = json.loads(line)
    failure, usage = fields["failure"], fields["usage"]
    return Answer(
        text=fields["text"],
        reasoning=fields["reasoning"],
        calls=tuple(
            ToolCall(call["id"], call["name"], _parsed(call["arguments"]))
            for call in fields["calls"]
        ),
        finish=fields["finish"],
        usage=None if usage is None else tuple(usage),
        failure=None if failure is None else Failure(**failure),
    )


def _parsed(arguments):
    return json.loads(arguments) if isinstance(arguments, str) else arguments
