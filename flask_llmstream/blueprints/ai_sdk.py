"""The Vercel AI SDK's route: what `useChat` posts to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Response

from ..dialects import AISDKDialect
from ..framing import SSE
from .operation import describe
from .routes import Routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flask import Blueprint

    from ..extension import LLMStream

__all__ = ["ai_sdk_blueprint"]

STREAM_HEADER = "X-Vercel-AI-UI-Message-Stream"


def ai_sdk_blueprint(
    llm: LLMStream,
    *,
    name: str,
    models: Iterable[str] | None,
    settings: Mapping[str, Any],
) -> Blueprint:
    """See `LLMStream.ai_sdk_blueprint`."""
    chat = AISDKDialect()
    routes = Routes(
        llm,
        name=name,
        url_prefix="/api/ai",
        error_document=chat.error_document,
        models=models,
        settings=settings,
    )

    @routes.blueprint.post("")
    @describe(chat)
    def answer() -> Response:
        """Answer a chat."""
        response = routes.answer(chat)
        if response.content_type == SSE.content_type:
            response.headers[STREAM_HEADER] = "v1"
        return response

    @routes.blueprint.get("/<path:chat_id>/stream")
    @describe(
        framings=(SSE,),
        answers={200: "The answer.", 204: "There is nothing to resume."},
    )
    def resume(chat_id: str) -> Response:
        """
        What a page with ``resume: true`` asks when it is loaded: the answer under way.

        Without one 204 says so; to anything else the page shows an error. An answer that is
        over is no answer under way: the page would append it to the message that it has.
        """
        call = routes.begin()
        answer = llm.answering(call, chat, SSE)
        if call.method == "HEAD":
            return answer.head()
        response = answer.of_chat(chat_id, llm.identify(call))
        if response is None:
            return Response(status=204, headers={"X-Request-ID": call.request_id})
        response.headers[STREAM_HEADER] = "v1"
        return response

    return routes.blueprint
