"""Growing numbers of streams at 25 tokens/s: what a token costs, how late and how many come."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from ..figures import Row, at_most, by_round, only, ratios
from ..servers import KINDS, STREAMING
from ..steps import STEPS_PER_SECOND

OURS = {"ours-worker": "worker class", "ours-gevent": "gevent worker"}
COMPARED = (600, 1200)
OVERLOAD = 4000
# Noise between two runs of one server; a server that collapses loses far more.
STILL_AS_MANY = 0.97
# Peers that deliver less of the tokens are not asked for more.
FELL_BEHIND = 0.8

# (server, other server, target): processor time a token.
TARGETS = (
    ("ours-gevent", "limit", 3.5),
    ("ours-gevent", "fastapi-orjson", 0.7),
    ("ours-worker", "limit", 2.0),
    ("ours-worker", "fastapi-orjson", 0.45),
    ("ours-worker", "fastapi-pydantic", 0.35),
)


def measure(lab):
    runs = []
    most = {}
    for number in range(lab.rounds):
        first = number % len(STREAMING)
        for streams in lab.streams:
            for name in STREAMING[first:] + STREAMING[:first]:
                if streams > most.get(name, streams):
                    continue
                with lab.serving(name) as server:
                    run = lab.load(server, streams)
                runs.append({"server": name, "round": number, **run})
                lab.say(f"round {number + 1}: {name}, {streams} streams: {brief(run)}")
                if share_of_offered(run) < FELL_BEHIND and name not in OURS:
                    most[name] = streams
    return runs


def brief(run):
    """For who watches."""
    if "seconds" not in run:
        return f"only {run['started']} started, {run['lost']} lost"
    return (
        f"{run['microseconds_per_token']:.1f} µs a token, {share_of_offered(run):.0%} delivered; "
        f"others had {run['others_share']:.0%} of its processor"
    )


def share_of_offered(run):
    """Of the engine's tokens, how many came."""
    return run.get("tokens_per_second", 0) / (run["streams"] * STEPS_PER_SECOND)


def is_complete(run):
    """Every stream opened and lived, and had every token once, in order."""
    return (
        run["started"] == run["streams"]
        and not run["lost"]
        and not run.get("gaps", 1)
        and not run["malformed"]
        and run["fewest_tokens"] > 0
    )


def rows(runs):
    rows = []
    for streams in COMPARED:
        costs = {
            name: by_round(runs, "microseconds_per_token", server=name, streams=streams)
            for name in STREAMING
        }
        rows += [
            at_most(
                f"CPU a token, {streams:,} streams, {OURS[name]}: against {KINDS[other].title}",
                found,
                target,
                "×",
            )
            for name, other, target in TARGETS
            if (found := ratios(costs[name], costs[other]))
        ]
    for name, title in OURS.items():
        rows += overload_rows([run for run in runs if run["server"] == name], title)
    return rows


def overload_rows(runs, title):
    counts = sorted({run["streams"] for run in runs})
    rows = []
    overloaded = [run for run in runs if run["streams"] == OVERLOAD]
    if overloaded:
        complete = sum(map(is_complete, overloaded))
        rows.append(
            Row(
                f"overload, {title}: {OVERLOAD:,} streams get every token, in order",
                f"{complete} of {len(overloaded)} runs",
                "all",
                complete == len(overloaded),
            )
        )
        shares = [share_of_offered(run) * 100 for run in overloaded]
        rows.append(only(f"overload, {title}: of {OVERLOAD * 25:,} tokens/s offered", shares, "%"))
    if len(counts) > 1:
        rates = [
            median(run.get("tokens_per_second", 0) for run in runs if run["streams"] == streams)
            for streams in counts
        ]
        steps = [after / before for before, after in pairwise(rates) if before]
        rows.append(
            Row(
                f"tokens/s over growing load, {title}",
                " → ".join(f"{rate:,.0f}" for rate in rates),
                "never fall",
                all(step >= STILL_AS_MANY for step in steps),
            )
        )
    return rows


def figures(runs):
    """For each server and number of streams what the whole runs saw; none where none began."""
    for count in sorted({run["streams"] for run in runs}):
        for name in STREAMING:
            taken = [run for run in runs if (run["server"], run["streams"]) == (name, count)]
            whole = [run for run in taken if "seconds" in run]
            if taken:
                yield {
                    "server": name,
                    "streams": count,
                    "started": [run["started"] for run in taken],
                    "costs": [run["microseconds_per_token"] for run in whole],
                    "merged": [run["tokens_per_read"] for run in whole],
                    "p50": [run["p50_ms"] for run in whole],
                    "p99": [run["p99_ms"] for run in whole],
                    "shares": [100 * share_of_offered(run) for run in taken],
                }
