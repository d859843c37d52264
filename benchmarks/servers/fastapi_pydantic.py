"""FastAPI with a pydantic model for each chunk: as the big inference servers do it."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from .fastapi_steps import ChatRequest, lifespan, stream_texts


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None


class Choice(BaseModel):
    index: int
    delta: Delta
    logprobs: Any = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def chat(request: ChatRequest):
    return StreamingResponse(render(request.model), media_type="text/event-stream")


async def render(model):
    id = f"chatcmpl-{uuid.uuid4().hex[:24]}"
    created = int(time.time())
    async for text in stream_texts():
        choice = Choice(index=0, delta=Delta(content=text), logprobs=None, finish_reason=None)
        chunk = Chunk(
            id=id,
            object="chat.completion.chunk",
            created=created,
            model=model,
            system_fingerprint="fp_flask_llmstream_0.1.0",
            choices=[choice],
        )
        yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
