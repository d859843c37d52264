"""
Ollama's ``POST /api/chat`` and ``/api/generate``, streamed and whole.

A line of a stream is the whole answer's object with a piece of the text in it; the last
one, `done`, has none, but the reason, the counts and the durations. Both routes differ in
where the text stands: in a `message`, or as the `response`.

- A tool call is written when it is whole, with its arguments as an object: no client
  joins pieces. One that the end of the answer cut off is left out, as `done_reason` says;
  where the model has written what is no JSON object, the answer fails.
- `think` hides what the model thinks where it is false. A level is passed on as
  `reasoning_effort`, and refused where a backend is not given that.
- `options` without a name in a request go into its `extra_body`, but for those about how a
  model is loaded, which are ignored. So are `keep_alive`, `context` (which no answer has)
  and fields that nobody knows. `suffix`, `raw` and `template` are refused: the answer
  would be one to another question.
- Refusals are part of the text: there is no other place for them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec

from ..core.messages import Token, ToolCall, Usage
from ..framing import JSON, NDJSON, SSE, TEXT
from ..framing.text import TextRenderer
from .blocks import BlockKind, BlockRenderer
from .encoding import encode
from .ollama_body import ChatBody, GenerateBody, ParsedOllama, read_chat, read_generate
from .openai_objects import logprob_list
from .tool_arguments import is_cut, read_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..core.messages import InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer
    from .blocks import Block
    from .parsed import Parsed

__all__ = ["OllamaChatDialect", "OllamaGenerateDialect"]


@dataclass(frozen=True, slots=True)
class _Shape:
    """
    Where a line has what was said.

    Args:
        before: What stands before the text, after `created_at`.
        after: What stands between the text and `done`.
    """

    before: bytes
    after: bytes
    has_message: bool

    def fields(self, said: dict[str, Any]) -> dict[str, Any]:
        """*said* is `content`, and perhaps `thinking` and `tool_calls`."""
        if self.has_message:
            return {"message": {"role": "assistant", **said}}
        return {"response": said.pop("content"), **said}


_CHAT = _Shape(b',"message":{"role":"assistant","content":', b"}", has_message=True)
_GENERATE = _Shape(b',"response":', b"", has_message=False)


class _OllamaDialect(ABC):
    """
    What both routes share.

    Args:
        clock: Unix time in seconds; gives `created_at`.

    Thread safety: immutable; share one freely. A renderer belongs to one response.
    """

    name: str
    framings = (NDJSON, SSE, TEXT, JSON)
    streams_by_default = True
    _shape: _Shape

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    @abstractmethod
    def parse(self, body: bytes) -> ParsedOllama:
        """
        Read a body.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """Lines as NDJSON or SSE, or the bare text."""
        if framing == TEXT:
            return TextRenderer()
        return _LineRenderer(self._answer(parsed), parsed, framing)

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """
        The whole answer as one object.

        Raises:
            EngineError: A tool call has no JSON object for its arguments.
        """
        choice = response.choices[0]
        said: dict[str, Any] = {"content": choice.text + choice.refusal}
        if choice.reasoning and _shows_thinking(parsed):
            said["thinking"] = choice.reasoning
        calls = _call_objects(choice.tool_calls, is_cut=is_cut(choice))
        if calls:
            said["tool_calls"] = calls
        rest = _end_of(response)
        if parsed.request.logprobs and choice.logprobs:
            rest["logprobs"] = logprob_list(choice.logprobs, parsed.request.top_logprobs)
        return self._answer(parsed, response.model).encode(said, done=True, **rest)

    def load_document(self, parsed: Parsed) -> bytes:
        """The answer where there is nothing to answer but that the model can be had."""
        return self._answer(parsed).encode({"content": ""}, done=True, done_reason="load")

    def error_document(self, error: LLMStreamError) -> bytes:
        """The error that a stream ends with, as the body of a 4xx or 5xx."""
        return encode(_error_object(error))

    def _answer(self, parsed: Parsed, model: str = "") -> _Answer:
        return _Answer(self._shape, parsed.request.model or model, self._clock)


class OllamaChatDialect(_OllamaDialect):
    """The `Dialect` of ``/api/chat``. See `_OllamaDialect`."""

    name = "ollama_chat"
    body_type = ChatBody
    _shape = _CHAT

    def parse(self, body: bytes) -> ParsedOllama:
        return read_chat(body)


class OllamaGenerateDialect(_OllamaDialect):
    """The `Dialect` of ``/api/generate``. See `_OllamaDialect`."""

    name = "ollama_generate"
    body_type = GenerateBody
    _shape = _GENERATE

    def parse(self, body: bytes) -> ParsedOllama:
        return read_generate(body)


class _Answer:
    """What every object of one answer has: its shape, the model and the time."""

    __slots__ = ("_clock", "_second", "_start_of_time", "model", "shape")

    def __init__(self, shape: _Shape, model: str, clock: Callable[[], float]) -> None:
        self.shape = shape
        self.model = model
        self._clock = clock
        self._second = -1
        self._start_of_time = b""

    def created_at(self) -> bytes:
        """The time now, as JSON: RFC 3339 with microseconds. Every token has one."""
        now = self._clock()
        second = int(now)
        if second != self._second:
            self._second = second
            moment = datetime.fromtimestamp(second, timezone.utc)
            self._start_of_time = moment.strftime('"%Y-%m-%dT%H:%M:%S.').encode()
        return b'%b%06dZ"' % (self._start_of_time, int((now - second) * 1e6))

    def encode(self, said: dict[str, Any], *, done: bool, **rest: Any) -> bytes:
        head = {"model": self.model, "created_at": msgspec.Raw(self.created_at())}
        return encode({**head, **self.shape.fields(said), "done": done, **rest})


