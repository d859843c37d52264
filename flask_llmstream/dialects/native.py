"""
The package's own shape: one small object a token, easy to read without an SDK.

Every event of a stream has `id`, `token`, `index` and `done`, so that joining `token`
gives the text whatever else comes along::

    {"id":"r1","token":"Hi","index":0,"done":false}
    {"id":"r1","token":"","index":1,"done":true,"finish_reason":"stop","usage":{…}}

`index` counts the non-empty tokens of a choice from 0; an event with an empty token shows
the next one. What is not plain text of choice 0 adds keys:

- `choice`: the choice's number, where it is not 0; its `finish_reason` comes in an event
  of its own. The last event, `done`, is choice 0's.
- `reasoning`: a piece of the model's thinking; `refusal`: of why it does not answer.
- `tool_call`: ``{"index", "id", "name", "arguments"}``; `id` and `name` come once a call.
- `logprobs`: a list as OpenAI's `logprobs.content`, where the request asked for it.

An error is ``{"error":{"message","code","retryable"}}``, in a stream and as a document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ..core.messages import Finish, Reasoning, Refusal, Token, ToolCallDelta
from ..framing import FRAMINGS, NDJSON, TEXT
from ..framing.text import TextRenderer
from .answer_ids import answer_id
from .chat_messages import MessageBody, read_messages
from .decoding import decode, invalid
from .encoding import encode
from .generation import GenerationBody, read_generation
from .openai_objects import call_id, logprob_list, usage_object
from .parsed import Parsed

if TYPE_CHECKING:
    from ..core.messages import Choice, InferenceRequest, InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer

__all__ = ["NativeDialect"]


class _NativeBody(GenerationBody, kw_only=True):
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    messages: Annotated[list[MessageBody], Meta(min_length=1)] | None = None


_decoder = msgspec.json.Decoder(_NativeBody)


class NativeDialect:
    """
    The `Dialect` of ``llm.stream()`` and of the native blueprint.

    Thread safety: immutable; share one freely. A renderer belongs to one response.
    """

    name = "native"
    framings = FRAMINGS
    streams_by_default = True
    body_type = _NativeBody

    def parse(self, body: bytes) -> Parsed:
        """
        Read a body: `prompt` or `messages`, and OpenAI's names for everything else.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """
        fields = decode(_decoder, body)
        if (fields.prompt is None) == (fields.messages is None):
            raise invalid("prompt", "give either this or `messages`")
        request = read_generation(
            fields, prompt=fields.prompt or "", messages=read_messages(fields.messages or [])
        )
        return Parsed(request, fields.stream)

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """Events as SSE or NDJSON, or the bare text of choice 0."""
        if framing == TEXT:
            return TextRenderer()
        return _TokenRenderer(parsed.request, framing)

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """
        ``{"id","model","text","finish_reason",…,"usage"}``, of choice 0.

        `choices` lists every choice, with its `index`, where there is more than one.
        """
        request = parsed.request
        choices = [_choice_object(choice, request) for choice in response.choices]
        document = {
            "id": answer_id(request),
            "model": request.model or response.model,
            **choices[0],
            "usage": usage_object(response.usage),
        }
        if len(choices) > 1:
            document["choices"] = [
                {"index": choice.index, **fields}
                for choice, fields in zip(response.choices, choices, strict=True)
            ]
        return encode(document)

    def error_document(self, error: LLMStreamError) -> bytes:
        """The error object that a stream ends with, as the body of a 4xx or 5xx."""
        return encode(_error_object(error))


def _error_object(error: LLMStreamError) -> dict[str, Any]:
    return {"error": {"message": error.message, "code": error.code, "retryable": error.retryable}}


def _choice_object(choice: Choice, request: InferenceRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason}
    if choice.reasoning:
        fields["reasoning"] = choice.reasoning
    if choice.refusal:
        fields["refusal"] = choice.refusal
    if choice.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": call.arguments}
            for call in choice.tool_calls
        ]
    if request.logprobs:
        fields["logprobs"] = logprob_list(choice.logprobs, request.top_logprobs)
    return fields


