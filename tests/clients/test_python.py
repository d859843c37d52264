"""What the official Python clients read, streaming and not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from concurrency import wait_until

from . import read_openai
from .answers import LeftError, Reading
from .dialects import OPENAI_CHAT, Dialect, heard
from .scenarios import SCENARIOS
from .service import job_for

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Reader:
    """
    One way of one client to ask.

    Args:
        read: Does a `Job`, and notes in a `Reading` what the client gives.
        untold: What the client keeps to itself though the dialect says it.
    """

    name: str
    dialect: Dialect
    read: Callable
    streams: bool = True
    untold: frozenset[str] = frozenset()

    def __str__(self):
        return self.name


READERS = (
    Reader("openai chat", OPENAI_CHAT, read_openai.chat_stream),
    Reader("openai chat async", OPENAI_CHAT, read_openai.chat_stream_async),
    Reader("openai chat helper", OPENAI_CHAT, read_openai.chat_helper),
    Reader("openai chat whole", OPENAI_CHAT, read_openai.chat_whole, streams=False),
)
