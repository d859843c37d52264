"""The streams that every dialect has to tell its clients, and what these must read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import NoneType
from typing import Any
from unittest.mock import ANY

from flask_llmstream import (
    DeadlineExceededError,
    Finish,
    Message,
    QueueFullError,
    Reasoning,
    RequestCancelledError,
    ToolCallDelta,
    UpstreamError,
    Usage,
)
from flask_llmstream import ToolCall as Called

from .answers import Answer, Failure, ToolCall

HI = (Message("user", "Hi"),)
USAGE = Usage(3, 2)
TOLD = (3, 2)

# Steps of a script that `service` acts on.
WAIT = object()
"""The backend stops here, until the test is over."""
REST = object()
"""The backend is silent for a while, longer than between two heartbeats."""


@dataclass(frozen=True)
class Function:
    """A tool that may be called."""

    name: str
    parameters: dict[str, Any]


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = (Function("weather", CITY), Function("now", {"type": "object", "properties": {}}))


@dataclass(frozen=True)
class Scenario:
    """
    One request, and what becomes of it.

    Args:
        script: What the backend does; see `ScriptedBackend`, and the steps above.
        streamed: What a client reads that streams.
        whole: What one reads that does not; None where there is no such thing.
        messages: The chat that is sent, and that the backend must get.
        tools: Offered with it.
        needs: What not every dialect has: ``tools``, ``reasoning``, ``chat``.
        mount: Which of the service's blueprints is asked.
        model: Other than one that plays the script.
        timeout_seconds: Sent as ``X-Request-Timeout``.
        gives_up_seconds: The client's own timeout.
        leaves: The client closes the stream after the first text.
        ends: The class or classes of the error that the server says it ended with; it
            says nothing of what is refused before anything is submitted.
    """

    name: str
    script: tuple[Any, ...]
    streamed: Answer
    whole: Answer | None
    messages: tuple[Message, ...] = HI
    tools: tuple[Function, ...] = ()
    needs: frozenset[str] = frozenset()
    mount: str = ""
    model: str = ""
    timeout_seconds: float | None = None
    gives_up_seconds: float | None = None
    leaves: bool = False
    ends: Any = NoneType

    @property
    def is_submitted(self):
        return not self.model and self.mount != "/locked"

    def __str__(self):
        return self.name


def says(name, *script, text="", finish="stop", needs=(), **fields):
    """A scenario that ends well: the same answer streamed and whole."""
    reasoning, calls = fields.pop("reasoning", ""), fields.pop("calls", ())
    answer = Answer(text, reasoning, calls, finish, TOLD)
    return Scenario(name, (*script, USAGE), answer, answer, needs=frozenset(needs), **fields)


def fails(name, *script, text="", status, code, message, **fields):
    """
    A scenario that ends in an error.

    Where there is a text before it, a client that streams reads the error in the stream,
    and has no status.
    """
    whole = Answer(failure=Failure(status, code, message))
    streamed = Answer(text, failure=Failure(None, code, message)) if text else whole
    return Scenario(name, script, streamed, whole, **fields)


def utf8_pieces(text):
    """*text* as single bytes, so that every character that can be split is."""
    return tuple(bytes([byte]) for byte in text.encode())


# Characters of two, three and four bytes, one that is several, a flag; what a careless
# reader takes for the end of a line; what JSON, HTML and SSE have a meaning for.
UNICODE = (
    "é€𝄞 👩‍🚀 🇳🇴 e\u0301 日本語"
    "\u2028\u2029\u0085\r\n\n\x0b\x0c\x1e"
    '"\\</script>&amp; data: [DONE]\n\ndata: {}\ttab\ufeff\x7f'
)
LARGE = "0123456789abcdé\n" * 131_072  # 2 MiB, a little more in bytes
OSLO = {"city": "Oslo, a \"city\" with 'é' 👋"}
OSLO_PIECES = ('{"ci', 'ty": ', json.dumps(OSLO["city"])[:9], json.dumps(OSLO["city"])[9:], "}")
NUMBERS = tuple(f"{number} " for number in range(1000))


def weather_calls():
    """One call in pieces."""
    first, *others = OSLO_PIECES
    yield ToolCallDelta(0, id="call_1", name="weather", arguments=first)
    yield from (ToolCallDelta(0, arguments=piece) for piece in others)


SCENARIOS = (
    says("text", "Hel", "lo", text="Hello"),
    says("thousand tokens", *NUMBERS, text="".join(NUMBERS)),
    says("unicode", *utf8_pieces(UNICODE), text=UNICODE),
    says("large token", LARGE, text=LARGE),
    says("empty"),
    says("length", "Hel", Finish("length"), text="Hel", finish="length"),
    says(
        "reasoning",
        *(Reasoning("Let me "), Reasoning("think.")),
        *("It is ", "4."),
        text="It is 4.",
        reasoning="Let me think.",
        needs={"reasoning"},
    ),
    says(
        "tool",
        *weather_calls(),
        Finish("tool_calls"),
        calls=(ToolCall("call_1", "weather", OSLO),),
        finish="tool_calls",
        tools=TOOLS,
        needs={"tools"},
    ),
    says(
        "text and tool",
        "I look.",
        *weather_calls(),
        Finish("tool_calls"),
        text="I look.",
        calls=(ToolCall("call_1", "weather", OSLO),),
        finish="tool_calls",
        tools=TOOLS,
        needs={"tools"},
    ),
    says(
        "parallel tools",
        *weather_calls(),
        ToolCallDelta(1, id="call_2", name="weather", arguments='{"city":"Rome"}'),
        ToolCallDelta(2, id="call_3", name="now", arguments="{}"),
        Finish("tool_calls"),
        calls=(
            ToolCall("call_1", "weather", OSLO),
            ToolCall("call_2", "weather", {"city": "Rome"}),
            ToolCall("call_3", "now", {}),
        ),
        finish="tool_calls",
        tools=TOOLS,
        needs={"tools"},
    ),
    says(
        "reasoning and tool",
        Reasoning("Hm."),
        *weather_calls(),
        Finish("tool_calls"),
        reasoning="Hm.",
        calls=(ToolCall("call_1", "weather", OSLO),),
        finish="tool_calls",
        tools=TOOLS,
        needs={"tools", "reasoning"},
    ),
    says(
        "conversation",
        "4 °C.",
        text="4 °C.",
        messages=(
            Message("system", "Be brief."),
            Message("user", "Hi"),
            Message("assistant", "Hello."),
            Message("user", "How cold is it?"),
            Message("assistant", "", tool_calls=(Called("call_1", "weather", '{"city":"Oslo"}'),)),
            Message("tool", "4 degrees", tool_call_id="call_1"),
        ),
        tools=TOOLS,
        needs={"tools", "chat"},
    ),
    says("pings", REST, "Hel", REST, "lo", text="Hello", mount="/pinging"),
    fails(
        "error before",
        UpstreamError("The model server is down."),
        status=502,
        code="upstream_error",
        message="The model server is down.",
        ends=UpstreamError,
    ),
    fails(
        "error in the middle",
        "Hel",
        UpstreamError("The model server is gone."),
        text="Hel",
        status=502,
        code="upstream_error",
        message="The model server is gone.",
        ends=UpstreamError,
    ),
    fails(
        "busy",
        QueueFullError("The queue is full.", retry_after=1),
        status=429,
        code="queue_full",
        message="The queue is full.",
        ends=QueueFullError,
    ),
    fails(
        "wrong key",
        mount="/locked",
        status=401,
        code="invalid_api_key",
        message="The API key is wrong.",
    ),
    fails(
        "no such model",
        mount="/single",
        model="nobody",
        status=404,
        code="model_not_found",
        message="There is no model 'nobody' here. There is 'text'.",
    ),
    fails(
        "deadline before",
        WAIT,
        timeout_seconds=0.2,
        status=504,
        code="deadline_exceeded",
        message="The request's deadline passed.",
        ends=DeadlineExceededError,
    ),
    fails(
        "deadline in the middle",
        "Hel",
        WAIT,
        text="Hel",
        timeout_seconds=0.5,  # On a busy machine the first token takes a while, too.
        status=504,
        code="deadline_exceeded",
        message="The request's deadline passed.",
        ends=DeadlineExceededError,
    ),
    Scenario(
        "cancel",
        ("Hel", WAIT, "lo"),
        Answer("Hel"),
        None,
        leaves=True,
        ends=RequestCancelledError,
    ),
    Scenario(
        "gives up",
        (WAIT,),
        # Most clients tell the server their timeout: either may be the first to say so.
        Answer(failure=ANY),
        Answer(failure=ANY),
        gives_up_seconds=0.5,
        ends=(RequestCancelledError, DeadlineExceededError),
    ),
)
