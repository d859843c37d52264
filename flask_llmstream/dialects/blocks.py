"""
Answers as blocks, one after the other: what Anthropic, Responses and the AI SDK share.

Each of these protocols sends the same events under names of its own::

    start · (open block · delta … · close block) … · usage · finish        or error

`BlockRenderer` makes them of a backend's items; a dialect says how each one is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

from ..core.messages import Reasoning, Refusal, ToolCallDelta
from .openai_objects import call_id

if TYPE_CHECKING:
    from ..core.messages import Choice, InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing

__all__ = ["Block", "BlockKind", "BlockRenderer", "blocks_of"]


class BlockKind(Enum):
    """What a block is made of."""

    REASONING = "reasoning"
    TEXT = "text"
    REFUSAL = "refusal"
    TOOL_CALL = "tool_call"


class Block:
    """
    One block of an answer, as far as it has come.

    Args:
        index: Its place among the answer's blocks, from 0.
        kind: What it is made of.
        call: Of a tool call: which of the answer's, from 0; else -1.
        id: Of a tool call: its id; else empty.
        name: Of a tool call: its function; else empty.
        text: Its text so far, or a call's arguments.
    """

    __slots__ = ("call", "id", "index", "kind", "name", "pieces")

    def __init__(
        self,
        index: int,
        kind: BlockKind,
        *,
        call: int = -1,
        id: str = "",
        name: str = "",
        text: str = "",
    ) -> None:
        self.index = index
        self.kind = kind
        self.call = call
        self.id = id
        self.name = name
        self.pieces = [text] if text else []

    @property
    def text(self) -> str:
        """All of its text so far; of a tool call, its arguments as the model wrote them."""
        return "".join(self.pieces)


def blocks_of(choice: Choice) -> list[Block]:
    """The blocks of a whole answer: thinking first, tool calls last."""
    blocks: list[Block] = []
    for kind, text in (
        (BlockKind.REASONING, choice.reasoning),
        (BlockKind.TEXT, choice.text),
        (BlockKind.REFUSAL, choice.refusal),
    ):
        if text:
            blocks.append(Block(len(blocks), kind, text=text))
    for number, call in enumerate(choice.tool_calls):
        blocks.append(
            Block(
                len(blocks),
                BlockKind.TOOL_CALL,
                call=number,
                id=call.id or call_id(),
                name=call.name,
                text=call.arguments,
            )
        )
    return blocks


class BlockRenderer(ABC):
    """
    An `EventRenderer` whose answer is a row of blocks, of which one at a time is open.

    A backend may emit the pieces of parallel tool calls in turns. What comes for another
    block while a call's arguments are not whole JSON yet is held back until they are, or
    until the end: on the wire no block is ever reopened. Where calls come one after the
    other, as nearly all do, nothing waits.

    These dialects have one choice; what comes for another renders as nothing.

    Args:
        framing: SSE or NDJSON.

    Attributes:
        blocks: All so far, in order; the last one is open where `is_open`.
    """

    def __init__(self, framing: Framing) -> None:
        self.framing = framing
        self.heartbeat = framing.heartbeat
        self.blocks: list[Block] = []
        self.is_open = False
        self._held: list[Item] = []

    # What a dialect says.

    @abstractmethod
    def start(self) -> bytes:
        """What comes before the first block."""

    @abstractmethod
    def opened(self, block: Block) -> bytes:
        """*block* begins. Its text is empty still."""

    @abstractmethod
    def delta(self, block: Block, text: str) -> bytes:
        """*text* (never empty, an exact `str`) goes on the end of *block*, the open one."""

    @abstractmethod
    def closed(self, block: Block) -> bytes:
        """*block* is whole."""

    @abstractmethod
    def ended(self, response: InferenceResponse) -> bytes:
        """Every block is closed: finish reason, usage and the terminal marker."""

    @abstractmethod
    def error(self, error: LLMStreamError) -> bytes | None: ...

    # From items to blocks.

    def render(self, item: Item) -> bytes:
        if type(item) is str and self.is_open and not self._held:
            block = self.blocks[-1]
            if block.kind is BlockKind.TEXT and item:
                block.pieces.append(item)
                return self.delta(block, item)
        if getattr(item, "choice", 0):
            return b""
        return self._place(item)

    def end(self, response: InferenceResponse) -> bytes:
        frames = []
        while self._held:
            # The call that they wait for will not get any further.
            frames += [self._close(), *map(self._place, self._take_held())]
        return b"".join((*frames, self._close(), self.ended(response)))

    def _place(self, item: Item) -> bytes:
        if isinstance(item, str):
            kind, text = BlockKind.TEXT, str.__str__(item)
        elif isinstance(item, ToolCallDelta):
            kind, text = BlockKind.TOOL_CALL, item.arguments
        elif isinstance(item, Reasoning):
            kind, text = BlockKind.REASONING, item.text
        elif isinstance(item, Refusal):
            kind, text = BlockKind.REFUSAL, item.text
        else:
            return b""  # Finish and usage are the end's to tell.
        call = item.index if isinstance(item, ToolCallDelta) else -1
        block = self.blocks[-1] if self.is_open else None
        if block is not None and (block.kind, block.call) == (kind, call):
            return self._extend(block, text)
        if not text and call < 0:
            return b""
        if block is not None and not _is_whole(block):
            self._held.append(item)
            return b""
        if call >= 0 and any(each.call == call for each in self.blocks):
            if text and not text.isspace():
                raise ValueError("arguments came for a tool call that was whole already")
            return b""
        frames = [self._close()]
        block = Block(len(self.blocks), kind, call=call)
        if isinstance(item, ToolCallDelta):
            block.id, block.name = item.id or call_id(), item.name or ""
        self.blocks.append(block)
        self.is_open = True
        frames += [self.opened(block), self._extend(block, text)]
        return b"".join(frames)

    def _extend(self, block: Block, text: str) -> bytes:
        if not text:
            return b""
        block.pieces.append(text)
        frame = self.delta(block, text)
        if self._held and _is_whole(block):
            return b"".join((frame, *map(self._place, self._take_held())))
        return frame

    def _take_held(self) -> list[Item]:
        held, self._held = self._held, []
        return held

    def _close(self) -> bytes:
        if not self.is_open:
            return b""
        self.is_open = False
        return self.closed(self.blocks[-1])


def _is_whole(block: Block) -> bool:
    if block.kind is not BlockKind.TOOL_CALL:
        return True
    try:
        msgspec.json.decode(block.text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
