"""What the FastAPI apps share: the request, and the step engine with one call a step."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from pydantic import BaseModel

from ..steps import StepEngine

queues = set()


class Message(BaseModel):
    role: str
    content: str


class ChatRequest(BaseModel):
    model: str
    messages: list[Message]
    stream: bool = False


def deliver(text):
    """On the event loop, once a step."""
    for queue in queues:
        queue.put_nowait(text)


@asynccontextmanager
async def lifespan(app):  # noqa: ARG001
    """Of the app: starts the engine."""
    loop = asyncio.get_running_loop()
    StepEngine(lambda text: loop.call_soon_threadsafe(deliver, text))
    yield


async def stream_texts():
    """The texts of one sequence; those that wait come as one."""
    queue = asyncio.Queue()
    queues.add(queue)
    try:
        while True:
            text = await queue.get()
            while not queue.empty():
                text += queue.get_nowait()
            yield text
    finally:
        queues.discard(queue)
