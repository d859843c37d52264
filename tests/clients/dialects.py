"""What the dialects' requests look like, and what they cannot tell."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
        body["tools"] = _openai_tools(scenario)
    return body


def _openai_tools(scenario):
    return [
        {
            "type": "function",
            "function": {"name": function.name, "parameters": function.parameters},
        }
        for function in scenario.tools
    ]


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


def _openai_responses(scenario):
    body = {
        "model": scenario.model or scenario.name,
        "input": [item for message in scenario.messages for item in _response_items(message)],
    }
    if scenario.tools:
        body["tools"] = [
            {
                "type": "function",
                "name": function.name,
                "parameters": function.parameters,
                "strict": False,
            }
            for function in scenario.tools
        ]
    return body


def _response_items(message):
    if message.tool_call_id:
        yield {
            "type": "function_call_output",
            "call_id": message.tool_call_id,
            "output": message.text,
        }
    elif message.text:
        yield {"role": message.role, "content": message.text}
    for call in message.tool_calls:
        yield {
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        }


def _anthropic(scenario):
    system, turns = _system_and_turns(scenario)
    body = {
        "model": scenario.model or scenario.name,
        "max_tokens": 10_000,  # More, and the SDK insists on streaming.
        "messages": [_anthropic_message(message) for message in turns],
        "tools": [
            {"name": function.name, "input_schema": function.parameters}
            for function in scenario.tools
        ],
    }
    if system:
        body["system"] = system
    return body


def _system_and_turns(scenario):
    """The text of the system's message, for who has it apart; and the other messages."""
    first, *others = scenario.messages
    return (first.text, others) if first.role == "system" else (None, scenario.messages)


def _anthropic_message(message):
    if message.tool_call_id:
        result = {
            "type": "tool_result",
            "tool_use_id": message.tool_call_id,
            "content": message.text,
        }
        return {"role": "user", "content": [result]}
    if message.tool_calls:
        uses = [
            {
                "type": "tool_use",
                "id": call.id,
                "name": call.name,
                "input": json.loads(call.arguments),
            }
            for call in message.tool_calls
        ]
        return {"role": message.role, "content": uses}
    return {"role": message.role, "content": message.text}


def _ollama_chat(scenario):
    names = {call.id: call.name for message in scenario.messages for call in message.tool_calls}
    return {
        "model": scenario.model or scenario.name,
        "messages": [_ollama_message(message, names) for message in scenario.messages],
        "tools": _openai_tools(scenario),
    }


def _ollama_message(message, names):
    spoken = {"role": message.role, "content": message.text}
    if message.tool_calls:
        spoken["tool_calls"] = [
            {"function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        spoken["tool_name"] = names[message.tool_call_id]
    return spoken


def _prompt(scenario):
    return {"model": scenario.model or scenario.name, "prompt": scenario.messages[-1].text}


def _ai_sdk(scenario):
    """What the AI SDK takes; its providers make the dialect's own request of it."""
    names = {call.id: call.name for message in scenario.messages for call in message.tool_calls}
    system, turns = _system_and_turns(scenario)
    return {
        "model": scenario.model or scenario.name,
        "system": system,
        "messages": [_ai_sdk_message(message, names) for message in turns],
        "tools": [asdict(function) for function in scenario.tools],
    }


def _ai_sdk_message(message, names):
    if message.role == "tool":
        result = {
            "type": "tool-result",
            "toolCallId": message.tool_call_id,
            "toolName": names[message.tool_call_id],
            "output": {"type": "text", "value": message.text},
        }
        return {"role": "tool", "content": [result]}
    if message.tool_calls:
        calls = [
            {
                "type": "tool-call",
                "toolCallId": call.id,
                "toolName": call.name,
                "input": json.loads(call.arguments),
            }
            for call in message.tool_calls
        ]
        return {"role": message.role, "content": calls}
    return {"role": message.role, "content": message.text}


def _ai_sdk_ui(scenario):
    """What a page sends: a tool's result stands in the message that called it."""
    results = {
        message.tool_call_id: message.text for message in scenario.messages if message.tool_call_id
    }
    turns = [message for message in scenario.messages if message.role != "tool"]
    return {
        "model": scenario.model or scenario.name,
        "messages": [
            {"id": f"message-{index}", "role": turn.role, "parts": _ui_parts(turn, results)}
            for index, turn in enumerate(turns)
        ],
        "tools": _openai_tools(scenario),
    }


def _ui_parts(message, results):
    texts = [{"type": "text", "text": message.text}] if message.text else []
    return texts + [
        {
            "type": f"tool-{call.name}",
            "toolCallId": call.id,
            "state": "output-available",
            "input": json.loads(call.arguments),
            "output": results[call.id],
        }
        for call in message.tool_calls
    ]


OPENAI_CHAT = Dialect("/v1", _openai_chat)
OPENAI_COMPLETION = Dialect("/v1", _prompt, has=frozenset())
OPENAI_RESPONSES = Dialect("/v1", _openai_responses)
AI_SDK_OPENAI_COMPLETION = Dialect("/v1", _ai_sdk, has=frozenset())
AI_SDK_OPENAI_RESPONSES = Dialect("/v1", _ai_sdk)
AI_SDK_OPENAI_CHAT = Dialect("/v1", _ai_sdk)
ANTHROPIC = Dialect("", _anthropic, untold=frozenset({"code"}))
AI_SDK_ANTHROPIC = Dialect("/v1", _ai_sdk, untold=frozenset({"code"}))
AI_SDK_UI = Dialect("/api/ai", _ai_sdk_ui, untold=frozenset({"status", "code"}))
OLLAMA_CHAT = Dialect("", _ollama_chat, untold=frozenset({"call ids", "code"}))
OLLAMA_GENERATE = Dialect(
    "", _prompt, has=frozenset({"reasoning"}), untold=frozenset({"call ids", "code"})
)
NATIVE = Dialect("/stream", _openai_chat)
PLAIN_TEXT = Dialect(
    "/stream",
    _openai_chat,
    has=frozenset({"chat"}),
    untold=frozenset({"finish", "usage", "code", "message"}),
)


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
