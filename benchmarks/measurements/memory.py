"""What an open stream holds, of memory that nothing shares, while no token comes."""

from __future__ import annotations

from time import sleep

from .. import machine
from ..figures import Row, at_most, by_round, only
from .streams import OURS

SERVERS = ("parked", *OURS)
FEW, MANY, HELD = 1000, 3000, 10_000
TARGET_KIB = 24
# Longer than a heartbeat's interval; the budget for silence must not end it.
HOLD_SECONDS = 20
PING = b": ping\n\n"
PATIENT = {"FLASK_LLMSTREAM_IDLE_SECONDS": "600"}


def measure(lab):
    asked = [
        (number, name, streams, 1)
        for number in range(lab.rounds)
        for name in SERVERS
        for streams in (FEW, MANY)
    ]
    asked += [(0, name, HELD, HOLD_SECONDS) for name in OURS]
    return [{"round": number, **hold(lab, *of)} for number, *of in asked]


def hold(lab, name, streams, seconds):
    """Open *streams*, look at the memory, see that they are there *seconds* later."""
    looks = []

    def look():
        sleep(1)  # In the warm-up: what the start left behind is gone.
        looks.append(machine.private_bytes(server.pid))

    with lab.serving(name, **PATIENT) as server:
        before = machine.private_bytes(server.pid)
        run = lab.load(server, streams, model="silent", seconds=seconds, on_start=look)
    lab.say(f"{name}: {streams} streams, {(looks[0] - before) / streams / 1024:.1f} KiB each")
    return {"server": name, "before": before, "private": looks[0], **run}


def rows(runs):
    rows = []
    for name in SERVERS:
        few, many = (by_round(runs, "private", server=name, streams=each) for each in (FEW, MANY))
        kib = [(many[each] - few[each]) / (MANY - FEW) / 1024 for each in many]
        if name in OURS:
            what = f"private memory an idle stream, {OURS[name]}"
            rows.append(at_most(what, kib, TARGET_KIB, "KiB"))
        else:
            rows.append(only("private memory an idle stream, gunicorn's own share", kib, "KiB"))
    for name, title in OURS.items():
        for run in runs:
            if run["server"] == name and run["streams"] == HELD:
                kib = (run["private"] - run["before"]) / HELD / 1024
                alive = run["started"] - run["lost"]
                pinged = run["bytes"] >= HELD * len(PING)
                rows.append(
                    Row(
                        f"idle streams held on one worker for {HOLD_SECONDS} s, {title}",
                        f"{alive:,}{' with pings' if pinged else ''}, {kib:.1f} KiB each",
                        f"{HELD:,} with pings",
                        alive == HELD and pinged,
                    )
                )
    return rows
