"""What the official clients for Node read, streaming and not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .dialects import (
    AI_SDK_ANTHROPIC,
    AI_SDK_OPENAI_CHAT,
    AI_SDK_OPENAI_COMPLETION,
    AI_SDK_OPENAI_RESPONSES,
    AI_SDK_UI,
    ANTHROPIC,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OPENAI_CHAT,
    OPENAI_COMPLETION,
    OPENAI_RESPONSES,
)
from .reader_process import ReaderProcess
from .readers import Reader, cases

HERE = Path(__file__).parent / "node"

REASONING = frozenset({"reasoning"})
WHAT_FAILED = frozenset({"code", "message"})

# The readers themselves are in node/read_*.mjs, under the same names.
READERS = (
    Reader("openai-node chat", OPENAI_CHAT),
    Reader("openai-node chat helper", OPENAI_CHAT),
    Reader("openai-node chat whole", OPENAI_CHAT, streams=False),
    Reader("openai-node completion", OPENAI_COMPLETION),
    Reader("openai-node completion whole", OPENAI_COMPLETION, streams=False),
    Reader("openai-node responses", OPENAI_RESPONSES),
    Reader("openai-node responses helper", OPENAI_RESPONSES),
    Reader("openai-node responses whole", OPENAI_RESPONSES, streams=False),
    Reader("anthropic-node", ANTHROPIC),
    Reader("anthropic-node helper", ANTHROPIC),
    Reader("anthropic-node whole", ANTHROPIC, streams=False),
    Reader("ollama-node chat", OLLAMA_CHAT),
    Reader("ollama-node chat whole", OLLAMA_CHAT, streams=False),
    Reader("ollama-node generate", OLLAMA_GENERATE),
    Reader("ollama-node generate whole", OLLAMA_GENERATE, streams=False),
    # The provider for OpenAI itself has no `reasoning_content`, and of Responses the
    # reasoning's summary only.
    Reader("ai-sdk openai chat", AI_SDK_OPENAI_CHAT, untold=REASONING),
    Reader("ai-sdk openai chat whole", AI_SDK_OPENAI_CHAT, streams=False, untold=REASONING),
    Reader("ai-sdk openai responses", AI_SDK_OPENAI_RESPONSES, untold=REASONING),
    Reader(
        "ai-sdk openai responses whole",
        AI_SDK_OPENAI_RESPONSES,
        streams=False,
        untold=REASONING,
    ),
    Reader("ai-sdk openai completion", AI_SDK_OPENAI_COMPLETION),
    Reader("ai-sdk openai completion whole", AI_SDK_OPENAI_COMPLETION, streams=False),
    Reader("ai-sdk openai-compatible", AI_SDK_OPENAI_CHAT),
    Reader("ai-sdk openai-compatible whole", AI_SDK_OPENAI_CHAT, streams=False),
    # Understands only errors with a `param`, and of those in a stream says nothing.
    Reader("ai-sdk open-responses", AI_SDK_OPENAI_RESPONSES, untold=WHAT_FAILED),
    Reader(
        "ai-sdk open-responses whole", AI_SDK_OPENAI_RESPONSES, streams=False, untold=WHAT_FAILED
    ),
    Reader("ai-sdk anthropic", AI_SDK_ANTHROPIC),
    Reader("ai-sdk anthropic whole", AI_SDK_ANTHROPIC, streams=False),
    Reader("ai-sdk ui parts", AI_SDK_UI),
    Reader("ai-sdk ui message", AI_SDK_UI),
)


@pytest.fixture(scope="module")
def node():
    command = shutil.which("node")
    if command is None:
        pytest.skip("needs node and npm (Debian's packages nodejs and npm)")
    if not (HERE / "node_modules").exists():
        pytest.skip("needs `npm ci` in tests/clients/node, which `make test` does")
    process = ReaderProcess([command, str(HERE / "main.mjs")])
    yield process
    process.close()


@pytest.mark.parametrize(("reader", "scenario"), cases(READERS))
def test_it_reads_what_was_scripted(check, node, reader, scenario):
    check(reader, scenario, lambda job: node.ask(reader, job))
