"""What is decided about a request before anything is queued."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any

from .core.messages import InferenceRequest, Message
from .dialects.extra_body import check_extra_body
from .exceptions import AuthenticationError, InvalidRequestError, UnknownModelError
from .typing import SHOWN_FEATURES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from flask import Request
    from werkzeug.datastructures import Headers

    from .config import Settings

__all__ = [
    "authenticate",
    "check_features",
    "check_limits",
    "check_request_id",
    "check_types",
    "features_of",
    "request_id_for",
    "request_id_of",
    "unknown_model",
]

# Visible ASCII, as proxies and tracing tools make them; nothing that could split a header
# or a log line.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_ENVIRON_KEY = "flask_llmstream.request_id"

_SHOWN_LENGTH = 100
"""Of a client's text in a message: it may be of any length."""


def request_id_of(headers: Headers) -> str:
    """The client's `X-Request-ID` where it is one, else a new one."""
    given = headers.get("X-Request-ID", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def request_id_for(request: Request) -> str:
    """The id of an HTTP request: the same one in its answer, its error and the log."""
    if _ENVIRON_KEY not in request.environ:
        request.environ[_ENVIRON_KEY] = request_id_of(request.headers)
    return str(request.environ[_ENVIRON_KEY])


def check_types(request: Any) -> None:
    """
    Say what a view has mistaken, where it could only fail later and more darkly.

    Raises:
        TypeError: *request* is no `InferenceRequest`, or its messages are no `Message`s.
    """
    if not isinstance(request, InferenceRequest):
        raise TypeError(f"Give an InferenceRequest, not {type(request).__name__}.")
    for number, message in enumerate(request.messages):
        if not isinstance(message, Message):
            raise TypeError(
                f"messages[{number}] is a {type(message).__name__}. "
                "Give Message(role, content, …) objects."
            )


def check_request_id(request: InferenceRequest) -> None:
    """
    Hold a view's own `request_id` to what a header can carry.

    Raises:
        InvalidRequestError: It is too long, or not of the letters that ids are made of.
    """
    if _REQUEST_ID.fullmatch(request.request_id) is None:
        raise InvalidRequestError(
            "request_id must be 1 to 128 ASCII letters, digits or any of . _ : / + = @ -",
            param="request_id",
        )


def authenticate(headers: Headers, settings: Settings) -> str | None:
    """
    The name of the API key that *headers* carry; None where none is asked for.

    Both ``Authorization: Bearer`` and ``x-api-key`` are taken: Anthropic's SDKs send the
    one, Vercel's the other.

    Raises:
        AuthenticationError: The key is missing or wrong.
    """
    if settings.api_keys is None:
        return None
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("X-API-Key", "")
    if not key.strip():
        raise AuthenticationError("An API key is needed: send it as Authorization: Bearer <key>.")
    name = settings.api_keys.name_of(key.strip())
    if name is None:
        raise AuthenticationError("The API key is wrong.")
    return name


def unknown_model(model: str, offered: Collection[str]) -> UnknownModelError:
    """The error for *model*, which is none of those *offered*."""
    shown = model if len(model) <= _SHOWN_LENGTH else model[:_SHOWN_LENGTH] + "…"
    known = ", ".join(map(repr, offered))
    return UnknownModelError(
        f"There is no model {shown!r} here. "
        + (f"There is {known}." if known else "There is none."),
        param="model",
    )


def check_limits(request: InferenceRequest, settings: Settings) -> None:
    """
    Hold *request* to `MAX_TOKENS_LIMIT`, which it also gets where it asks for no limit.

    Raises:
        InvalidRequestError: It asks for more.
    """
    limit = settings.max_tokens_limit
    if limit is None:
        return
    if request.max_tokens is None:
        request.max_tokens = limit
    elif request.max_tokens > limit:
        raise InvalidRequestError(
            f"max_tokens is {request.max_tokens}; at most {limit} are allowed.",
            param="max_tokens",
        )


def check_features(request: InferenceRequest, backend: Any, model: str) -> None:
    """
    Refuse what the model's backend cannot do, instead of ignoring it.

    A backend that does not say what it ``supports`` is trusted with what its output will
    show, and refused the rest.

    Raises:
        InvalidRequestError: Names the request's field.
    """
    supports = features_of(backend)
    for feature, param in _features_asked(request):
        if feature not in supports:
            raise InvalidRequestError(
                f"The model {model!r} does not support {param}"
                + (f" of type {feature}." if param == "response_format" else "."),
                param=param,
            )
    if "extra_body" not in supports:
        check_extra_body(request.extra_body)


def features_of(backend: Any) -> Collection[str]:
    """What *backend* supports, or is trusted with."""
    supports: Collection[str] | None = getattr(backend, "supports", None)
    return SHOWN_FEATURES if supports is None else supports


def _features_asked(request: InferenceRequest) -> Iterator[tuple[str, str]]:
    if request.tools and request.tool_choice != "none":
        yield "tools", "tools"
    if request.n > 1:
        yield "n", "n"
    if request.logprobs:
        yield "logprobs", "logprobs"
    wanted = (request.response_format or {}).get("type", "text")
    if wanted != "text":
        yield wanted, "response_format"
    for number, message in enumerate(request.messages):
        if not isinstance(message.content, str):
            for part in message.content:
                if part.get("type") not in ("text", "refusal"):
                    yield "images", f"messages[{number}].content ({part.get('type')})"
