"""Defaults. The environment (``FLASK_…``) and `create_app(config)` override them."""

from __future__ import annotations

LLMSTREAM_DEFAULT_MODEL = "small"

# The embedded model writes some twenty tokens a second to each of four readers, so the
# longest answer that the chat page asks for (512 tokens) takes half a minute. Two
# minutes leave room for a turn in the queue; a reader who waits longer has left.
LLMSTREAM_DEADLINE_SECONDS = 120

# For the app's own routes. Above the API's LLMSTREAM_MAX_REQUEST_BYTES (1 MiB), so that
# the API refuses in its own words.
MAX_CONTENT_LENGTH = 2 * 1024 * 1024

# One more model to offer, as "upstream": behind an OpenAI-compatible API (vLLM, llama.cpp,
# Ollama, a provider). FLASK_UPSTREAM_URL=http://127.0.0.1:11434/v1 is all that it takes;
# UPSTREAM_MODEL is what it calls the model, where that is not "upstream". What else it
# lists is on offer, too.
UPSTREAM_URL = None
UPSTREAM_KEY = None
UPSTREAM_MODEL = None
