"""Asking the app of these tests for a scripted answer."""

from __future__ import annotations

import json
from itertools import count

_numbers = count(1)

EMIT_AND_WAIT = (["emit", "a "], ["until_cancelled"])
"""A stream that has begun, and whose backend listens to nothing but its cancel."""


def new_id():
    return f"request-{next(_numbers)}"


def ask(client, *steps, path="/stream", method="POST", headers=(), version="1.1", **more):
    """
    Ask for the script *steps*; *more* is what the app's `_asked` takes beside it.

    Returns:
        The id that the recorder files its events under; also the request's id.
    """
    id = new_id()
    body = json.dumps({"script": {"id": id, "steps": steps}, **more}).encode()
    headers = {"X-Request-ID": id, "Content-Type": "application/json", **dict(headers)}
    if method == "POST":
        client.ask(method, path, headers=headers, body=body, version=version)
    else:
        from urllib.parse import quote

        client.ask(method, f"{path}?q={quote(body)}", headers=headers, version=version)
    return id


def on(*kinds):
    """Parametrize a test's `server` with *kinds*."""
    import pytest

    return pytest.mark.parametrize("server", kinds, indirect=True)
