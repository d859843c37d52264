"""
What LiteLLM reads, as a line of JSON: ``ask_litellm.py http://127.0.0.1:8000/v1``.

A script, since LiteLLM needs an older `openai` than the one that the other tests use, and
so an environment of its own.
"""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or the import fetches one

import litellm
import openai

litellm.telemetry = False
litellm.suppress_debug_info = True

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def main(base_url):
    def ask(model, messages, **fields):
        return litellm.completion(
            model=f"openai/{model}",
            messages=messages,
            api_base=base_url,
            api_key="secret",
            max_retries=0,
            timeout=20,
            **fields,
        )

    def stream(model, messages, **fields):
        chunks = list(
            ask(model, messages, stream=True, stream_options={"include_usage": True}, **fields)
        )
        return litellm.stream_chunk_builder(chunks, messages=messages)

    text = stream("text", HI)
    called = stream("weather", HI, tools=[WEATHER]).choices[0]
    (call,) = called.message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"}
    turns = [*HI, called.message.model_dump(exclude_none=True), result]
    failure = None
    try:
        list(ask("breaks", HI, stream=True))
    except openai.APIError as error:  # what all of its own are made of
        failure = [type(error).__name__, str(error)]
    return {
        "text": text.choices[0].message.content,
        "usage": [text.usage.prompt_tokens, text.usage.completion_tokens],
        "call": [called.finish_reason, call.function.name, call.function.arguments],
        "after the tool": ask("weather", turns, tools=[WEATHER]).choices[0].message.content,
        "failure": failure,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
