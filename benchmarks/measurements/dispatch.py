"""The pool: from submit() to the worker that takes the request. Run as a module, in a process."""

from __future__ import annotations

import sys

if __name__ == "__main__" and "--patched" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

import json
import subprocess
from time import monotonic, perf_counter

from .. import machine
from ..figures import at_most, by_round, only

REQUESTS = 5000
TOKENS = 300_000
KINDS = {"from a thread": (), "from a greenlet": ("--patched",)}


def measure(lab):
    runs = []
    for number in range(lab.rounds):
        for kind, arguments in KINDS.items():
            command = [sys.executable, "-m", __name__, *arguments]
            with machine.starting_servers():
                finished = subprocess.run(
                    command, cwd=machine.ROOT, stdout=subprocess.PIPE, check=True
                )
            runs.append({"submitter": kind, "round": number, **json.loads(finished.stdout)})
            lab.say(f"round {number + 1}: {kind}: p99 {runs[-1]['pickup_p99']:.0f} µs")
    return runs


def rows(runs):
    rows = []
    for kind in KINDS:
        for field, what, target in (
            ("pickup_p50", "submit() to the worker's pickup, p50", None),
            ("pickup_p99", "submit() to the worker's pickup, p99", 50),
            ("answer_p50", "submit() to a one-token answer, p50", None),
            ("token", "a token from a worker to its consumer", None),
        ):
            values = [*by_round(runs, field, submitter=kind).values()]
            named = f"{what}, {kind}"
            rows.append(
                at_most(named, values, target, "µs") if target else only(named, values, "µs")
            )
    return rows


def main():
    from flask_llmstream import AsyncInferenceEngine, InferenceRequest
    from flask_llmstream.core.channel import Channel

    taken = []

    class Tokens:
        def generate(self, request):
            taken.append(perf_counter())
            for _ in range(request.max_tokens):
                yield "token"

    engine = AsyncInferenceEngine(Tokens(), worker_threads=2)
    pickups, answers = [], []
    for _ in range(REQUESTS):
        begun = perf_counter()
        engine.submit(InferenceRequest(prompt="hello", max_tokens=1), timeout_seconds=60).get(10)
        answers.append(perf_counter() - begun)
        pickups.append(taken[-1] - begun)

    channel = Channel()
    begun = perf_counter()
    request = InferenceRequest(prompt="hello", max_tokens=TOKENS, stream_callback=channel.send)
    engine.submit(request).add_done_callback(channel.close)
    received = 0
    while not channel.is_drained:
        received += len(channel.receive_batch(monotonic() + 10))
    found = {
        "pickup_p50": percentile(pickups, 0.5),
        "pickup_p99": percentile(pickups, 0.99),
        "answer_p50": percentile(answers, 0.5),
        "token": (perf_counter() - begun) / received * 1e6,
    }
    engine.shutdown(timeout_seconds=5)
    print(json.dumps(found))


def percentile(durations, share):
    return sorted(durations)[int(len(durations) * share)] * 1e6


if __name__ == "__main__":
    main()
