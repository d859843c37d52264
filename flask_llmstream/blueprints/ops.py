"""What operators ask: is the process alive, can it serve, what does it do, what is there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flask import Response, current_app, request

from ..config import check_values
from ..dialects.encoding import encode
from ..exceptions import EngineError, LLMStreamError
from .openapi import describe_api
from .operation import describe
from .routes import PackageBlueprint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flask import Blueprint

    from ..extension import LLMStream

__all__ = ["ops_blueprint"]

_logger = logging.getLogger("flask_llmstream")


def ops_blueprint(
    llm: LLMStream, *, name: str, api_keys: Mapping[str, str] | Sequence[str] | str | None
) -> Blueprint:
    """See `LLMStream.ops_blueprint`."""
    blueprint = PackageBlueprint(name, __name__)
    overrides = {} if api_keys is None else check_values({"api_keys": api_keys})

    @blueprint.get("/healthz")
    def healthz() -> dict[str, Any]:
        """Is the process alive?"""
        return {"status": "ok"}

    @blueprint.get("/readyz")
    @describe(answers={200: "It can.", 503: "It cannot."})
    def readyz() -> tuple[dict[str, Any], int]:
        """Can a request for the default model be served now?"""
        model = llm.default_model()
        try:
            llm.check_ready(model)
        except Exception as error:
            # The reason may name files: it is for the log, not for whoever asks.
            _logger.warning("Not ready to serve the model %r: %s", model, error)
            code = error.code if isinstance(error, LLMStreamError) else EngineError.code
            return {"status": "unavailable", "model": model, "code": code}, 503
        return {"status": "ready", "model": model}, 200

    @blueprint.get("/llmstream/stats")
    @describe(answers={200: "The figures.", 401: "The API key is missing or wrong."})
    def stats() -> tuple[dict[str, Any], dict[str, str]]:
        """What this process does; another one has figures of its own."""
        llm.call(overrides).authenticate()
        return llm.stats(), {"Cache-Control": "no-store"}

    @blueprint.get("/openapi.json")
    def openapi() -> Response:
        """Describe every route of the app's blueprints that are this package's."""
        document = describe_api(current_app, root=request.script_root)
        return Response(encode(document), content_type="application/json")

    return blueprint
