"""What streams of OpenAI's routes have in common: chunks of choices, and their usage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ..core.messages import Finish, Usage
from ..framing import NDJSON
from .encoding import encode
from .openai_objects import error_object, usage_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.messages import InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing

__all__ = ["ChunkRenderer", "CountingRenderer", "StreamOptions"]


class StreamOptions(msgspec.Struct):
    """
    A body's `stream_options`: OpenAI's, and vLLM's `continuous_usage_stats`.

    `include_obfuscation` is ignored, since there is no padding here to leave out.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    @property
    def shows_usage(self) -> bool:
        """Whether a chunk with the usage comes last."""
        return bool(self.include_usage)

    @property
    def shows_usage_so_far(self) -> bool:
        """Whether every chunk has it; as in vLLM only beside `include_usage`."""
        return bool(self.include_usage and self.continuous_usage_stats)


class ChunkRenderer:
    """
    Base of the renderers of chunks.

    Everything around a token's text is built once, so that a token costs one escape and
    one concatenation. What comes for a choice that is finished, or that was not asked
    for, has no place on the wire and renders as nothing.

    Args:
        envelope: What every chunk begins with.
        framing: SSE or NDJSON.
        choices: How many there are.
        include_usage: Whether a chunk with the usage comes last.
    """

    text_head: ClassVar[bytes]
    """What stands between a choice's index and its text."""
    text_tail: ClassVar[bytes]
    """What stands between a text and the end of its chunk's choices."""
    no_content: ClassVar[Mapping[str, Any]]
    """What a choice that only finishes has besides."""

    def __init__(
        self, envelope: Mapping[str, Any], framing: Framing, choices: int, *, include_usage: bool
    ) -> None:
        self.heartbeat = framing.heartbeat
        self._framing = framing
        self._include_usage = include_usage
        self._head = framing.prefix + encode(envelope)[:-1] + b',"choices":['
        # Of the choices still open: what stands before a text.
        self._text_heads = {
            choice: self._head + b'{"index":%d,' % choice + self.text_head
            for choice in range(choices)
        }
        self._end_chunks_with(b'],"usage":null}' if include_usage else b"]}")

    def show_usage(self, usage: Usage) -> None:
        """Have every chunk say *usage* from now on."""
        self._end_chunks_with(b'],"usage":' + encode(usage_object(usage)) + b"}")

    def _end_chunks_with(self, tail: bytes) -> None:
        self._tail = tail + self._framing.suffix
        self._text_tail = self.text_tail + self._tail

    def start(self) -> bytes:
        raise NotImplementedError

    def render(self, item: Item) -> bytes:
        raise NotImplementedError

    def end(self, response: InferenceResponse) -> bytes:
        reasons = {choice.index: choice.finish_reason for choice in response.choices}
        frames = [
            self._finish(choice, reasons.get(choice, "stop")) for choice in list(self._text_heads)
        ]
        if self._include_usage:
            usage = encode(usage_object(response.usage))
            frames.append(self._head + b'],"usage":' + usage + b"}" + self._framing.suffix)
        done = b'{"done":true}' if self._framing == NDJSON else b"[DONE]"
        frames.append(self._framing.frame(done))
        return b"".join(frames)

    def error(self, error: LLMStreamError) -> bytes:
        return self._framing.frame(encode(error_object(error)))

    def _text(self, text: str, choice: int) -> bytes:
        head = self._text_heads.get(choice)
        return head + encode(text) + self._text_tail if text and head else b""

    def _finish(self, choice: int, reason: str) -> bytes:
        frame = self._chunk(choice, self.no_content, finish_reason=reason)
        self._text_heads.pop(choice, None)
        return frame

    def _chunk(
        self,
        choice: int,
        content: Mapping[str, Any],
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        if choice not in self._text_heads:
            return b""
        fields = {
            "index": choice,
            **content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._head + encode(fields) + self._tail


class CountingRenderer:
    """
    Has every chunk say the usage so far, over all choices.

    It counts as the engine does where a backend reports nothing: an item is a token. What
    the backend reports goes, and is counted on from.

    Args:
        renderer: Renders the chunks.
    """

    def __init__(self, renderer: ChunkRenderer) -> None:
        self.heartbeat = renderer.heartbeat
        self.error = renderer.error
        self._renderer = renderer
        self._usage = Usage(0, 0)

    def start(self) -> bytes:
        self._renderer.show_usage(self._usage)
        return self._renderer.start()

    def render(self, item: Item) -> bytes:
        if isinstance(item, Usage):
            self._usage = item
        elif not isinstance(item, Finish):
            tokens = self._usage.completion_tokens + 1
            self._usage = replace(self._usage, completion_tokens=tokens)
        self._renderer.show_usage(self._usage)
        return self._renderer.render(item)

    def end(self, response: InferenceResponse) -> bytes:
        self._renderer.show_usage(response.usage or self._usage)
        return self._renderer.end(response)
