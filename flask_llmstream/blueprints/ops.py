"""What an orchestrator asks: is the process alive, and can it serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint

from ..exceptions import LLMStreamError

if TYPE_CHECKING:
    from ..extension import LLMStream

__all__ = ["ops_blueprint"]


def ops_blueprint(llm: LLMStream, *, name: str) -> Blueprint:
    """See `LLMStream.ops_blueprint`."""
    blueprint = Blueprint(name, __name__)

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
        except LLMStreamError as error:
            return {"status": "unavailable", "model": model, "code": error.code}, 503
        return {"status": "ready", "model": model}, 200

    return blueprint
