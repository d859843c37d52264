"""Anthropic's routes: messages, and how many tokens they have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import request as http_request

from ..dialects import AnthropicDialect
from ..dialects.anthropic_objects import token_count
from ..policy import request_id_for
from .body import read_body
from .operation import describe
from .routes import Routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flask import Blueprint, Response

    from ..exceptions import LLMStreamError
    from ..extension import LLMStream

__all__ = ["anthropic_blueprint"]


def anthropic_blueprint(
    llm: LLMStream,
    *,
    name: str,
    models: Iterable[str] | None,
    settings: Mapping[str, Any],
) -> Blueprint:
    """See `LLMStream.anthropic_blueprint`."""
    dialect = AnthropicDialect()

    def error_document(error: LLMStreamError) -> bytes:
        return dialect.error_document(error, request_id_for(http_request))

    routes = Routes(
        llm,
        name=name,
        url_prefix="/v1",
        error_document=error_document,
        models=models,
        settings=settings,
    )

    @routes.blueprint.after_request
    def say_request_id(response: Response) -> Response:
        """Under the name that Anthropic's SDKs look for as well."""
        response.headers["request-id"] = response.headers.get(
            "X-Request-ID", request_id_for(http_request)
        )
        return response

    @routes.blueprint.post("/messages")
    @describe(dialect)
    def messages() -> Response:
        """Answer a chat."""
        return routes.answer(dialect)

    @routes.blueprint.post("/messages/count_tokens")
    @describe(body=dialect.count_body_type)
    def count_tokens() -> Response:
        """Count the tokens of a chat."""
        call = routes.begin()
        request = dialect.parse_count(read_body(call))
        tokens = llm.count_tokens(call, request, models=routes.offered())
        return routes.json(call, token_count(tokens))

    return routes.blueprint
