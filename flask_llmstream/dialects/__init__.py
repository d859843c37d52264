"""L1: JSON of the protocols that clients speak, to and from messages. Pure."""

from .ai_sdk import AISDKDialect
from .anthropic import AnthropicDialect
from .anthropic_objects import anthropic_model, anthropic_model_list
from .native import NativeDialect
from .ollama import OllamaChatDialect, OllamaGenerateDialect
from .openai_chat import OpenAIChatDialect
from .openai_completions import OpenAICompletionsDialect
from .openai_objects import model_list, model_object
from .openai_responses import OpenAIResponsesDialect
from .parsed import Parsed

__all__ = [
    "AISDKDialect",
    "AnthropicDialect",
    "NativeDialect",
    "OllamaChatDialect",
    "OllamaGenerateDialect",
    "OpenAIChatDialect",
    "OpenAICompletionsDialect",
    "OpenAIResponsesDialect",
    "Parsed",
    "anthropic_model",
    "anthropic_model_list",
    "model_list",
    "model_object",
]
