"""The plug points: what a backend, an engine and a dialect must offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .core.messages import InferenceRequest, InferenceResponse, Item
    from .dialects.parsed import Parsed
    from .engines.handle import InferenceHandle
    from .exceptions import EngineClosedError, LLMStreamError
    from .framing import Framing

__all__ = [
    "ANYONE",
    "FEATURES",
    "SHOWN_FEATURES",
    "Backend",
    "BatchBackend",
    "CallbackBackend",
    "Dialect",
    "Emit",
    "Engine",
    "EventRenderer",
    "Store",
    "TokenCallback",
    "WorkerKind",
]

WorkerKind: TypeAlias = Literal["thread", "greenlet"]

TokenCallback: TypeAlias = Callable[[str, bool], Any]
"""
``token_callback(token, is_final)``: answer text of choice 0, serial, on the producing
worker. ``("", True)`` comes exactly once, last, however the request ends.
"""

Emit: TypeAlias = "Callable[[Item | BaseException], bool]"
"""Hands an item, or the error that ends the stream, to the engine. False means stop."""


@runtime_checkable
class Backend(Protocol):
    """
    Generates on a worker.

    Three optional attributes: ``worker`` (``"thread"``, the default, or ``"greenlet"`` for
    what waits on sockets), ``max_concurrency`` (how many requests it is given at a time,
    where that is less than the engine works on), and ``supports``, a set of `FEATURES`
    names. A request for a
    feature outside the set is refused with 400 before it is queued. Without the
    attribute the backend is trusted with what its output shows (tools, n, logprobs: the
    engine checks), and refused what it would not (JSON formats, images).

    An optional method ``count_tokens(request) -> int`` tells how many tokens the prompt of
    *request* has, before anything is generated. It is called on a worker, as `generate` is.
    """

    def generate(
        self, request: InferenceRequest
    ) -> InferenceResponse | Iterator[Item] | str | None:
        """
        Yield items, or call ``request.stream_callback(item)`` until it says False, or
        return the whole answer. May raise any `LLMStreamError`; whatever else it raises
        is logged and reaches the caller as `EngineError`.
        """


@runtime_checkable
class BatchBackend(Protocol):
    """A backend that answers several requests in one go."""

    def generate_batch(self, requests: Sequence[InferenceRequest]) -> Sequence[InferenceResponse]:
        """Answer *requests*, in their order."""


@runtime_checkable
class CallbackBackend(Protocol):
    """
    A continuously batching engine that serves many sequences from threads of its own.

    An optional attribute ``max_concurrency`` bounds how many requests it is given at a
    time (default 256); the rest wait in the engine's queue, in priority order.
    """

    def submit(self, request: InferenceRequest, emit: Emit) -> Callable[[], Any]:
        """
        Take *request*, return at once with a function that cancels it.

        The stream ends after ``request.n`` `Finish` items (so `Usage` comes before), or
        with ``emit(exception)``. *emit* never blocks and is serial for one request.
        """


ANYONE: Any = object()
"""In place of an identity: whoever asked for it."""


class Engine(Protocol):
    """
    What an extension needs of an engine. Thread safety: every method, from any thread.

    Two methods are optional: ``request_stats()`` says what became of the requests, by model
    (`LLMStream.stats` has the figures), and ``count_refusal(request, error)`` is told of one
    that was refused before `submit`.
    """

    @property
    def is_available(self) -> bool:
        """Whether `submit` would take a request at all, a full queue aside."""

    def submit(self, request: InferenceRequest) -> InferenceHandle:
        """Queue *request*; with a `stream_callback` of its own it is a stream."""

    def cancel(self, request_id: str, *, identity: Any = ANYONE) -> bool:
        """End every live request with this id and *identity*; False where there is none."""

    def backend_for(self, model: str) -> Any:
        """What generates for *model*."""

    def queue_stats(self) -> dict[str, Any]:
        """Counts of requests."""

    def worker_stats(self) -> dict[str, Any]:
        """Counts of workers, and of requests by how they ended."""

    def refuse(self, error: EngineClosedError) -> None:
        """Take no more requests, for *error*; what is pending goes on."""

    def end_all(self, error: LLMStreamError) -> None:
        """End everything pending, with *error*."""


class Store(Protocol):
    """
    Replay buffers: rows of records by stream, which only grow.

    The first record says whose the stream is, an empty one ends it, and those between are
    its events. Implementations may wait (Redis): they are called in a greenlet where there
    are any, under no lock.

    Thread safety: every method, from any thread or greenlet.
    """

    def append(self, stream_id: str, position: int, records: Sequence[bytes]) -> bool:
        """
        Add *records*, the first of them as number *position*; 0 begins the stream.

        Returns:
            False where the stream is not kept (any more): appending is of no use.
        """

    def read_after(self, stream_id: str, position: int) -> list[bytes] | None:
        """The records after number *position*, -1 for all; None where there is no stream."""

    def expire(self, stream_id: str, seconds: float) -> None:
        """Forget the stream *seconds* from now; the last call counts."""


class EventRenderer(Protocol):
    """
    One response's way from items to bytes. Not thread-safe; one a response.

    Every method returns whole frames, or ``b""`` where there is nothing to say.
    """

    @property
    def heartbeat(self) -> bytes:
        """What keeps an idle connection alive; ``b""`` where the framing has no form."""

    def start(self) -> bytes:
        """What comes before the first item (an opening role delta, say)."""

    def render(self, item: Item) -> bytes:
        """One item as the backend emitted it, never `bytes`."""

    def end(self, response: InferenceResponse) -> bytes:
        """Missing finish reasons, usage and the terminal marker."""

    def error(self, error: LLMStreamError) -> bytes | None:
        """The in-band error, without a terminal marker; None where there is no form."""


class Dialect(Protocol):
    """A protocol that clients speak: JSON bodies to requests, items to frames. Pure."""

    @property
    def name(self) -> str: ...

    @property
    def framings(self) -> Sequence[Framing]:
        """What an answer can be framed as; the one that streams by default comes first."""

    @property
    def streams_by_default(self) -> bool:
        """Whether a body that is silent about streaming, with a neutral Accept, streams."""

    def parse(self, body: bytes) -> Parsed:
        """
        Read a body.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """A fresh renderer for a streamed answer to *parsed*."""

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """The whole answer as one JSON document."""

    def error_document(self, error: LLMStreamError) -> bytes:
        """The error as the JSON body of a 4xx or 5xx."""


FEATURES = frozenset({"tools", "n", "logprobs", "json_object", "json_schema", "images"})
"""What a request can ask that not every backend can do."""

SHOWN_FEATURES = frozenset({"tools", "n", "logprobs"})
"""Those that the output shows: what a backend that does not say what it supports is
trusted with."""
