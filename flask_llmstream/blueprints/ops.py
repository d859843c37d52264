"""What an orchestrator asks: is the process alive, can it serve, and what does it do."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flask import Blueprint

from ..config import check_values
from ..exceptions import EngineError, LLMStreamError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..extension import LLMStream

__all__ = ["ops_blueprint"]

_logger = logging.getLogger("flask_llmstream")


def ops_blueprint(
    llm: LLMStream, *, name: str, api_keys: Mapping[str, str] | Sequence[str] | str | None
) -> Blueprint:
    """See `LLMStream.ops_blueprint`."""
    blueprint = Blueprint(name, __name__)
    overrides = {} if api_keys is None else check_values({"api_keys": api_keys})

    @blueprint.get("/healthz")
    def healthz() -> dict[str, Any]:
        """200 as long as the process answers."""
        return {"status": "ok"}

    @blueprint.get("/readyz")
    def readyz() -> tuple[dict[str, Any], int]:
        """200 where a request for the default model could be served now, else 503."""
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
    def stats() -> tuple[dict[str, Any], dict[str, str]]:
        """What this process does; another one has figures of its own."""
        llm.call(overrides).authenticate()
        return llm.stats(), {"Cache-Control": "no-store"}

    return blueprint
