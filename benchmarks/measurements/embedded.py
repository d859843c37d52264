"""A real model, small and on the processor: the same answer streamed and in one piece."""

from __future__ import annotations

import http.client
import json
from time import perf_counter

from ..figures import at_least, by_round, only, ratios
from ..lab import PATH

TOKENS = 120
ANSWERS = 5
TARGET = 0.98


def measure(lab):
    runs = []
    with lab.serving("embedded") as server:
        ask(server.port, stream=False)
        for number in range(lab.rounds):
            rates = {True: [], False: []}
            for each in range(ANSWERS):
                for stream in (True, False) if each % 2 else (False, True):
                    rates[stream].append(ask(server.port, stream=stream))
            # The fastest: what else the machine did is neither's cost.
            fastest = {stream: max(found) for stream, found in rates.items()}
            runs += [
                {"round": number, "stream": stream, "tokens_per_second": rate}
                for stream, rate in fastest.items()
            ]
            lab.say(f"round {number + 1}: {fastest[True]:.1f} and {fastest[False]:.1f} tokens/s")
    return runs


def ask(port, *, stream):
    """Tokens a second, from the request to the answer's end."""
    body = {
        "model": "small",
        "stream": stream,
        "max_tokens": TOKENS,
        "seed": 1,
        "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse."}],
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    begun = perf_counter()
    connection.request("POST", PATH, json.dumps(body))
    answer = connection.getresponse().read()
    seconds = perf_counter() - begun
    connection.close()
    if stream:
        *_, answer, _, _ = answer.split(b"\n\n")  # The usage, [DONE], and the end.
        answer = answer.removeprefix(b"data: ")
    return json.loads(answer)["usage"]["completion_tokens"] / seconds


def rows(runs):
    streamed, whole = (by_round(runs, "tokens_per_second", stream=each) for each in (True, False))
    return [
        only("embedded model, streaming, tokens/s", [*streamed.values()]),
        only("embedded model, in one piece, tokens/s", [*whole.values()]),
        at_least("tokens/s, streaming against in one piece", ratios(streamed, whole), TARGET, "×"),
    ]
