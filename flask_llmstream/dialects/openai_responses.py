"""
OpenAI's Responses: ``POST /v1/responses``, streamed and whole.

An answer is a row of items: thoughts, messages, function calls. Every event says its type
twice, before its data for who reads SSE by the book, and in it; and it is numbered, from 0
and without gaps, so that a reader who was cut off can say where.

The stream ends with ``response.completed``, ``response.incomplete`` or ``response.failed``
and without ``[DONE]``, as OpenAI's own does; no SDK misses it.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from ..core.messages import Token
from ..exceptions import RequestCancelledError
from ..framing import FRAMINGS, TEXT
from ..framing.text import TextRenderer
from .blocks import Block, BlockKind, BlockRenderer, blocks_of
from .encoding import encode
from .openai_objects import error_object, logprob_list
from .openai_responses_body import ParsedResponses, ResponsesBody, read_body
from .openai_responses_objects import (
    finished_object,
    item_id,
    item_object,
    part_object,
    response_error,
    response_object,
    status_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..core.messages import InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer
    from .openai_responses_input import History, ResponseItem
    from .parsed import Parsed

__all__ = ["Notice", "OpenAIResponsesDialect", "ReaderAsides"]

Notice: TypeAlias = "Callable[[ParsedResponses, dict[str, Any]], None]"
"""Is told each new state of a response, as a response object, before anybody else is."""


class OpenAIResponsesDialect:
    """
    The `Dialect` of the OpenAI SDKs' ``responses``, and of what is built on them.

    Args:
        notice: Is told what becomes of each response.
        clock: Unix time in seconds; gives `created_at` and `completed_at`.

    Thread safety: immutable; share one freely. A renderer belongs to one response.
    """

    name = "openai_responses"
    framings = FRAMINGS
    streams_by_default = False
    body_type = ResponsesBody

    def __init__(
        self,
        *,
        notice: Notice = lambda _, __: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._notice = notice
        self._clock = clock

    def parse(self, body: bytes, history: History | None = None) -> ParsedResponses:
        """
        Read a body.

        Args:
            body: As it came.
            history: The caller's earlier responses; without it there are none.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
            UnknownStreamError: An item that `input` refers to is none of the caller's.
        """
        return read_body(body, created_at=int(self._clock()), history=history)

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """Events as SSE or NDJSON, or the bare text."""
        responses = _as_responses(parsed)
        if framing == TEXT:
            return _NoticedText(partial(self._whole, responses))
        return _EventRenderer(responses, framing, self._notice, self._clock)

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """A `response`."""
        return encode(self._whole(_as_responses(parsed), response))

    def _whole(self, parsed: ParsedResponses, response: InferenceResponse) -> dict[str, Any]:
        choice = response.choices[0]
        tokens = choice.logprobs if parsed.request.logprobs else ()
        logprobs = logprob_list(tokens, parsed.request.top_logprobs)
        *blocks, last = blocks_of(choice) or [Block(0, BlockKind.TEXT)]
        output = [_whole_item(block, parsed.token, "completed", logprobs) for block in blocks]
        output.append(_whole_item(last, parsed.token, status_of(choice.finish_reason), logprobs))
        finished = finished_object(parsed, response, output, finished_at=int(self._clock()))
        self._notice(parsed, finished)
        return finished

    def error_document(self, error: LLMStreamError) -> bytes:
        """OpenAI's error object, as the body of a 4xx or 5xx."""
        return encode(error_object(error))


def _as_responses(parsed: Parsed) -> ParsedResponses:
    if not isinstance(parsed, ParsedResponses):
        raise TypeError("Give what parse() made: it has the ids of the response.")
    return parsed


def _whole_item(
    block: Block, token: str, status: str, logprobs: Sequence[dict[str, Any]] = ()
) -> ResponseItem:
    if block.kind is BlockKind.TOOL_CALL:
        item = item_object(block, token, status)
        return {**item, "arguments": item["arguments"] + _missing_arguments(block)}
    of_text = logprobs if block.kind is BlockKind.TEXT else ()
    return item_object(block, token, status, [part_object(block, block.text, of_text)])


