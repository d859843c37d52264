"""From an admitted request to its answer: whole, as a stream, or the rest of a stream."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from flask import Response

from .call import Admitted
from .core.messages import InferenceRequest
from .dialects import Parsed
from .exceptions import EngineError
from .framing import SSE
from .hangup import ClientLeftError
from .recording import EventId
from .replaying import ReplayRenderer
from .responses import StreamBody, render_document, unrenderable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .call import Call
    from .core.deadlines import Budgets
    from .core.messages import InferenceResponse
    from .engines.handle import InferenceHandle
    from .framing import Framing
    from .outcome import Outcome
    from .reception import Reception
    from .recording import Recordings
    from .replaying import Asides, Replay
    from .typing import Dialect, Engine, EventRenderer

__all__ = ["Answer", "complete", "count"]


def complete(
    call: Call,
    admitted: Sequence[Admitted],
    budgets: Budgets,
    on_finish: Callable[[Outcome], Any] | None = None,
) -> InferenceResponse:
    """
    The whole answer; waits for it.

    Raises:
        LLMStreamError: A request was refused, or failed.
    """
    submission = call.submit_all(admitted, budgets)
    try:
        return _wait(call, submission.handle)
    finally:
        call.finisher(submission, on_finish)()


def count(call: Call, request: InferenceRequest, counter: Engine, budgets: Budgets) -> int:
    """
    How many tokens *counter* says that *request*'s prompt has; waits for it. Nobody is told
    that it has finished, since nothing was generated.

    Raises:
        LLMStreamError: As `complete`.
    """
    submission = call.submit_all([Admitted(request, counter)], budgets)
    usage = _wait(call, submission.handle).usage
    return 0 if usage is None else usage.prompt_tokens


def _wait(call: Call, handle: InferenceHandle) -> InferenceResponse:
    # Nothing was sent, so there is nothing to probe a half-closed client with.
    call.connection.watch(lambda _: handle.cancel(ClientLeftError()))
    try:
        return handle.get()
    except BaseException:
        handle.cancel()
        raise
    finally:
        call.connection.unwatch()


class Answer:
    """
    A dialect's answer to one call, as HTTP.

    Args:
        call: Who asks.
        dialect: Renders it.
        framing: As `Accept` has it.
        recordings: The app's.
        request_ids: The app's: of answers under way that have ids of their own, by these.
    """

    def __init__(
        self,
        call: Call,
        dialect: Dialect,
        framing: Framing,
        recordings: Recordings,
        request_ids: dict[str, str],
    ) -> None:
        self._call = call
        self._dialect = dialect
        self._framing = framing
        self._recordings = recordings
        self._request_ids = request_ids
        self._is_resumable = framing == SSE and call.settings.resume_seconds > 0
        self._scope = f"{call.route.rpartition('.')[0]} {dialect.name}"
        self._headers = {"X-Request-ID": call.request_id, "Content-Type": framing.content_type}
        if framing.streams:
            # Neither caches nor nginx may hold tokens back.
            self._headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

    def head(self) -> Response:
        """Of an answer that nobody asked for."""
        response = Response(headers=self._headers)
        # Werkzeug would declare 0, the length of this body and not of GET's.
        response.automatically_set_content_length = False
        return response

    def document(
        self,
        parsed: Parsed,
        admitted: Sequence[Admitted],
        budgets: Budgets,
        on_finish: Callable[[Outcome], Any] | None,
    ) -> Response:
        """The whole answer to *parsed*."""
        response = complete(self._call, admitted, budgets, on_finish)
        return Response(
            render_document(self._dialect, parsed, response),
            headers=self._headers_for(parsed.request.request_id),
        )

    def stream(
        self,
        parsed: Parsed,
        admitted: Sequence[Admitted],
        budgets: Budgets,
        on_finish: Callable[[Outcome], Any] | None,
    ) -> Response:
        """The answer to *parsed*, from its first token on."""
        call, request = self._call, parsed.request
        # First: there may be no form for this in a stream.
        renderer = self._dialect.renderer(parsed, self._framing)
        submission, reception = call.receive(admitted, budgets)
        finish = self._named(parsed, call.finisher(submission, on_finish))
        if self._is_resumable:
            seconds = call.settings.resume_seconds
            replay = self._record(
                reception,
                renderer,
                finish,
                identity=request.identity,
                scope=self._scope,
                chat_id=parsed.chat_id,
                linger_seconds=seconds,
                keep_seconds=seconds,
            )
            if replay is not None:
                # A renderer of its own: what it says to this reader alone is not recorded.
                asides = self._dialect.renderer(parsed, self._framing)
                return self.replay(replay, asides, request.request_id, is_resumed=False)
        return self._respond(reception, renderer, finish, request.request_id)

    def begin(
        self,
        parsed: Parsed,
        admitted: Sequence[Admitted],
        budgets: Budgets,
        *,
        identity: Any,
        stream_id: str,
        keep_seconds: float,
    ) -> tuple[InferenceHandle, Replay]:
        """
        The answer to *parsed*, which goes on with or without a reader.

        Args:
            parsed: What was asked.
            admitted: Its requests.
            budgets: Of the answer.
            identity: Who may read it.
            stream_id: Under which it is recorded; see `Recording`.
            keep_seconds: How long it can be read after its end.

        Returns:
            The run, and its first reader.

        Raises:
            LLMStreamError: The engine refused it, or it cannot be recorded.
        """
        call = self._call
        renderer = self._dialect.renderer(parsed, self._framing)
        submission, reception = call.receive(admitted, budgets)
        finish = self._named(parsed, call.finisher(submission))
        replay = self._record(
            reception,
            renderer,
            finish,
            identity=identity,
            linger_seconds=inf,
            keep_seconds=keep_seconds,
            has_ids=False,
            begins_at_once=True,
            stream_id=stream_id,
        )
        if replay is None:
            error = EngineError("The answer cannot be recorded.")
            reception.leave(error)
            finish()
            raise error
        return submission.handle, replay

    def _record(
        self,
        reception: Reception,
        renderer: EventRenderer,
        finish: Callable[[], None],
        **how: Any,
    ) -> Replay | None:
        """See `Recordings.record`. Where it cannot begin, the run ends."""
        try:
            return self._recordings.record(
                reception, renderer, settings=self._call.settings, on_close=finish, **how
            )
        except BaseException as exc:
            reception.leave(unrenderable(exc))
            finish()
            raise

    def replay(
        self, replay: Replay, asides: Asides, request_id: str = "", *, is_resumed: bool = True
    ) -> Response:
        """
        What *replay* gives.

        Args:
            replay: One reader of a recorded answer.
            asides: To this reader: heartbeats, and the errors that are its own.
            request_id: Of the answer's request, where that is known.
            is_resumed: Not so for who has asked for it, and may still get an error's status.
        """
        return self._respond(
            replay, ReplayRenderer(asides), _nothing, request_id, is_resumed=is_resumed
        )

    def rest(self, parsed: Parsed, identify: Callable[[], Any]) -> Response | None:
        """
        What follows the `Last-Event-ID` of a client that comes back; None where it is a
        new one. 204 tells EventSource that there is no more (WHATWG HTML 9.2.3).

        Raises:
            UnknownStreamError: There is no such stream, or it is not its own.
        """
        id = EventId.of(self._call.headers.get("Last-Event-ID"))
        if id is None or not self._is_resumable:
            return None
        replay = self._recordings.replay(
            id, identity=identify(), scope=self._scope, settings=self._call.settings
        )
        if replay.is_at_end:
            return Response(status=204, headers=self._headers_for(parsed.request.request_id))
        asides = self._dialect.renderer(parsed, self._framing)
        return self.replay(replay, asides, parsed.request.request_id)

    def of_chat(self, chat_id: str, identity: Any) -> Response | None:
        """
        The whole answer that is under way in *identity*'s chat, from its first event on; None
        where there is none. One that is over belongs to the chat, which the page has.
        """
        replay = self._recordings.of_chat(
            chat_id, identity=identity, scope=self._scope, settings=self._call.settings
        )
        if replay is None:
            return None
        nobodys = Parsed(InferenceRequest(prompt="", request_id=self._call.request_id))
        return self.replay(replay, self._dialect.renderer(nobodys, self._framing))

    def _respond(
        self,
        source: Reception | Replay,
        renderer: EventRenderer,
        on_close: Callable[[], None],
        request_id: str,
        *,
        is_resumed: bool = False,
    ) -> Response:
        call = self._call
        body = StreamBody(
            source, renderer, call.connection, call.settings, on_close, is_resumed=is_resumed
        )
        try:
            body.open()
        except BaseException:
            body.close()
            raise
        call.unless_answered(body.close)
        return Response(body, headers=self._headers_for(request_id), direct_passthrough=True)

    def _named(self, parsed: Parsed, finish: Callable[[], None]) -> Callable[[], None]:
        """*finish*, until which the answer can be ended by its id."""
        id = parsed.answer_id
        if id is None:
            return finish
        self._request_ids[id] = parsed.request.request_id

        def forget() -> None:
            self._request_ids.pop(id, None)
            finish()

        return forget

    def _headers_for(self, request_id: str) -> dict[str, str]:
        # A view may have given the request an id of its own.
        return {**self._headers, "X-Request-ID": request_id or self._call.request_id}


def _nothing() -> None: ...
