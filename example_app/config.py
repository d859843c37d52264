"""Defaults. The environment (``FLASK_…``) and `create_app(config)` override them."""

from __future__ import annotations

LLMSTREAM_DEFAULT_MODEL = "small"

# The embedded model writes some twenty tokens a second to each of four readers, so the
# longest answer that the chat page asks for (512 tokens) takes half a minute. Two
# minutes leave room for a turn in the queue; a reader who waits longer has left.
LLMSTREAM_DEADLINE_SECONDS = 120
