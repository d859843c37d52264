"""What the dialects' requests look like, and what they cannot tell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .scenarios import Scenario


@dataclass(frozen=True)
class Dialect:
    """
    One protocol, whoever speaks it.

    Args:
        base_path: What its clients' base URL ends with.
        body: A scenario's request, without `stream`.
        has: Of what scenarios may need.
        untold: What its answers do not say; see `Answer.without`.
    """

    base_path: str
    body: Callable[[Scenario], dict[str, Any]]
    has: frozenset[str] = frozenset({"chat", "tools", "reasoning"})
    untold: frozenset[str] = frozenset()


def _openai_chat(scenario):
    body = {
        "model": scenario.model or scenario.name,
        "messages": [_openai_message(message) for message in scenario.messages],
    }
    if scenario.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": function.name, "parameters": function.parameters},
            }
            for function in scenario.tools
        ]
    return body


def _openai_message(message):
    spoken = {"role": message.role, "content": message.text}
    if message.tool_calls:
        spoken["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        spoken["tool_call_id"] = message.tool_call_id
    return spoken


OPENAI_CHAT = Dialect("/v1", _openai_chat)


def heard(messages):
    """*messages* as a backend got them, in the words that all dialects share."""
    return [
        (
            message.role,
            message.text,
            [(call.name, json.loads(call.arguments)) for call in message.tool_calls],
        )
        for message in messages
    ]
