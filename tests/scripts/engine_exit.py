"""Exits while a request runs and another waits: both are told, and the exit is prompt."""

import threading

from flask_llmstream.core.messages import InferenceRequest
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine

is_inside = threading.Event()


class Backend:
    def generate(self, request):
        is_inside.set()
        while not request.cancelled:
            pass
        return "stopped"


engine = AsyncInferenceEngine(Backend(), worker_threads=1)
handles = [engine.submit(InferenceRequest(prompt=prompt)) for prompt in "ab"]
for handle in handles:
    handle.add_done_callback(
        lambda handle=handle: print("told", type(handle.outcome).__name__, flush=True)
    )
assert is_inside.wait(10)
print("running", flush=True)
