"""The models that this app offers, by the id that clients ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import current_app

from flask_llmstream import InferenceRequest, LlamaCppBackend, Message, UpstreamBackend

from .extensions import llm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask import Flask

    from .cookbook import Cookbook

__all__ = ["add_upstream", "search_cookbook", "set_the_tone"]

# A small model that is not told to be brief goes on and on.
TONE = "You are a cook who helps people at home. Answer in two short sentences."

# A worker thread is a slot in the model: four answers at a time, the rest queue.
llm.add_backend("small", LlamaCppBackend("smollm2"), worker_threads=4)


@llm.backend("cookbook")
def search_cookbook(request: InferenceRequest) -> Iterator[str]:
    """
    Answer from the cookbook itself: what can be cooked with the things named?

    It runs on a worker, under an app context: `current_app` works, the request does not.
    """
    cookbook: Cookbook = current_app.extensions["cookbook"]
    found = cookbook.using(request.last_user_text)
    if not found:
        yield "Nothing in the cookbook uses that. Name an ingredient or two, "
        yield "such as leeks, lentils or apples."
        return
    yield "From the cookbook:\n"
    for recipe, items in found:
        yield f"\n{recipe.title}, {recipe.minutes} minutes. "
        yield f"It uses {' and '.join(items)}."


def add_upstream(app: Flask) -> None:
    """Offer the model behind ``UPSTREAM_URL``, where there is one."""
    config = app.config
    if config["UPSTREAM_URL"] and "upstream" not in llm.models():
        backend = UpstreamBackend(
            config["UPSTREAM_URL"],
            api_key=config["UPSTREAM_KEY"],
            model=config["UPSTREAM_MODEL"],
            discover=True,
        )
        llm.add_backend("upstream", backend)


@llm.before_submit
def set_the_tone(request: InferenceRequest) -> InferenceRequest:
    """Say what the models are here for, unless the client has said it."""
    messages = request.messages or (Message("user", request.prompt),)
    if not any(message.role in {"system", "developer"} for message in messages):
        request.messages = (Message("system", TONE), *messages)
        request.prompt = ""
    return request
