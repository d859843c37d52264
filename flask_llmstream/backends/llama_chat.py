"""Between this package's messages and llama.cpp's chat API: a request's body, its chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.messages import Finish, Reasoning, Token, Usage
from .json_schema import check_schema
from .tool_grammar import call_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..core.messages import InferenceRequest, Item, Message
    from .tool_grammar import Toolbox, ToolCallReader

__all__ = ["AnswerReader", "chat_body"]

# llama.cpp keeps 32 bits of a seed, and takes the highest value to mean "random".
_SEEDS = 2**32 - 1
# Of counts it keeps 31, and takes what is over for something else.
_MOST = 2**31 - 1


def chat_body(request: InferenceRequest, toolbox: Toolbox | None) -> dict[str, Any]:
    """
    The body of a streamed ``/v1/chat/completions`` request to llama.cpp.

    `stop` is left to the engine: llama.cpp says neither which string it met nor the
    log probabilities of the tokens that it held back to look for one.

    Raises:
        InvalidRequestError: A JSON schema is one that llama.cpp cannot take.
    """
    body: dict[str, Any] = {
        "messages": _messages(request, toolbox),
        "stream": True,
        # A chunk for each batch of the prompt: the only places to cancel in there.
        "return_progress": True,
        # Token counts in every chunk, so that a cancelled run has its usage too.
        "timings_per_token": True,
        "n": request.n,
    }
    for field in ("temperature", "top_p"):
        value = getattr(request, field)
        if value is not None:
            body[field] = value
    for field in ("max_tokens", "top_k"):
        value = getattr(request, field)
        if value is not None:
            body[field] = min(value, _MOST)
    if request.seed is not None:
        body["seed"] = request.seed % _SEEDS
    if request.logprobs:
        # With none asked for, llama.cpp leaves out the token's own as well.
        body.update(logprobs=True, top_logprobs=max(1, request.top_logprobs))
    schema = _schema(request, toolbox)
    if schema is not None:
        check_schema(schema)
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    return body


def _schema(request: InferenceRequest, toolbox: Toolbox | None) -> Mapping[str, Any] | None:
    wanted = request.response_format or {}
    answer: Mapping[str, Any] | None = None
    if wanted.get("type") == "json_schema":
        answer = wanted["json_schema"]["schema"]
    elif wanted.get("type") == "json_object":
        answer = {"type": "object"}
    return answer if toolbox is None else toolbox.schema(answer)


def _messages(request: InferenceRequest, toolbox: Toolbox | None) -> list[dict[str, str]]:
    """
    The chat in the three roles that every chat template knows.

    Small models' templates drop tool calls and garble tool results, so both are written
    out as text; many refuse two messages of one role in a row, so those are joined.
    """
    chat: list[tuple[str, str]] = []
    if toolbox is not None:
        chat.append(("system", toolbox.instructions()))
    names: dict[str, str] = {}
    for message in request.messages:
        names.update((call.id, call.name) for call in message.tool_calls)
        chat.append(_plain(message, names))
    if not request.messages:
        chat.append(("user", request.prompt))
    joined: list[dict[str, str]] = []
    for role, text in chat:
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] += f"\n\n{text}"
        else:
            joined.append({"role": role, "content": text})
    return joined


def _plain(message: Message, names: Mapping[str, str]) -> tuple[str, str]:
    if message.role == "tool":
        name = message.name or names.get(message.tool_call_id or "", "the function")
        return "user", f"Result of {name}: {message.text}"
    if message.role == "developer":
        return "system", message.text
    calls = (call_text(call.name, call.arguments) for call in message.tool_calls)
    return message.role, "\n".join(filter(None, (message.text, *calls)))


class AnswerReader:
    """
    Makes items of the chunks of one request's answer, all of its choices.

    Args:
        request: Its `n`, `logprobs` and `top_logprobs` are read.
        toolbox: What the model may call; None where nothing.

    Attributes:
        is_complete: Every choice has finished; the model need not go on.
    """

    def __init__(self, request: InferenceRequest, toolbox: Toolbox | None) -> None:
        self._n = request.n
        self._logprobs = request.logprobs
        self._top_logprobs = request.top_logprobs
        self._calls: dict[int, ToolCallReader] = (
            {} if toolbox is None else {index: toolbox.reader(index) for index in range(request.n)}
        )
        self._must_call = toolbox is not None and toolbox.must_call
        self._finished: set[int] = set()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens: dict[int, int] = {}

    @property
    def is_complete(self) -> bool:
        return len(self._finished) == self._n

    @property
    def usage(self) -> Usage:
        """Tokens used so far, also of a run that was cut short."""
        return Usage(
            self._prompt_tokens,
            sum(self._completion_tokens.values()),
            cached_tokens=self._cached_tokens,
        )

    def read(self, chunk: Mapping[str, Any]) -> Iterator[Item]:
        """The items of one chunk."""
        for choice in chunk["choices"]:
            index = choice["index"]
            if "timings" in chunk:
                self._count(index, chunk["timings"])
            if index not in self._finished:
                yield from self._read_choice(index, choice)

    def _count(self, index: int, timings: Mapping[str, Any]) -> None:
        self._prompt_tokens = timings["cache_n"] + timings["prompt_n"]
        self._cached_tokens = timings["cache_n"]
        self._completion_tokens[index] = timings["predicted_n"]

    def _read_choice(self, index: int, choice: Mapping[str, Any]) -> Iterator[Item]:
        delta = choice["delta"]
        calls = self._calls.get(index)
        if delta.get("reasoning_content"):
            yield Reasoning(delta["reasoning_content"], choice=index)
        if delta.get("content"):
            text = self._token(index, delta["content"], choice.get("logprobs"))
            if calls is None:
                yield text
            else:
                yield from calls.feed(text)
                if calls.is_complete:
                    self._finished.add(index)
                    yield Finish("tool_calls", choice=index)
                    return
        reason = choice["finish_reason"]
        if reason is not None:
            if calls is not None:
                if not self._must_call:  # Else it is a call that was cut, no text.
                    yield from calls.finish()
                if calls.has_call and reason == "stop":
                    reason = "tool_calls"
            self._finished.add(index)
            yield Finish(reason, choice=index)

    def _token(self, index: int, text: str, logprobs: Mapping[str, Any] | None) -> str:
        # One entry a chunk: where a character took several tokens, the last one's.
        entry = logprobs["content"][-1] if self._logprobs and logprobs else None
        if entry is not None:
            top = entry["top_logprobs"][: self._top_logprobs]
            return Token(
                text,
                logprob=entry["logprob"],
                top_logprobs=[(each["token"], each["logprob"]) for each in top],
                choice=index,
            )
        return Token(text, choice=index) if index else text
