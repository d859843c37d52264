"""How long an HTTP request may take: what the app allows and what its headers ask."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite
from typing import TYPE_CHECKING

from werkzeug.datastructures import Headers

from .core.deadlines import Budgets
from .exceptions import InvalidRequestError

if TYPE_CHECKING:
    from .config import Settings

__all__ = ["background_budgets_of", "budgets_of"]

_OWN_TOTAL = "X-Request-Timeout"
_OTHER_TOTALS = ("X-Stainless-Timeout", "X-Litellm-Timeout")


def _positive(text: str | None) -> float | None:
    """What SDKs send where they mean nothing (``NOT_GIVEN``, 0) counts as not sent."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if isfinite(value) and value > 0 else None


def budgets_of(headers: Headers, settings: Settings, *, streams: bool) -> Budgets:
    """
    The budgets of a request, from its arrival.

    A client may shorten each of them; it may lengthen only the total, up to
    `MAX_DEADLINE_SECONDS`. openai-py's standing read timeout of 600 s changes nothing.

    Args:
        headers: ``X-Request-Timeout`` and the OpenAI, Anthropic and LiteLLM SDKs' own.
        settings: The app's, as its blueprint narrows them.
        streams: Whether the answer is sent as it is produced. Where it is not, nothing
            can be read before its end, so that a read timeout is one of the whole.

    Raises:
        InvalidRequestError: ``X-Request-Timeout`` is not a positive number of seconds.
    """
    totals = [_positive(headers.get(name)) for name in _OTHER_TOTALS]
    own = headers.get(_OWN_TOTAL)
    if own is not None:
        total = _positive(own)
        if total is None:
            raise InvalidRequestError(
                f"{_OWN_TOTAL} must be a positive number of seconds.", param=_OWN_TOTAL
            )
        totals.append(total)
    total_seconds = min(
        (total for total in totals if total is not None), default=settings.deadline_seconds
    )
    budgets = Budgets(
        min(total_seconds, settings.max_deadline_seconds),
        settings.first_token_seconds,
        settings.idle_seconds,
    )
    read = _positive(headers.get("X-Stainless-Read-Timeout"))
    if read is not None:
        budgets = budgets.shortened(
            Budgets(first_token_seconds=read, idle_seconds=read)
            if streams
            else Budgets(total_seconds=read)
        )
    first = _positive(headers.get("X-Litellm-Stream-Timeout"))
    if first is not None:
        budgets = budgets.shortened(Budgets(first_token_seconds=first))
    return budgets


def background_budgets_of(headers: Headers, settings: Settings) -> Budgets:
    """
    The budgets of a request that goes on without its client.

    What SDKs say by themselves is how long they wait for this answer, which comes at once.
    Nor has the request to begin soon: that is what it is in the background for.

    Raises:
        InvalidRequestError: As `budgets_of`.
    """
    own = [(_OWN_TOTAL, value) for value in headers.getlist(_OWN_TOTAL)]
    budgets = budgets_of(Headers(own), settings, streams=True)
    return replace(budgets, first_token_seconds=inf)
