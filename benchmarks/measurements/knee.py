"""The most streams that a server holds: every token in time, none lost."""

from __future__ import annotations

from math import sqrt

from ..figures import at_least, by_round, only, ratios
from .streams import is_complete, share_of_offered

SERVERS = ("fastapi-orjson", "ours-worker")
BEGIN = 800
FEWEST = 20
GROWTH = 1.25
BISECTIONS = 2
MOST = 10_000
MOST_ADDED_MS = 100.0
ENOUGH_TOKENS = 0.99


def measure(lab):
    runs = []
    limits = {}
    begins = dict.fromkeys(SERVERS, BEGIN)
    for number in range(lab.rounds):
        for name in SERVERS:
            tries = []

            def holds(streams, name=name, tries=tries):
                # A hiccup of the machine is not the server's: what fails is tried once more.
                limit = limit_of(lab, streams, limits)
                return any(try_out(lab, name, streams, limit, tries) for _ in range(2))

            knee = find_knee(begins[name], holds)
            lab.say(f"round {number + 1}: {name} holds {knee} streams")
            runs.append({"server": name, "round": number, "knee": knee, "tries": tries})
            begins[name] = max(knee, FEWEST)
    return runs


def find_knee(begin, holds):
    """Search from *begin*, up or down, until one number holds and the next does not."""
    held, failed, streams = 0, MOST, begin
    while held < streams < failed:
        if holds(streams):
            held, streams = streams, int(streams * GROWTH)
        else:
            failed, streams = streams, int(streams / GROWTH)
    for _ in range(BISECTIONS if held else 0):
        streams = int(sqrt(held * failed))
        if holds(streams):
            held = streams
        else:
            failed = streams
    return held


def limit_of(lab, streams, limits):
    """The lateness that the load sees with the least possible server; the better of two."""
    if streams not in limits:
        found = []
        for _ in range(2):
            with lab.serving("limit") as server:
                found.append(lab.load(server, streams)["p99_ms"])
        limits[streams] = min(found)
    return limits[streams]


def try_out(lab, name, streams, limit, tries):
    with lab.serving(name) as server:
        run = lab.load(server, streams)
    holds = (
        is_complete(run)
        and share_of_offered(run) >= ENOUGH_TOKENS
        and run["p99_ms"] - limit <= MOST_ADDED_MS
    )
    tries.append({**run, "limit_p99_ms": limit, "holds": holds})
    return holds


def rows(runs):
    knees = {name: by_round(runs, "knee", server=name) for name in SERVERS}
    peers, ours = knees["fastapi-orjson"], knees["ours-worker"]
    rows = [
        only(
            "streams held without loss, p99 ≤ 100 ms more than C, FastAPI + orjson",
            [*peers.values()],
        ),
        only("streams held without loss, p99 ≤ 100 ms more than C, worker class", [*ours.values()]),
    ]
    if found := ratios(ours, peers):
        rows.append(at_least("streams held, worker class: against FastAPI + orjson", found, 3, "×"))
    return rows
