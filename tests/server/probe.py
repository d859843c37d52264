"""What a worker process holds: requests, slots, threads, greenlets, files, memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import Counter
from pathlib import Path

from flask_llmstream import LLMStreamError
from flask_llmstream.core import runtime
from flask_llmstream.testing import Signal

KEPT = (
    *("Run", "StreamBody", "Reception", "Channel", "InferenceHandle"),
    *("Recording", "Replay", "Feed"),
)
"""Objects of which there is one a request, or one a reader of it."""


def look(app, llm):
    """
    The figures now, after a collection.

    It is made where requests are served, a greenlet of the hub where there is one: a
    collection finalizes other people's objects, and it shows that the hub still turns.
    """
    figures, is_done = {}, Signal()

    def measure():
        try:
            figures.update(_measure(app, llm))
        finally:
            is_done.set()

    runtime.spawn(measure)
    is_done.wait()
    return figures


def _measure(app, llm):
    gc.collect()
    _give_back_memory()
    objects = gc.get_objects()
    kept = Counter(type(each).__name__ for each in objects if _is_ours(type(each)))
    greenlet = getattr(sys.modules.get("greenlet"), "greenlet", ())
    # By its type: a proxy's `__class__` would run somebody's code.
    greenlets = [each for each in objects if greenlet and issubclass(type(each), greenlet)]
    with app.app_context():
        stats = llm.stats()
        recorded = llm.recordings()._store.bytes_held
        engines = {id(engine): engine for engine in map(llm.engine_of, llm.models())}
        workers = [engine.worker_stats() for engine in engines.values()]
    total = stats["total"]
    return {
        "stats": stats,
        "live": total["queued"] + total["active"] + total["blocked"],
        "slots": sum(each["busy"] for each in workers),
        "stuck": sum(each["stuck"] for each in workers),
        "threads": _status("Threads"),
        "greenlets": sum(not each.dead for each in greenlets),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "kept": sum(kept[name] for name in KEPT),
        "bodies": kept["StreamBody"],
        "recorded": recorded,
        "memory": _private_bytes(),
    }


def _is_ours(kind):
    return str(kind.__module__).startswith(LLMStreamError.__module__.partition(".")[0])


def _give_back_memory():
    """What `free` kept for later would hide what is held."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # Not glibc.


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


def _private_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
