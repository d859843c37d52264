"""OpenAI's routes: chat completions and models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from ..config import check_values, model_ids
from ..dialects import OpenAIChatDialect, model_list, model_object
from ..errors import respond_to
from ..exceptions import LLMStreamError
from ..policy import authenticate, unknown_model
from .body import check_length, read_body

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..call import Call
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
    overrides = check_values(settings)
    only = None if models is None else model_ids(models)
    dialect = OpenAIChatDialect()
    created = int(time.time())
    blueprint = Blueprint(name, __name__, url_prefix="/v1")
    blueprint.register_error_handler(LLMStreamError, respond_to(dialect.error_document))

    def begin() -> Call:
        call = llm.call(overrides)
        check_length(call.settings.max_request_bytes)
        call.key_name = authenticate(call.headers, call.settings)
        return call

    def offered() -> list[str]:
        known = llm.models()
        return known if only is None else [model for model in only if model in known]

    def json_response(call: Call, document: bytes) -> Response:
        return Response(
            document,
            headers={"X-Request-ID": call.request_id},
            content_type="application/json",
        )

    @blueprint.post("/chat/completions")
    def chat_completions() -> Response:
        call = begin()
        parsed = dialect.parse(read_body(call.settings.max_request_bytes))
        return llm.answer(call, dialect, parsed, models=offered())

    @blueprint.get("/models")
    def list_models() -> Response:
        return json_response(begin(), model_list(offered(), created))

    @blueprint.get("/models/<path:model>")
    def get_model(model: str) -> Response:
        call = begin()
        if model not in offered():
            raise unknown_model(model, offered())
        return json_response(call, model_object(model, created))

    return blueprint
