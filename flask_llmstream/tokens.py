"""The answer's tokens, for a view that makes a response of its own."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .core import runtime
from .exceptions import LLMStreamError, RequestCancelledError
from .hangup import ClientLeftError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .hangup import Connection
    from .reception import Reception

__all__ = ["TokenIterator"]


class TokenIterator:
    """
    Iterates the answer text of choice 0, token by token, as it is produced.

    Closing it, dropping it, or the client's leaving cancels the request.

    Raises:
        LLMStreamError: From iteration, where the request fails.

    Thread safety: one consumer.
    """

    def __init__(
        self, reception: Reception, connection: Connection, on_close: Callable[[], None]
    ) -> None:
        self._reception = reception
        self._connection = connection
        self._on_close = on_close
        self._pending: deque[str] = deque()
        self._is_closed = False
        # Here a FIN counts as gone: there is nothing of ours to probe with.
        connection.watch(lambda _: reception.leave(ClientLeftError()))

    def __iter__(self) -> TokenIterator:
        return self

    def __next__(self) -> str:
        while not self._pending:
            if self._is_closed:
                raise StopIteration
            self._pending.extend(
                item
                for item in self._reception.receive()
                if isinstance(item, str) and not getattr(item, "choice", 0)
            )
            outcome = self._reception.outcome
            if outcome is not None and not self._pending:
                self.close()
                if isinstance(outcome, LLMStreamError):
                    raise outcome
        return self._pending.popleft()

    def close(self) -> None:
        """Cancel what is left. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._connection.unwatch()
            self._reception.leave(RequestCancelledError("The tokens were not wanted any more."))
            self._on_close()

    def __del__(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._connection.unwatch()
            self._reception.leave(RequestCancelledError("The tokens were dropped."))
            runtime.run_detached(self._on_close)
