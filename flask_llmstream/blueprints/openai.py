"""OpenAI's routes: chat completions and models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..dialects import OpenAIChatDialect, model_list, model_object
from ..policy import unknown_model
from .routes import Routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flask import Blueprint, Response

    from ..extension import LLMStream

__all__ = ["openai_blueprint"]


def openai_blueprint(
    llm: LLMStream,
    *,
    name: str,
    models: Iterable[str] | None,
    settings: Mapping[str, Any],
) -> Blueprint:
    """See `LLMStream.openai_blueprint`."""
    chat = OpenAIChatDialect()
    routes = Routes(
        llm,
        name=name,
        url_prefix="/v1",
        error_document=chat.error_document,
        models=models,
        settings=settings,
    )
    created = int(time.time())

    @routes.blueprint.post("/chat/completions")
    def chat_completions() -> Response:
        return routes.answer(chat)

    @routes.blueprint.get("/models")
    def list_models() -> Response:
        return routes.json(routes.begin(), model_list(routes.offered(), created))

    @routes.blueprint.get("/models/<path:model>")
    def get_model(model: str) -> Response:
        call = routes.begin()
        if model not in routes.offered():
            raise unknown_model(model, routes.offered())
        return routes.json(call, model_object(model, created))

    return routes.blueprint
