"""Forks in the middle of a run: the child's engine starts empty and works."""

import os
import threading
import warnings

from flask_llmstream.core.messages import InferenceRequest
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine

is_inside, gate = threading.Event(), threading.Event()


class Backend:
    def generate(self, request):
        if request.prompt == "a":
            is_inside.set()
            assert gate.wait(20)
        yield f"{request.prompt}!"


engine = AsyncInferenceEngine(Backend(), worker_threads=1, queue_size=1)
running = engine.submit(InferenceRequest(prompt="a"), timeout_seconds=60)
assert is_inside.wait(10)
waiting = engine.submit(InferenceRequest(prompt="waits"))
warnings.simplefilter("ignore", DeprecationWarning)  # A fork with threads is the point.
child = os.fork()
if child == 0:
    code = 1
    try:
        before = engine.queue_stats()
        assert (before["waiting"], before["running"], before["total_submitted"]) == (0, 0, 0)
        running.cancel()
        waiting.cancel()
        assert engine.submit(InferenceRequest(prompt="child")).get(10).text == "child!"
        late = engine.submit(InferenceRequest(prompt="b"), timeout_seconds=60)
        assert late.get(10).text == "b!"
        assert engine.wait_for_completion(10)
        after = engine.queue_stats()
        assert (after["total_submitted"], after["total_completed"]) == (2, 2)
        assert (after["waiting"], after["running"], after["total_cancelled"]) == (0, 0, 0)
        engine.shutdown(timeout_seconds=10)
        code = 0
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert not running.ready()
gate.set()
assert waiting.get(10).text == "waits!"
print("parent:", running.get(10).text)
