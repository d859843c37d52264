"""
What goes into an engine and what comes out: requests, items of a stream, responses.

Every item is an immutable value, safe to hand between threads. `InferenceRequest` is
mutable until it is submitted; an engine runs a private copy and never changes yours.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from ..exceptions import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from .deadlines import Deadline

__all__ = [
    "Choice",
    "Finish",
    "InferenceRequest",
    "InferenceResponse",
    "Item",
    "Message",
    "Reasoning",
    "Refusal",
    "RequestControl",
    "Token",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Usage",
]


class TopLogprob(NamedTuple):
    """One alternative at a position: its text and natural-log probability."""

    token: str
    logprob: float


class Token(str):
    """
    A piece of answer text that carries more than its text.

    A plain `str` is the same as `Token(text)`. Slicing or joining gives a plain `str`.

    Args:
        text: The text; may be empty where only the log probability matters.
        logprob: Natural-log probability, ≤ 0; None where the backend has none.
        top_logprobs: Pairs (text, logprob), most likely first.
        choice: Which of the request's `n` answers this belongs to, from 0.
    """

    __slots__ = ("choice", "logprob", "top_logprobs")

    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...]
    choice: int

    def __new__(  # noqa: PYI034 - typing.Self is 3.11
        cls,
        text: str,
        *,
        logprob: float | None = None,
        top_logprobs: Sequence[tuple[str, float]] = (),
        choice: int = 0,
    ) -> Token:
        self = super().__new__(cls, text)
        self.logprob = logprob
        self.top_logprobs = tuple(TopLogprob(*pair) for pair in top_logprobs)
        self.choice = choice
        return self

    def __repr__(self) -> str:
        return f"Token({str(self)!r}, logprob={self.logprob}, choice={self.choice})"

    def __reduce__(self) -> tuple[Callable[..., Token], tuple[Any, ...]]:
        return _token, (str(self), self.logprob, self.top_logprobs, self.choice)


def _token(
    text: str, logprob: float | None, top_logprobs: tuple[TopLogprob, ...], choice: int
) -> Token:
    return Token(text, logprob=logprob, top_logprobs=top_logprobs, choice=choice)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's thinking. Not a `str`, so that it never leaks into text."""

    text: str
    _: KW_ONLY
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A piece of the model's words for why it does not answer. Not a `str`: no answer text."""

    text: str
    _: KW_ONLY
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """
    A piece of a tool call.

    Args:
        index: Which call of the answer, from 0.
        id: Set in the call's first delta only.
        name: The function's name; set in the call's first delta only.
        arguments: The next piece of the arguments' JSON text.
        choice: Which of the request's `n` answers, from 0.
    """

    index: int
    _: KW_ONLY
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens used, over all choices; `cached_tokens` is part of `prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Finish:
    """
    The end of one choice, not of the stream; `Usage` may come after it.

    Args:
        reason: ``stop``, ``length``, ``tool_calls`` or ``content_filter``.
        stop_sequence: The stop string that was met, if one was.
        choice: Which of the request's `n` answers, from 0.
    """

    reason: str
    _: KW_ONLY
    stop_sequence: str | None = None
    choice: int = 0


Item: TypeAlias = "str | bytes | Reasoning | Refusal | ToolCallDelta | Usage | Finish"
"""What a backend may emit; `bytes` are UTF-8, decoded incrementally."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call; `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """
    One message of a chat.

    Args:
        role: ``system``, ``developer``, ``user``, ``assistant`` or ``tool``.
        content: Text, or parts in OpenAI's form (``{"type": "text", "text": …}``).
        tool_calls: What an assistant message called.
        tool_call_id: Which call a tool message answers.
        name: The participant's name.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]] = ""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The text parts, joined without a separator."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.get("text", "") for part in self.content if part.get("type") == "text")


class RequestControl(Protocol):
    """A run, as far as its backend may see it."""

    @property
    def is_over(self) -> bool: ...

    @property
    def timed_out(self) -> bool: ...

    def on_cancel(self, function: Callable[[], Any]) -> None: ...


@dataclass(kw_only=True, slots=True)
class InferenceRequest:
    """
    What to generate, and how.

    Give `prompt` or `messages`; everything else is optional. Sampling fields left None
    mean the backend's own default.

    Args:
        prompt: Plain text; ``""`` where `messages` are given, never None.
        messages: The chat so far.
        model: Model id; empty means the app's default.
        request_id: Echoed in `X-Request-ID` and the logs; made where empty.
        max_tokens: At most this many tokens a choice, ≥ 1.
        temperature: ≥ 0.
        top_p: 0 < top_p ≤ 1.
        top_k: ≥ 1.
        seed: Same seed, same text, as far as the backend can.
        stop: Strings that end a choice; the strings themselves are never emitted.
        tools: Tool definitions in OpenAI's form.
        tool_choice: ``auto``, ``none``, ``required`` or OpenAI's named form.
        response_format: OpenAI's form (``{"type": "json_schema", …}``).
        n: How many choices, ≥ 1.
        logprobs: Whether tokens carry log probabilities.
        top_logprobs: How many alternatives a token carries, ≥ 0.
        stream: Whether the caller reads as it is produced; engines set it themselves
            where `stream_callback` or a token callback is given.
        stream_callback: Called with every item, serially, on the producing worker;
            False stops the run. In the request that a backend sees it is the engine's
            guarded one, so that a backend may simply call it.
        deadline: When the answer is worth nothing any more.
        priority: Higher is sooner.
        metadata: The caller's own, untouched.
        extra_body: Fields of the body that have no name here, for backends that pass
            them on.
        identity: Who asks; set by the extension, part of the dedup key.
    """

    prompt: str = ""
    messages: Sequence[Message] = ()
    model: str = ""
    request_id: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    response_format: Mapping[str, Any] | None = None
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    stream: bool = False
    stream_callback: Callable[[Any], bool] | None = field(default=None, repr=False, compare=False)
    deadline: Deadline | None = field(default=None, compare=False)
    priority: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    identity: Any = None
    # Set on the engine's copy: the run itself, and the context to run under.
    control: RequestControl | None = field(default=None, repr=False, compare=False)
    run_context: Callable[[], AbstractContextManager[Any]] | None = field(
        default=None, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("n", self.n, 1),
            ("top_k", self.top_k, 1),
            ("top_logprobs", self.top_logprobs, 0),
        ):
            if value is not None and value < least:
                raise InvalidRequestError(
                    f"{name} must be at least {least}, not {value}.", param=name
                )
        if not all(self.stop):
            raise InvalidRequestError("A stop string must not be empty.", param="stop")

    def __copy__(self) -> InferenceRequest:
        # A third of what copy() takes by way of pickle's protocol, which slots force on it.
        copied = object.__new__(type(self))
        for name in self.__dataclass_fields__:
            setattr(copied, name, getattr(self, name))
        return copied

    @property
    def last_user_text(self) -> str:
        """The text of the last user message; for a plain prompt, the prompt."""
        for message in reversed(self.messages):
            if message.role == "user":
                return message.text
        return self.prompt

    @property
    def cancelled(self) -> bool:
        """Whether the run is over, for whatever cause: nobody wants more tokens."""
        return self.control is not None and self.control.is_over

    @property
    def timed_out(self) -> bool:
        """Whether it is over because one of its budgets ran out."""
        return self.control is not None and self.control.timed_out

    def on_cancel(self, function: Callable[[], Any]) -> None:
        """
        For backends: call *function* when the run ends before its backend does, by
        cancel, deadline or error; at once where it has ended already.

        It is called from any thread, also from a finalizer: constant time, no waiting, no
        gevent, and safe to come late, since the backend may be done by then.
        """
        if self.control is not None:
            self.control.on_cancel(function)


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer of a response."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    stop_sequence: str | None = None
    logprobs: tuple[Token, ...] = ()


@dataclass(kw_only=True, slots=True)
class InferenceResponse:
    """
    A whole answer. The single-choice fields are those of choice 0.

    Args:
        request_id: The request's.
        model: The model that answered.
        text: Answer text of choice 0.
        tool_calls: Its tool calls.
        finish_reason: ``stop``, ``length``, ``tool_calls`` or ``content_filter``.
        usage: Tokens used; None only where a backend returned none and emitted nothing.
        logprobs: The tokens that carried log probabilities, in order.
        cache_hit: Whether it came from the dedup cache or another caller's run.
        timings: Seconds by name: ``queue``, ``first_token`` (from submit), ``total``.
        choices: All `n` answers; made from the fields above where not given.
    """

    request_id: str = ""
    model: str = ""
    text: str = ""
    tool_calls: Sequence[ToolCall] = ()
    finish_reason: str = "stop"
    usage: Usage | None = None
    logprobs: Sequence[Token] = ()
    cache_hit: bool = False
    timings: Mapping[str, float] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        if not self.choices:
            self.choices = (
                Choice(
                    text=self.text,
                    tool_calls=tuple(self.tool_calls),
                    finish_reason=self.finish_reason,
                    logprobs=tuple(self.logprobs),
                ),
            )
