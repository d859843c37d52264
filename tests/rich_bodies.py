"""For each route that takes a body: one that uses as many of its fields as go together."""

from __future__ import annotations

PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":"b"}'}}

SAMPLING = {
    "model": "m",
    "stream": False,
    "max_tokens": 5,
    "temperature": 1,
    "top_p": 0.5,
    "top_k": 1,
    "seed": 1,
    "stop": ["x"],
    "n": 1,
    "metadata": {"a": 1},
}
GENERATION = {
    **SAMPLING,
    "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}},
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
}
CHAT = {
    **GENERATION,
    "messages": [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            ],
            "name": "n",
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
    ],
}
ANTHROPIC = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi"},
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": "b"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c",
                    "content": [{"type": "text", "text": "r"}],
                    "is_error": False,
                }
            ],
        },
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u"},
    "stream": False,
    "temperature": 1,
    "top_p": 1,
    "top_k": 1,
}
OLLAMA = {
    "model": "m",
    "stream": False,
    "format": SCHEMA,
    "options": {"num_predict": 5, "temperature": 1, "top_p": 1, "top_k": 1, "stop": ["x"]},
    "think": True,
    "logprobs": False,
    "top_logprobs": 0,
    "keep_alive": "5m",
}

RICH_BODIES = {
    "/stream": CHAT,
    "/v1/chat/completions": {
        **CHAT,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 5,
        "parallel_tool_calls": True,
        "user": "u",
        "service_tier": "auto",
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "modalities": ["text"],
        "verbosity": "medium",
        "store": True,
    },
    "/v1/completions": {
        **SAMPLING,
        "prompt": ["a", "b"],
        "echo": False,
        "best_of": 1,
        "logprobs": None,
        "suffix": None,
        "stream_options": {"include_usage": True},
        "user": "u",
    },
    "/v1/responses": {
        "model": "m",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "r"},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "t"}],
            },
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x", "annotations": []}],
            },
        ],
        "instructions": "i",
        "max_output_tokens": 5,
        "text": {
            "format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True},
            "verbosity": "medium",
        },
        "reasoning": {"effort": None, "summary": None},
        "parallel_tool_calls": True,
        "truncation": "disabled",
        "store": True,
        "background": False,
        "stream": False,
        "metadata": {"a": "b"},
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "user": "u",
        "temperature": 1,
        "top_p": 1,
    },
    "/anthropic/v1/messages": ANTHROPIC,
    "/anthropic/v1/messages/count_tokens": ANTHROPIC,
    "/api/chat": {
        **OLLAMA,
        "messages": [
            {"role": "user", "content": "Hi", "images": [PNG]},
            {
                "role": "assistant",
                "content": "",
                "thinking": "t",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "tool_name": "f", "content": "r"},
        ],
        "tools": [TOOL],
    },
    "/api/generate": {
        **OLLAMA,
        "prompt": "Hi",
        "system": "s",
        "images": [PNG],
        "suffix": "",
        "template": "",
        "raw": False,
        "context": [1],
    },
    "/api/show": {"model": "m", "name": "m", "verbose": True},
    "/api/ai": {
        "id": "c",
        "messageId": "2",
        "trigger": "submit-message",
        "system": "s",
        "messages": [
            {
                "id": "1",
                "role": "user",
                "metadata": {},
                "parts": [
                    {"type": "text", "text": "Hi"},
                    {
                        "type": "file",
                        "mediaType": "image/png",
                        "url": f"data:image/png;base64,{PNG}",
                        "filename": "f",
                    },
                ],
            },
            {
                "id": "2",
                "role": "assistant",
                "parts": [
                    {"type": "step-start"},
                    {"type": "reasoning", "text": "t"},
                    {
                        "type": "tool-f",
                        "toolCallId": "c",
                        "state": "output-available",
                        "input": {"a": 1},
                        "output": {"b": 2},
                    },
                    {
                        "type": "dynamic-tool",
                        "toolName": "g",
                        "toolCallId": "d",
                        "state": "output-error",
                        "input": {},
                        "errorText": "e",
                    },
                    {"type": "data-x", "data": 1},
                    {"type": "source-url", "sourceId": "s", "url": "u"},
                ],
            },
        ],
        "tools": {"f": {"description": "d", "inputSchema": SCHEMA}},
        "toolChoice": {"type": "tool", "toolName": "f"},
        "maxOutputTokens": 5,
        "topP": 1,
        "topK": 1,
        "stopSequences": ["x"],
        "stream": False,
    },
}
