"""OpenAI's routes: chat completions, completions, responses and models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..dialects import (
    OpenAIChatDialect,
    OpenAICompletionsDialect,
    anthropic_model,
    anthropic_model_list,
    model_list,
    model_object,
)
from ..policy import unknown_model
from .openai_responses import add_responses
from .operation import describe
from .routes import Routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flask import Blueprint, Response

    from ..extension import LLMStream

__all__ = ["openai_blueprint"]

_ANTHROPIC = "Anthropic-Version"
"""What Anthropic's clients send: they list models at the same address."""


def openai_blueprint(
    llm: LLMStream,
    *,
    name: str,
    models: Iterable[str] | None,
    settings: Mapping[str, Any],
) -> Blueprint:
    """See `LLMStream.openai_blueprint`."""
    chat = OpenAIChatDialect()
    completion = OpenAICompletionsDialect()
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
    @describe(chat)
    def chat_completions() -> Response:
        """Answer a chat."""
        return routes.answer(chat)

    @routes.blueprint.post("/completions")
    @describe(completion)
    def completions() -> Response:
        """Complete a text, or several."""
        return routes.answer(completion)

    add_responses(routes, llm)

    @routes.blueprint.get("/models")
    def list_models() -> Response:
        """List the models."""
        call = routes.begin()
        listing = anthropic_model_list if _ANTHROPIC in call.headers else model_list
        return routes.json(call, listing(routes.offered(), created))

    @routes.blueprint.get("/models/<path:model>")
    def get_model(model: str) -> Response:
        """Look at one model."""
        call = routes.begin()
        if model not in routes.offered():
            raise unknown_model(model, routes.offered())
        described = anthropic_model if _ANTHROPIC in call.headers else model_object
        return routes.json(call, described(model, created))

    return routes.blueprint