def _shows_thinking(parsed: Parsed) -> bool:
    return not isinstance(parsed, ParsedOllama) or parsed.shows_thinking


def _end_of(response: InferenceResponse) -> dict[str, Any]:
    """
    What the last line tells. All durations together are the whole time.

    - `total_duration`: from when the request was submitted to the end of the answer.
    - `load_duration`: until a worker took it up. Ollama loads the model there; here it
      waits for others' requests.
    - `prompt_eval_duration`: from then to the first token, that one included.
    - `eval_duration`: from the first token to the end.
    """
    reason = response.choices[0].finish_reason
    usage = response.usage or Usage(0, 0)
    timings = response.timings
    total = timings.get("total", 0.0)
    started = timings.get("queue", 0.0)
    first = timings.get("first_token", total)
    return {
        # There is no reason of its own for tool calls.
        "done_reason": "stop" if reason == "tool_calls" else reason,
        "total_duration": _nanoseconds(total),
        "load_duration": _nanoseconds(started),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(first - started),
        "eval_count": usage.completion_tokens,
        "eval_duration": _nanoseconds(total - first),
    }


def _nanoseconds(seconds: float) -> int:
    # At least one: people divide by them.
    return max(1, int(seconds * 1e9))


def _call_objects(
    calls: Iterable[ToolCall], *, first: int = 0, is_cut: bool
) -> list[dict[str, Any]]:
    """Calls as an answer has them, numbered from *first*."""
    objects: list[dict[str, Any]] = []
    for call in calls:
        arguments = read_arguments(call.name, call.arguments, is_cut=is_cut)
        if arguments is not None:
            index = first + len(objects)
            function = {"index": index, "name": call.name, "arguments": arguments}
            # Ollama has it in the function only; LiteLLM joins a stream's calls by this one.
            objects.append({"id": call.id, "index": index, "function": function})
    return objects


def _error_object(error: LLMStreamError) -> dict[str, Any]:
    """
    Ollama's error is its message. The rest is for readers of a stream that can use it;
    Ollama's clients leave alone what they do not know.
    """
    return {"error": error.message, "code": error.code, "retryable": error.retryable}


class _LineRenderer(BlockRenderer):
    """
    Lines, one a piece of text.

    Everything around a text is built once, but for the time.
    """

    def __init__(self, answer: _Answer, parsed: Parsed, framing: Framing) -> None:
        super().__init__(framing)
        self._answer = answer
        self._request = parsed.request
        self._shows_thinking = _shows_thinking(parsed)
        self._head = framing.prefix + encode({"model": answer.model})[:-1] + b',"created_at":'
        self._before = answer.shape.before
        self._after = answer.shape.after + b',"done":false}' + framing.suffix
        # Of the tokens that stand in the next line.
        self._logprobs: list[dict[str, Any]] = []
        self._calls = 0
        self._is_cut = False
        if not self.heartbeat:
            self.heartbeat = self._line({"content": ""})

    def start(self) -> bytes:
        return b""

    def render(self, item: Item) -> bytes:
        if self._request.logprobs and isinstance(item, Token) and not item.choice:
            self._logprobs += logprob_list([item], self._request.top_logprobs)
        frame = super().render(item)
        # The text may be empty, or has to wait.
        return frame + self._line({"content": ""}) if self._logprobs else frame

    def end(self, response: InferenceResponse) -> bytes:
        self._is_cut = is_cut(response.choices[0])
        return super().end(response)

    def opened(self, block: Block) -> bytes:  # noqa: ARG002
        return b""

    def delta(self, block: Block, text: str) -> bytes:
        if block.kind is BlockKind.TEXT and not self._logprobs:
            created_at = self._answer.created_at()
            return b"".join((self._head, created_at, self._before, encode(text), self._after))
        if block.kind is BlockKind.TOOL_CALL:
            return b""
        if block.kind is BlockKind.REASONING:
            said = {"content": "", "thinking": text}
            return self._line(said) if self._shows_thinking else b""
        return self._line({"content": text})

    def closed(self, block: Block) -> bytes:
        if block.kind is not BlockKind.TOOL_CALL:
            return b""
        call = ToolCall(block.id, block.name, block.text)
        calls = _call_objects([call], first=self._calls, is_cut=self._is_cut)
        self._calls += len(calls)
        return self._line({"content": "", "tool_calls": calls}) if calls else b""

    def ended(self, response: InferenceResponse) -> bytes:
        frame = self._line({"content": ""}, done=True, **_end_of(response))
        return frame if self.framing == NDJSON else frame + self.framing.frame(b"[DONE]")

    def error(self, error: LLMStreamError) -> bytes:
        return self.framing.frame(encode(_error_object(error)))

    def _line(self, said: dict[str, Any], *, done: bool = False, **rest: Any) -> bytes:
        if self._logprobs:
            rest["logprobs"], self._logprobs = self._logprobs, []
        return self.framing.frame(self._answer.encode(said, done=done, **rest))
