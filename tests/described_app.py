"""An app with every blueprint, for tests that go by its OpenAPI description."""

from __future__ import annotations

from flask_apps import make_app

from flask_llmstream import LLMStream
from flask_llmstream.testing import ScriptedBackend

BLUEPRINTS = {
    "openai": "/v1",
    "anthropic": "/anthropic/v1",
    "ollama": "/api",
    "ai_sdk": "/api/ai",
    "native": "/stream",
    "ops": "",
}
# Where each dialect is asked there.
PATHS = {
    "native": "/stream",
    "openai_chat": "/v1/chat/completions",
    "openai_completions": "/v1/completions",
    "openai_responses": "/v1/responses",
    "anthropic": "/anthropic/v1/messages",
    "ollama_chat": "/api/chat",
    "ollama_generate": "/api/generate",
    "ai_sdk": "/api/ai",
}


class CountingBackend(ScriptedBackend):
    """One that can count a prompt's tokens, too."""

    def count_tokens(self, request):
        return 7


def described_app(*script, backend=None, **settings):
    """An app with every blueprint and one model, ``m``."""
    llm = LLMStream()
    llm.add_backend("m", backend or CountingBackend(*script or ("Hi",)))
    app = make_app(llm, **settings)
    for name, prefix in BLUEPRINTS.items():
        blueprint = getattr(llm, f"{name}_blueprint")()
        app.register_blueprint(blueprint, url_prefix=prefix or None)
    return app
