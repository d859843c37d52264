"""`logging` with native locks in a patched process, so that users' backends may log."""

from __future__ import annotations

import logging
from typing import Any

from .native import is_patched, original

__all__ = ["make_logging_native"]


def make_logging_native() -> None:
    """
    Give `logging` and its stream and file handlers native locks, in a patched process.

    Without this a user's backend that logs on a native thread leaves greenlets stuck for
    good. Handlers that may switch while they emit (sockets, HTTP) keep their greenlet
    lock: a native lock held across a switch would stop the process. Called each time
    before user code runs on a native thread, since handlers come and go.
    """
    if not is_patched():
        return
    native_lock = original("_thread", "RLock")
    _make_lock_native(logging, "_lock", native_lock)
    for reference in list(logging._handlerList):  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.StreamHandler):
            _make_lock_native(handler, "lock", native_lock)


def _make_lock_native(owner: Any, name: str, native_lock: Any) -> None:
    lock = getattr(owner, name)
    if lock is None or isinstance(lock, native_lock):
        return
    # Not while somebody holds it: who takes the old lock and releases the new one fails.
    if lock.acquire(blocking=False):
        setattr(owner, name, native_lock())
        lock.release()
