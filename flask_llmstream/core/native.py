"""
What gevent has patched in this process, and the native primitives below it.

Asked anew at each use: under ``--preload`` an app is imported before gunicorn patches, so
nothing may be bound at import. Where there is no gevent, all of this is the standard library's.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = [
    "allocate_lock",
    "current_hub",
    "get_thread_id",
    "is_patched",
    "is_plain_greenlet_socket",
    "original",
    "shut_down_socket",
]

_SHUT_RD, _SHUT_RDWR = 0, 2  # The same everywhere; `socket` itself is not imported here.


def original(module: str, name: str) -> Any:
    """``module.name`` as it was before gevent patched it."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    return getattr(importlib.import_module(module), name)


def is_patched() -> bool:
    """Whether `threading` makes greenlets in this process now."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def allocate_lock() -> Any:
    """
    A native lock, also in a patched process.

    `threading.Lock` would be a greenlet lock there, which sticks for good between native
    threads and greenlets. It does not survive a fork held: see `runtime.after_fork`.
    """
    return original("_thread", "allocate_lock")()


def current_hub() -> Any:
    """The hub of the caller's native thread; None where waiting blocks the thread."""
    local = sys.modules.get("gevent._hub_local")
    return None if local is None else local.get_hub_if_exists()


def get_thread_id() -> int:
    """The caller's native thread; `threading.get_ident` tells greenlets apart instead."""
    return int(original("_thread", "get_ident")())


def is_plain_greenlet_socket(sock: Any) -> bool:
    """Whether *sock* is gevent's own, and no TLS around it."""
    gevent_socket = sys.modules.get("gevent.socket")
    return gevent_socket is not None and type(sock) is gevent_socket.socket


def shut_down_socket(sock: Any, *, only_reading: bool = False) -> None:
    """
    End every wait on *sock*, and the connection; or its incoming half alone. Any thread: one
    system call on the socket below gevent's and TLS's objects.
    """
    raw = getattr(sock, "_sock", sock)
    try:
        original("_socket", "socket").shutdown(raw, _SHUT_RD if only_reading else _SHUT_RDWR)
    except OSError:
        pass  # It is closed already.
