"""L1: JSON of the protocols that clients speak, to and from messages. Pure."""

from .native import NativeDialect
from .openai_chat import OpenAIChatDialect
from .openai_objects import model_list, model_object
from .parsed import Parsed

__all__ = ["NativeDialect", "OpenAIChatDialect", "Parsed", "model_list", "model_object"]
