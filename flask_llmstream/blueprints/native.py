"""The package's own route: a prompt or a chat in, tokens out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..dialects import NativeDialect
from .operation import describe
from .routes import Routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flask import Blueprint, Response

    from ..extension import LLMStream

__all__ = ["native_blueprint"]


def native_blueprint(
    llm: LLMStream,
    *,
    name: str,
    models: Iterable[str] | None,
    settings: Mapping[str, Any],
) -> Blueprint:
    """See `LLMStream.native_blueprint`."""
    native = NativeDialect()
    routes = Routes(
        llm,
        name=name,
        url_prefix="/stream",
        error_document=native.error_document,
        models=models,
        settings=settings,
        cancel_path="/<path:id>",
    )

    # With the slash, too: a redirect would cost most clients the body, or the method.
    @routes.blueprint.post("")
    @routes.blueprint.post("/")
    @describe(native)
    def stream() -> Response:
        """Answer a prompt or a chat."""
        return routes.answer(native)

    return routes.blueprint
