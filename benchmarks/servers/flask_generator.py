"""A Flask generator with `json.dumps` under gunicorn's gevent worker: the home-made form."""

from __future__ import annotations

import json
import time
import uuid
from collections import deque

import gevent
from flask import Flask, Response, request
from gevent.queue import SimpleQueue

from ..steps import StepEngine

queues = set()
arrived = deque()
app = Flask(__name__)


def deliver():
    while arrived:
        text = arrived.popleft()
        for queue in queues:
            queue.put_nowait(text)


# One wake-up of the hub a step; the only one that a native thread may cause.
watcher = gevent.get_hub().loop.async_()
watcher.start(deliver)


def on_step(text):
    arrived.append(text)
    watcher.send()


StepEngine(on_step)


@app.post("/v1/chat/completions")
def chat():
    return Response(render(request.json["model"]), mimetype="text/event-stream")


def render(model):
    id = f"chatcmpl-{uuid.uuid4().hex[:24]}"
    created = int(time.time())
    queue = SimpleQueue()
    queues.add(queue)
    try:
        while True:
            text = queue.get()
            while not queue.empty():
                text += queue.get()
            chunk = {
                "id": id,
                "object": "chat.completion.chunk",
                "created": created,
                "model": model,
                "system_fingerprint": "fp_flask_llmstream_0.1.0",
                "choices": [
                    {
                        "index": 0,
                        "delta": {"content": text},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                ],
            }
            yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
    finally:
        queues.discard(queue)
