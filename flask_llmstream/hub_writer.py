"""Writing a stream's frames from the hub, without a switch into its greenlet."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from .core import runtime
from .framing import encode_chunk

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.messages import Item
    from .core.runtime import HubTask, Parker
    from .reception import Reception
    from .replaying import Replay

__all__ = ["HubWriter"]


class HubWriter:
    """
    The socket of one gunicorn response, as far as the hub writes to it.

    One owner at a time: the hub, between `run`'s beginning and its end, or the response's
    greenlet, which sleeps meanwhile. Both are on one native thread, so that nothing here
    is ever done by two at once. A socket that would block goes to the greenlet, which can
    wait for it; pings, errors and the end are the greenlet's as well.

    Args:
        sock: gevent's.
        response: gunicorn's: `sent` is its count for the access log.

    Attributes:
        written_at: When the hub wrote last, monotonic.
    """

    __slots__ = (
        "_error",
        "_is_chunked",
        "_is_hubs",
        "_parker",
        "_response",
        "_send",
        "_sock",
        "_task",
        "_unsent",
        "written_at",
    )

    def __init__(self, sock: Any, response: Any) -> None:
        self._sock = sock
        self._send: Callable[[bytes], int] = sock._sock.send
        self._response = response
        self._is_chunked: bool = response.chunked
        self._task: HubTask | None = None
        self._parker: Parker | None = None
        self._is_hubs = False
        self._unsent = b""
        self._error: Exception | None = None
        self.written_at = 0.0

    @classmethod
    def of(cls, response: Any) -> HubWriter | None:
        """
        For gunicorn's *response* to an HTTP/1 request; None where it takes a greenlet (TLS,
        HTTP/2, a body of a declared length, or none).

        Raises:
            AttributeError: It is not the response that we know.
        """
        if type(response).__name__ != "Response" or response.response_length is not None:
            return None
        sock, _, _ = response.sock, response.sent, response.chunked
        if response._omits_body or not runtime.is_plain_greenlet_socket(sock):
            return None
        return cls(sock, response)

    def run(
        self,
        source: Reception | Replay,
        render: Callable[[Item], bytes],
        heartbeat_seconds: float,
    ) -> None:
        """
        Let the hub write until there is something else to do: the end, a ping, a budget.

        Raises:
            OSError: The client is gone.
            Exception: What *render* raised.
        """
        channel = source.channel
        if self._task is None:
            self._task = runtime.make_hub_task()
            self._parker = runtime.make_parker()
        parker, task = self._parker, self._task
        assert parker is not None  # noqa: S101 - made together
        self._is_hubs = True
        self.written_at = monotonic()

        def write(now: float) -> None:
            # The hot path, once for each stream that has something, in a drain of the hub.
            if not self._is_hubs:
                return
            if channel.has_items:
                try:
                    items = source.take(now)
                    data = render(items[0]) if len(items) == 1 else b"".join(map(render, items))
                    if data:
                        self.written_at = now
                        self._write(data)
                except Exception as error:
                    self._error = error
                    self._is_hubs = False
            if channel.needs_attention or not self._is_hubs:
                self._is_hubs = False
                parker.unpark()

        task.function = write
        channel.publish(task)
        try:
            write(monotonic())  # What came before it was published.
            while self._is_hubs:
                until = min(self.written_at + heartbeat_seconds, source.due_at)
                if monotonic() >= until:
                    break
                parker.park(until)
        finally:
            self._is_hubs = False
            channel.publish(None)
            task.function = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, data: bytes) -> None:
        self._response.sent += len(data)
        payload = encode_chunk(data) if self._is_chunked else data
        try:
            sent = self._send(payload)
        except BlockingIOError:
            sent = 0
        if sent != len(payload):
            self._unsent = payload[sent:]
            self._is_hubs = False

    @property
    def has_unsent(self) -> bool:
        """The socket took only a part of the last write."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Send the rest, and wait for it. The greenlet's."""
        unsent, self._unsent = self._unsent, b""
        self._sock.sendall(unsent)
