"""What the engine adds: the cost of submit(), and of one token's way to its consumer."""

from __future__ import annotations

import sys

if "--patched" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

import gc
from time import monotonic, perf_counter

from flask_llmstream import AsyncInferenceEngine, InferenceRequest
from flask_llmstream.core.channel import Channel

ROUNDS = 5000
TOKENS = 500_000


class Tokens:
    def generate(self, request):
        for _ in range(request.max_tokens or 0):
            yield "token"


def percentile(values, share):
    return sorted(values)[int(len(values) * share)] * 1e6


def main():
    engine = AsyncInferenceEngine(Tokens(), worker_threads=2)
    submits, answers = [], []
    gc.disable()
    for _ in range(ROUNDS):
        begun = perf_counter()
        handle = engine.submit(InferenceRequest(prompt="hello", max_tokens=1), timeout_seconds=60)
        submitted = perf_counter()
        handle.get(10)
        answered = perf_counter()
        submits.append(submitted - begun)
        answers.append(answered - begun)
    gc.enable()
    for name, values in (("submit()", submits), ("one-token answer", answers)):
        print(
            f"{name}: p50 {percentile(values, 0.5):.1f} µs, p99 {percentile(values, 0.99):.1f} µs"
        )

    channel = Channel()
    begun = perf_counter()
    handle = engine.submit(
        InferenceRequest(prompt="hello", max_tokens=TOKENS, stream_callback=channel.send)
    )
    handle.add_done_callback(channel.close)
    received = batches = 0
    while not channel.is_drained:
        received += len(channel.receive_batch(monotonic() + 10))
        batches += 1
    seconds = perf_counter() - begun
    print(
        f"worker to consumer: {seconds / received * 1e6:.2f} µs a token, "
        f"{received / batches:.0f} tokens a wake-up"
    )


if __name__ == "__main__":
    main()
