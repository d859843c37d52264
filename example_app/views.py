"""The app's pages, and the one view that streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from flask import Blueprint, abort, current_app, render_template, request

from flask_llmstream import InferenceRequest

from .extensions import llm

if TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

    from flask_llmstream import Outcome

    from .cookbook import Cookbook
    from .suggestions import Suggestions

__all__ = ["blueprint", "not_found"]

blueprint = Blueprint("pages", __name__)


def _cookbook() -> Cookbook:
    return cast("Cookbook", current_app.extensions["cookbook"])


def _suggestions() -> Suggestions:
    return cast("Suggestions", current_app.extensions["suggestions"])


@blueprint.get("/")
def index() -> str:
    query = request.args.get("q", "")
    return render_template("index.html", recipes=_cookbook().search(query), query=query)


@blueprint.get("/recipes/<slug>")
def recipe(slug: str) -> str:
    found = _cookbook().get(slug) or abort(404)
    return render_template("recipe.html", recipe=found, suggestions=_suggestions().about(slug))


@blueprint.get("/chat")
def chat() -> str:
    about = _cookbook().get(request.args.get("about", ""))
    return render_template("chat.html", about=about)


@blueprint.post("/generate")
def generate() -> ResponseReturnValue:
    """Stream an answer to ``{"prompt": …, "recipe": slug or absent}``, and keep it."""
    body = request.get_json()
    prompt = body.get("prompt") if isinstance(body, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        return {"error": {"message": "prompt: must be a text that is not empty"}}, 400
    about = _cookbook().get(str(body.get("recipe", "")))

    # on_finish runs after the view, outside the request: it gets all it needs from here.
    suggestions = _suggestions()

    def keep(outcome: Outcome) -> None:
        # Only what is whole is worth keeping: not what failed, nor what max_tokens cut.
        if outcome.finish_reason == "stop":
            suggestions.keep(about.slug if about else "", prompt, outcome.text)

    question = f"{about.as_text}\n\n{prompt}" if about else prompt
    return llm.stream(InferenceRequest(prompt=question, max_tokens=200), on_finish=keep)


def not_found(_error: Exception) -> ResponseReturnValue:
    return render_template("not_found.html"), 404
