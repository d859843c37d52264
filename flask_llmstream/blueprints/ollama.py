"""Ollama's routes: chat, generate, and what models there are."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from ..dialects import OllamaChatDialect, OllamaGenerateDialect
from ..dialects.decoding import decode, invalid
from ..dialects.ollama_models import (
    ollama_model,
    ollama_model_list,
    ollama_running_list,
    ollama_version,
)
from ..exceptions import InvalidRequestError
from ..policy import features_of, unknown_model
from .body import read_body
from .operation import describe
from .routes import Routes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from flask import Blueprint, Response

    from ..extension import LLMStream

__all__ = ["ollama_blueprint"]

_TAG = ":latest"


class _ShowBody(msgspec.Struct):
    model: str = ""
    name: str = ""  # What it was called before.


_show_decoder = msgspec.json.Decoder(_ShowBody)


def ollama_blueprint(
    llm: LLMStream,
    *,
    name: str,
    models: Iterable[str] | None,
    settings: Mapping[str, Any],
) -> Blueprint:
    """See `LLMStream.ollama_blueprint`."""
    chat, generate = OllamaChatDialect(), OllamaGenerateDialect()
    routes = Routes(
        llm,
        name=name,
        url_prefix="/api",
        error_document=chat.error_document,
        models=models,
        settings=settings,
    )
    modified_at = time.time()

    def answer(dialect: OllamaChatDialect | OllamaGenerateDialect) -> Response:
        call = routes.begin()
        parsed = dialect.parse(read_body(call))
        offered = routes.offered()
        request = parsed.request
        request.model = _offered_as(request.model, offered)
        if parsed.is_load:
            if request.model not in offered:
                raise unknown_model(request.model, offered)
            llm.check_ready(request.model)
            return routes.json(call, dialect.load_document(parsed))
        try:
            return llm.answer(call, dialect, parsed, models=offered)
        except InvalidRequestError as error:
            if error.param == "reasoning_effort":
                # The client has never heard of it.
                raise invalid("think", "has no levels here; send `true` or `false`") from error
            raise

    def backend_of(model: str) -> Any:
        engine = llm.engine_of(model)
        return None if engine is None else engine.backend_for(model)

    @routes.blueprint.post("/chat")
    @describe(chat)
    def post_chat() -> Response:
        """Answer a chat."""
        return answer(chat)

    @routes.blueprint.post("/generate")
    @describe(generate)
    def post_generate() -> Response:
        """Answer a prompt."""
        return answer(generate)

    @routes.blueprint.get("/tags")
    def tags() -> Response:
        """List the models."""
        return routes.json(routes.begin(), ollama_model_list(routes.offered(), modified_at))

    @routes.blueprint.post("/show")
    @describe(body=_ShowBody)
    def show() -> Response:
        """Look at one model."""
        call = routes.begin()
        body = decode(_show_decoder, read_body(call))
        offered = routes.offered()
        model = _offered_as(body.model or body.name, offered)
        if model not in offered:
            raise unknown_model(model, offered)
        backend = backend_of(model)
        document = ollama_model(
            model,
            modified_at,
            features=features_of(backend),
            context_tokens=getattr(backend, "context_tokens", None),
        )
        return routes.json(call, document)

    @routes.blueprint.get("/ps")
    def ps() -> Response:
        """List the models that are loaded."""
        call = routes.begin()
        backends = {model: backend_of(model) for model in routes.offered()}
        running = [
            (model, getattr(backend, "context_tokens", None))
            for model, backend in backends.items()
            if getattr(backend, "is_loaded", True)
        ]
        return routes.json(call, ollama_running_list(running))

    @routes.blueprint.get("/version")
    def version() -> Response:
        """Say which version of Ollama's protocol is spoken."""
        return routes.json(routes.begin(), ollama_version())

    return routes.blueprint


def _offered_as(model: str, offered: Collection[str]) -> str:
    """*model* as it is *offered*: a name without a tag is the same as with `_TAG`."""
    other = model.removesuffix(_TAG) if model.endswith(_TAG) else model + _TAG
    return other if other in offered and model not in offered else model
