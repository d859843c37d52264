"""JSON objects of Ollama's routes about models: the list, one of them, the version."""

from __future__ import annotations

from datetime import datetime, timezone
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from .encoding import encode

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["ollama_model", "ollama_model_list", "ollama_running_list", "ollama_version"]

# The release whose API is followed here. Clients ask for at least the one that has what
# they need (VS Code 0.6.4, for `capabilities`), and compare it number by number.
_VERSION = "0.33.0"

# The capabilities that clients look for, by the feature of a backend.
_CAPABILITIES = {"tools": "tools", "images": "vision"}

# Of what nobody here knows; clients read the fields without asking whether they are there.
_DETAILS: dict[str, Any] = {
    "parent_model": "",
    "format": "",
    "family": "",
    "families": [],
    "parameter_size": "",
    "quantization_level": "",
}

_ARCHITECTURE = "flask_llmstream"

_NEVER = datetime.max.replace(microsecond=0, tzinfo=timezone.utc)


def ollama_version() -> bytes:
    """``GET /api/version``."""
    return encode({"version": _VERSION})


def ollama_model_list(model_ids: Iterable[str], modified_at: float) -> bytes:
    """
    ``GET /api/tags``, in the order given; *modified_at* is Unix time in seconds.

    The ids have no ``:latest``: clients that list models here and chat in OpenAI's protocol
    (VS Code) send them as they are.
    """
    models = [{**_listed(name), "modified_at": _time(modified_at)} for name in model_ids]
    return encode({"models": models})


def ollama_running_list(contexts: Iterable[tuple[str, int | None]]) -> bytes:
    """``GET /api/ps``: ids of models in memory, and their `context_tokens`."""
    models = [
        {
            **_listed(name),
            "expires_at": _NEVER,
            "size_vram": 0,
            "context_length": context_tokens or 0,
        }
        for name, context_tokens in contexts
    ]
    return encode({"models": models})


def ollama_model(
    model_id: str, modified_at: float, *, features: Collection[str], context_tokens: int | None
) -> bytes:
    """
    ``POST /api/show``.

    Args:
        model_id: As it is offered.
        modified_at: Unix time in seconds.
        features: Of `FEATURES`, what the model's backend does.
        context_tokens: What fits into its context; None where nobody knows.
    """
    information: dict[str, Any] = {
        "general.architecture": _ARCHITECTURE,
        "general.basename": model_id,
    }
    if context_tokens is not None:
        # Clients look for it under the architecture's name, whichever that is.
        information[f"{_ARCHITECTURE}.context_length"] = context_tokens
    capabilities = [name for feature, name in _CAPABILITIES.items() if feature in features]
    return encode(
        {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": _DETAILS,
            "model_info": information,
            "capabilities": ["completion", *capabilities],
            "modified_at": _time(modified_at),
        }
    )


def _listed(model_id: str) -> dict[str, Any]:
    return {
        "name": model_id,
        "model": model_id,
        "size": 0,
        # Ollama's own command line shows its first twelve letters, and fails without.
        "digest": sha256(model_id.encode()).hexdigest(),
        "details": _DETAILS,
    }


def _time(seconds: float) -> datetime:
    # Encoded as RFC 3339, with a Z.
    return datetime.fromtimestamp(seconds, timezone.utc)
