"""How much a worker process held before a fault, and whether it holds no more after it."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic, sleep

RETURN_SECONDS = 15.0
GROWTH_BYTES = 8 * 1024 * 1024
"""What a worker's memory may have grown by: arenas that the first such fault fills. What is
kept of requests shows in `kept`, which may not grow at all."""

EXACT = ("live", "slots", "stuck", "threads", "greenlets", "files", "kept")


@dataclass(frozen=True)
class Baseline:
    """What `server.probe` saw."""

    figures: dict

    @classmethod
    def of(cls, control):
        return cls(control.look())

    def excess(self, start, ignoring=(), growth_bytes=GROWTH_BYTES):
        """What of it is more than at the *start*, as text; empty where nothing is."""
        more = [
            f"{name} {start.figures[name]} -> {self.figures[name]}"
            for name in EXACT
            if name not in ignoring and self.figures[name] > start.figures[name]
        ]
        if self.figures["memory"] - start.figures["memory"] > growth_bytes:
            more.append(f"memory {start.figures['memory']} -> {self.figures['memory']}")
        return ", ".join(more)

    def change(self, start):
        """By how much each figure differs from the *start*."""
        return {name: self.figures[name] - start.figures[name] for name in (*EXACT, "memory")}


def wait_for_return(control, start, seconds=RETURN_SECONDS, *, ignoring=()):
    """Look until the worker holds no more than at the *start*, and its books are right."""
    until = monotonic() + seconds
    while True:
        now = Baseline.of(control)
        check_books(now.figures["stats"])
        excess = now.excess(start, ignoring)
        if not excess:
            return now
        assert monotonic() < until, f"not back after {seconds:g} s: {excess}"
        sleep(0.05)


def check_books(stats):
    """Every accepted request is in exactly one place."""
    for figures in (stats["total"], *stats["models"].values()):
        places = [figures[name] for name in ("queued", "active", "completed")]
        places += [figures[name] for name in ("dropped", "slow_readers")]
        for name in ("cancelled", "timed_out", "failed"):
            places += figures[name].values()
        assert figures["accepted"] == sum(places), figures
        assert min(places) >= 0, figures


def wait_until_idle(control, seconds=RETURN_SECONDS):
    """Look until two looks in a row are the same: whoever was served is gone."""
    until = monotonic() + seconds
    before = None
    while True:
        now = Baseline.of(control)
        if before is not None and not (now.excess(before) or now.figures["live"]):
            return
        assert monotonic() < until, now.figures
        before = now
        sleep(0.1)
