"""FastAPI with orjson: what a careful author writes."""

from __future__ import annotations

import time
import uuid

import orjson
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from .fastapi_steps import ChatRequest, lifespan, stream_texts

app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat(request: ChatRequest):
    return StreamingResponse(render(request.model), media_type="text/event-stream")


async def render(model):
    id = f"chatcmpl-{uuid.uuid4().hex[:24]}"
    created = int(time.time())
    async for text in stream_texts():
        chunk = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": "fp_flask_llmstream_0.1.0",
            "choices": [
                {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
            ],
        }
        yield b"data: %b\n\n" % orjson.dumps(chunk)
