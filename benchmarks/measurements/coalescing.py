"""What ``COALESCE_SECONDS`` saves: fewer, larger writes."""

from __future__ import annotations

from ..figures import at_most, by_round, ratios
from .streams import OURS, brief

STREAMS = 1200
SECONDS = (0, 0.2)
TARGET = 0.4


def measure(lab):
    runs = []
    for number in range(lab.rounds):
        for name in OURS:
            for seconds in SECONDS:
                with lab.serving(name, FLASK_LLMSTREAM_COALESCE_SECONDS=str(seconds)) as server:
                    run = lab.load(server, STREAMS)
                runs.append({"server": name, "round": number, "coalesce_seconds": seconds, **run})
                lab.say(f"round {number + 1}: {name}, {seconds} s: {brief(run)}")
    return runs


def rows(runs):
    rows = []
    for name, title in OURS.items():
        without, coalesced = (
            by_round(runs, "microseconds_per_token", server=name, coalesce_seconds=seconds)
            for seconds in SECONDS
        )
        what = f"CPU a token with COALESCE_SECONDS=0.2, {STREAMS:,} streams, {title}: against 0"
        if found := ratios(coalesced, without):
            rows.append(at_most(what, found, TARGET, "×"))
    return rows
