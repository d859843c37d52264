"""The app of the server tests, with models that misbehave and others that bear load."""

from __future__ import annotations

from server.app import create_app as create_server_app

from . import backends


def create_app():
    app = create_server_app()
    backends.add_to(app.extensions["llmstream"], app.extensions["recorder"])
    return app
