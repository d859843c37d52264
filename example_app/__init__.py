"""Bayleaf, a small cookbook: what an ordinary Flask app looks like with streaming added."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask

from . import backends, views
from .cookbook import Cookbook
from .extensions import llm
from .suggestions import Suggestions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flask import Response

__all__ = ["create_app"]

# Everything the pages need comes from this origin; there is no inline script or style.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """
    Make the app: ``gunicorn "example_app:create_app()"`` or ``flask --app example_app run``.

    Args:
        config: Wins over the environment, which wins over `config.py`. Any setting can
            come from the environment with the prefix ``FLASK_``, as in
            ``FLASK_LLMSTREAM_DEADLINE_SECONDS=60``.
    """
    app = Flask(__name__)
    app.config.from_object("example_app.config")
    app.config.from_prefixed_env()
    app.config.from_mapping(config)
    app.config.setdefault("DATABASE", str(Path(app.instance_path) / "suggestions.sqlite3"))

    app.extensions["cookbook"] = Cookbook.load(Path(app.root_path) / "recipes.json")
    app.extensions["suggestions"] = Suggestions(app.config["DATABASE"])
    llm.init_app(app)
    backends.add_upstream(app)  # The others are on `llm` since they were imported.

    app.register_blueprint(views.blueprint)
    # The same models for every client that people have already.
    app.register_blueprint(llm.openai_blueprint())
    app.register_blueprint(llm.anthropic_blueprint())
    app.register_blueprint(llm.ollama_blueprint())
    app.register_blueprint(llm.ai_sdk_blueprint())
    app.register_blueprint(llm.native_blueprint())
    # For jobs in our own network: one model, and time for long answers. The proxy in
    # front does not pass /internal on.
    app.register_blueprint(
        llm.openai_blueprint(name="internal", models=["small"], deadline_seconds=600),
        url_prefix="/internal/v1",
    )
    app.register_blueprint(llm.ops_blueprint())

    app.register_error_handler(404, views.not_found)
    app.after_request(_set_security_headers)
    return app


def _set_security_headers(response: Response) -> Response:
    response.headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Referrer-Policy", "same-origin")
    return response
