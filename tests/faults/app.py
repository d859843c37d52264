"""The app of the server tests, with models that misbehave and others that bear load."""

from __future__ import annotations

import time
from itertools import cycle

from server.app import create_app as create_server_app

from . import backends

JUMPS = cycle((0.0, 7200.0, -7200.0, 86400.0))


def create_app():
    app = create_server_app()
    backends.add_to(app.extensions["llmstream"], app.extensions["recorder"])
    return app


def create_jumping_app():
    """The same, in a process whose wall clock says another hour each time it is asked."""
    now = time.time
    time.time = lambda: now() + next(JUMPS)
    app = create_app()

    @app.before_request
    def look_at_the_clock():
        app.extensions["recorder"].record("clock", "jumped", to=time.time())

    return app
