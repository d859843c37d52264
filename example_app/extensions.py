"""The extensions, made once and bound to an app in `create_app`."""

from __future__ import annotations

from flask_llmstream import LLMStream

__all__ = ["llm"]

llm = LLMStream()