class _TokenRenderer:
    """
    Events around a counter.

    What comes for a choice that is finished, or that was not asked for, has no place on
    the wire and renders as nothing.
    """

    def __init__(self, request: InferenceRequest, framing: Framing) -> None:
        self._framing = framing
        self._request = request
        self._id = answer_id(request)
        self._head = framing.prefix + encode({"id": self._id})[:-1] + b',"token":'
        self._tail = b',"index":%d,"done":false}' + framing.suffix
        self._next_index = dict.fromkeys(range(request.n), 0)
        self._reasons: dict[int, str] = {}
        self._called: set[tuple[int, int]] = set()

    @property
    def heartbeat(self) -> bytes:
        """NDJSON has no comments and no blank lines: an event without a token."""
        return self._framing.heartbeat or self._event(0)

    def start(self) -> bytes:
        return b""

    def render(self, item: Item) -> bytes:
        if type(item) is str:
            if not item or 0 in self._reasons:
                return b""
            index = self._next_index[0]
            self._next_index[0] = index + 1
            return self._head + encode(item) + self._tail % index
        choice = getattr(item, "choice", 0)
        if choice in self._reasons or choice not in self._next_index:
            return b""
        if isinstance(item, str):
            return self._token(item, choice)
        if isinstance(item, Reasoning):
            return self._event(choice, reasoning=item.text) if item.text else b""
        if isinstance(item, Refusal):
            return self._event(choice, refusal=item.text) if item.text else b""
        if isinstance(item, ToolCallDelta):
            return self._tool_call(item)
        if isinstance(item, Finish):
            return self._finish(choice, item.reason)
        return b""  # usage is the end's to tell

    def end(self, response: InferenceResponse) -> bytes:
        reasons = {choice.index: choice.finish_reason for choice in response.choices}
        frames = [
            self._finish(choice, reasons.get(choice, "stop"))
            for choice in self._next_index
            if choice not in self._reasons
        ]
        frames.append(
            self._event(
                0,
                done=True,
                finish_reason=self._reasons[0],
                usage=usage_object(response.usage),
            )
        )
        if self._framing != NDJSON:
            frames.append(self._framing.frame(b"[DONE]"))
        return b"".join(frames)

    def error(self, error: LLMStreamError) -> bytes:
        return self._framing.frame(encode(_error_object(error)))

    def _token(self, token: str, choice: int) -> bytes:
        extra: dict[str, Any] = {}
        if self._request.logprobs and isinstance(token, Token) and token.logprob is not None:
            extra = {"logprobs": logprob_list([token], self._request.top_logprobs)}
        if not token and not extra:
            return b""
        # Not str(): a subclass may have a __str__ of its own.
        event = self._event(choice, str.__str__(token), **extra)
        if token:
            self._next_index[choice] += 1
        return event

    def _tool_call(self, item: ToolCallDelta) -> bytes:
        call: dict[str, Any] = {"index": item.index}
        if (item.choice, item.index) not in self._called:
            self._called.add((item.choice, item.index))
            call |= {"id": item.id or call_id(), "name": item.name or ""}
        elif not item.arguments:
            return b""
        call["arguments"] = item.arguments
        return self._event(item.choice, tool_call=call)

    def _finish(self, choice: int, reason: str) -> bytes:
        self._reasons[choice] = reason
        # Choice 0's reason goes into the last event.
        return self._event(choice, finish_reason=reason) if choice else b""

    def _event(self, choice: int, token: str = "", *, done: bool = False, **extra: Any) -> bytes:
        event: dict[str, Any] = {
            "id": self._id,
            "token": token,
            "index": self._next_index[choice],
            "done": done,
        }
        if choice:
            event["choice"] = choice
        return self._framing.frame(encode({**event, **extra}))