def _missing_arguments(block: Block) -> str:
    """
    What a call lacks that has no arguments. Clients read them as JSON, and some models
    write nothing, or a blank, where a function has no parameters.
    """
    return "" if block.text.strip() else "{}"


_DELTAS = {
    BlockKind.REASONING: "response.reasoning_text.delta",
    BlockKind.TEXT: "response.output_text.delta",
    BlockKind.REFUSAL: "response.refusal.delta",
    BlockKind.TOOL_CALL: "response.function_call_arguments.delta",
}


class _NoticedText(TextRenderer):
    """Plain text, of which the response is made beside it."""

    def __init__(self, finish: Callable[[InferenceResponse], Any]) -> None:
        self._finish = finish

    def end(self, response: InferenceResponse) -> bytes:
        self._finish(response)
        return super().end(response)


class _EventRenderer(BlockRenderer):
    """
    The events of one response.

    An error makes two events, in this order. ``error`` has the error both ways: the SDKs of
    OpenAI, Python and Node, raise for any event with a truthy ``error`` in it and would
    hand over everything else as just another event; OpenAI's documentation and typed
    clients have ``code`` and ``message`` beside it. ``response.failed`` is for who reads the
    state of the response: the AI SDK's provider for Open Responses knows no ``error`` event,
    and its one for OpenAI shows the error once where this comes second, twice where it comes
    first.
    """

    def __init__(
        self,
        parsed: ParsedResponses,
        framing: Framing,
        notice: Notice,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(framing)
        self._parsed = parsed
        self._notice = notice
        self._clock = clock
        self._status = "queued" if parsed.background else "in_progress"
        self._sequence_number = 0
        self._output: list[ResponseItem] = []
        self._finish_reason: str | None = None
        # Of the open block: what stands around a delta, and its log probabilities.
        self._delta_head = self._delta_tail = b""
        self._logprobs: list[dict[str, Any]] = []
        self._tokens: list[Token] = []

    # Events around the blocks.

    def start(self) -> bytes:
        response = response_object(self._parsed, self._status)
        self._notice(self._parsed, response)
        return b"".join(
            self._event(f"response.{name}", response=response) for name in ("created", self._status)
        )

    def end(self, response: InferenceResponse) -> bytes:
        # Now, since it is part of the last block's end.
        self._finish_reason = response.choices[0].finish_reason
        if self.blocks:
            return super().end(response)
        # An answer that says nothing is an empty message.
        block = Block(0, BlockKind.TEXT)
        self.blocks.append(block)
        return self.opened(block) + self.closed(block) + super().end(response)

    def ended(self, response: InferenceResponse) -> bytes:
        finished = finished_object(
            self._parsed, response, self._output, finished_at=int(self._clock())
        )
        return self._reach(finished, finished["status"])

    def error(self, error: LLMStreamError) -> bytes:
        if not self._sequence_number:
            # There is no stream yet to speak of, or it is somebody else's.
            return ReaderAsides(self.framing).error(error)
        output = self._output
        if self.is_open:
            block = self.blocks[-1]
            output = [*output, _whole_item(block, self._parsed.token, "incomplete", self._logprobs)]
        is_cancelled = isinstance(error, RequestCancelledError)
        response = response_object(
            self._parsed,
            "cancelled" if is_cancelled else "failed",
            output=output,
            error=None if is_cancelled else response_error(error),
        )
        told = self._event("error", **_error_fields(error))
        # No event tells of a cancel; what has failed is the stream.
        return told + self._reach(response, "failed")

    def _reach(self, response: dict[str, Any], name: str) -> bytes:
        """*response* is the new state; the event *name* tells of it."""
        self._notice(self._parsed, response)
        return self._event(f"response.{name}", response=response)

    # Blocks.

    def opened(self, block: Block) -> bytes:
        frames = []
        if self._status == "queued":
            self._status = "in_progress"
            frames.append(self._reach(response_object(self._parsed, self._status), self._status))
        self._logprobs = []
        item = item_object(block, self._parsed.token, "in_progress")
        frames.append(
            self._event("response.output_item.added", output_index=block.index, item=item)
        )
        place = self._place_of(block)
        if block.kind is not BlockKind.TOOL_CALL:
            part = part_object(block, "")
            frames.append(self._event("response.content_part.added", **place, part=part))
        kind = _DELTAS[block.kind]
        self._delta_head = self.framing.head(kind) + encode({"type": kind, **place})[:-1]
        self._delta_head += b',"delta":'
        self._delta_tail = b',"sequence_number":%d}' + self.framing.suffix
        if block.kind is BlockKind.TEXT:
            self._delta_tail = b',"logprobs":[]' + self._delta_tail
        return b"".join(frames)

    def delta(self, block: Block, text: str) -> bytes:
        if self._tokens and block.kind is BlockKind.TEXT:
            logprobs = self._take_logprobs()
            return self._event(
                _DELTAS[block.kind], **self._place_of(block), delta=text, logprobs=logprobs
            )
        number = self._sequence_number
        self._sequence_number = number + 1
        return self._delta_head + encode(text) + self._delta_tail % number

    def closed(self, block: Block) -> bytes:
        frames = []
        if block.kind is BlockKind.TOOL_CALL and (missing := _missing_arguments(block)):
            frames.append(self.delta(block, missing))
        if block.kind is BlockKind.TEXT:
            self._take_logprobs()
        status = status_of(self._finish_reason or "")
        item = _whole_item(block, self._parsed.token, status, self._logprobs)
        kind = _DELTAS[block.kind].removesuffix("delta") + "done"
        place = self._place_of(block)
        if block.kind is BlockKind.TOOL_CALL:
            done = {name: item[name] for name in ("name", "arguments")}
            frames.append(self._event(kind, **place, **done))
        else:
            (part,) = item["content"]
            done = {name: part[name] for name in ("text", "refusal", "logprobs") if name in part}
            frames.append(self._event(kind, **place, **done))
            frames.append(self._event("response.content_part.done", **place, part=part))
        frames.append(self._event("response.output_item.done", output_index=block.index, item=item))
        self._output.append(item)
        return b"".join(frames)

    def _place_of(self, block: Block) -> dict[str, Any]:
        """Where in the response an event about *block* belongs."""
        place = {"item_id": item_id(block, self._parsed.token), "output_index": block.index}
        # The one part that an item has, but for calls, which have none.
        return place if block.kind is BlockKind.TOOL_CALL else {**place, "content_index": 0}

    # Log probabilities: of tokens, which blocks know nothing of.

    def _place(self, item: Item) -> bytes:
        if not (
            self._parsed.request.logprobs and isinstance(item, Token) and item.logprob is not None
        ):
            return super()._place(item)
        self._tokens.append(item)
        frames = super()._place(item)
        if item and not frames:
            # It has to wait for a tool call, and comes again.
            self._tokens.pop()
        return frames

    def _take_logprobs(self) -> list[dict[str, Any]]:
        """
        Of the text that comes now. A token without a text, whose text comes with a later
        one since it might have become a stop string, goes with that.
        """
        logprobs = logprob_list(self._tokens, self._parsed.request.top_logprobs)
        self._tokens.clear()
        self._logprobs += logprobs
        return logprobs

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._sequence_number
        self._sequence_number = number + 1
        return _event(self.framing, kind, number, fields)


class ReaderAsides:
    """
    The `Asides` of a response that is recorded: what has gone wrong with the reading alone.

    Args:
        framing: SSE or NDJSON.
    """

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self.heartbeat = framing.heartbeat

    def error(self, error: LLMStreamError) -> bytes:
        """An ``error`` event with the number 0: it has no place among the response's own."""
        return _event(self._framing, "error", 0, _error_fields(error))


def _event(framing: Framing, kind: str, number: int, fields: Mapping[str, Any]) -> bytes:
    event = {"type": kind, "sequence_number": number, **fields}
    return framing.head(kind) + encode(event) + framing.suffix


def _error_fields(error: LLMStreamError) -> dict[str, Any]:
    told = error_object(error)
    return {**{name: told["error"][name] for name in ("code", "message", "param")}, **told}
