"""Who asks, how long they wait, and where the answer goes."""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from blinker import Namespace
from flask import Flask, Response, after_this_request, has_request_context
from flask import request as http_request
from werkzeug.datastructures import Headers

from . import journal
from .budgets import budgets_of
from .core.channel import Channel
from .core.channel_group import ChannelGroup
from .core.deadlines import Deadline
from .engines.callers import caller_of
from .engines.gathering import gather
from .exceptions import InvalidRequestError, RequestCancelledError, TooManyRequestsError
from .hangup import Connection, connection_of
from .outcome import outcome_of
from .policy import authenticate, request_id_for, request_id_of
from .reception import Reception

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .config import Settings
    from .core.deadlines import Budgets
    from .core.messages import InferenceRequest
    from .engines.callers import Callers, Place
    from .engines.handle import InferenceHandle
    from .outcome import Outcome
    from .typing import Engine

__all__ = ["Admitted", "Call", "Submission", "request_finished"]

_logger = logging.getLogger("flask_llmstream.response")

request_finished = Namespace().signal("llmstream-request-finished")
"""
Sent once for each submitted request, with the app as sender and ``outcome=Outcome``: on
the response's side, in an app context, also when the client left.
"""


class Admitted(NamedTuple):
    """A request that policy has passed, completed, and the engine of its model."""

    request: InferenceRequest
    engine: Engine


@dataclass(frozen=True, slots=True)
class Submission:
    """
    The requests of one answer, under way: one, but for dialects that take several prompts.

    Args:
        requests: As they were submitted.
        handles: Theirs, one each.
        handle: All of them as one.
    """

    requests: tuple[InferenceRequest, ...]
    handles: tuple[InferenceHandle, ...]
    handle: InferenceHandle


@dataclass(slots=True)
class Call:
    """
    One use of the extension: by an HTTP request, or by code outside of one.

    Args:
        app: Whose engines and settings these are.
        settings: The app's, as its blueprint narrows them.
        callers: The app's.
        headers: The HTTP request's; empty outside of one.
        method: The HTTP method; empty outside of a request.
        connection: The client's.
        route: The endpoint that the HTTP request came by; empty outside of one.
        request_id: The client's `X-Request-ID`, or a new one.
        key_name: Of the API key, where one was needed.
        arrived_at: Monotonic: when the budgets began.
    """

    app: Flask
    settings: Settings
    callers: Callers
    headers: Headers = field(default_factory=Headers)
    method: str = ""
    connection: Connection = field(default_factory=Connection)
    route: str = ""
    request_id: str = ""
    key_name: str | None = None
    arrived_at: float = field(default_factory=monotonic)

    @classmethod
    def here(cls, app: Flask, settings: Settings, callers: Callers) -> Call:
        """From the current request, where there is one."""
        if not has_request_context():
            return cls(app, settings, callers, request_id=request_id_of(Headers()))
        return cls(
            app,
            settings,
            callers,
            headers=http_request.headers,
            method=http_request.method,
            connection=connection_of(http_request.environ),
            route=http_request.endpoint or "",
            request_id=request_id_for(http_request),
        )

    def authenticate(self) -> None:
        """
        Learn whose API key this is.

        Raises:
            AuthenticationError: The key is missing or wrong.
        """
        self.key_name = authenticate(self.headers, self.settings)

    def budgets(self, *, streams: bool) -> Budgets:
        """
        How long the answer may take.

        Raises:
            InvalidRequestError: ``X-Request-Timeout`` is not a positive number.
        """
        return budgets_of(self.headers, self.settings, streams=streams)

    def receive(
        self, admitted: Sequence[Admitted], budgets: Budgets
    ) -> tuple[Submission, Reception]:
        """
        Submit what was *admitted* as one stream that this side reads.

        Raises:
            LLMStreamError: One was refused; those before it are cancelled.
        """
        channels = [self._channel(len(admitted)) for _ in admitted]
        for (request, _), each in zip(admitted, channels, strict=True):
            request.stream_callback = each.send
        channel = (
            channels[0]
            if len(channels) == 1
            else ChannelGroup(channels, [request.n for request, _ in admitted])
        )
        try:
            submission = self.submit_all(admitted, budgets)
        except BaseException:
            channel.close()  # Whose producers may wait for room already.
            raise
        return submission, Reception(
            channel, submission.handle, budgets=budgets, arrived_at=self.arrived_at
        )

    def _channel(self, shares: int) -> Channel:
        """One of *shares* channels, which together hold what the settings allow."""
        settings = self.settings
        return Channel(
            size=max(1, settings.channel_size // shares),
            max_bytes=max(1, settings.channel_bytes // shares),
            slow_reader_seconds=settings.slow_reader_seconds,
        )

    def submit_all(self, admitted: Sequence[Admitted], budgets: Budgets) -> Submission:
        """
        Submit what was *admitted*, all of it or nothing.

        Raises:
            LLMStreamError: One was refused; those before it are cancelled.
        """
        handles: list[InferenceHandle] = []
        with ExitStack() as undo:
            places = [self._enter(*each, undo, of=len(admitted)) for each in admitted]
            for (request, engine), place in zip(admitted, places, strict=True):
                handle = self._submit(engine, request, budgets)
                undo.callback(self._abandon, request, handle)
                if place is not None:
                    handle.add_done_callback(place.give_back)
                handles.append(handle)
            undo.pop_all()
        requests = tuple(request for request, _ in admitted)
        handle = (
            handles[0]
            if len(handles) == 1
            else gather(handles, [request.n for request in requests])
        )
        return Submission(requests, tuple(handles), handle)

    def _enter(
        self, request: InferenceRequest, engine: Engine, undo: ExitStack, *, of: int
    ) -> Place | None:
        """
        Count *request* among what its caller has under way; None where nothing is limited.

        Args:
            request: One of those that are submitted together.
            engine: Its.
            undo: Gives the place back, unless all of them are under way.
            of: How many there are.

        Raises:
            TooManyRequestsError: The caller has too many.
            InvalidRequestError: It will always be too many.
        """
        limit = self.settings.identity_streams
        caller = None if limit is None else caller_of(request.identity)
        if limit is None or caller is None:
            return None
        if of > limit:
            raise InvalidRequestError(
                f"This asks for {of} answers at once; you may have {limit}.", param="prompt"
            )
        try:
            place = self.callers.enter(caller, limit=limit)
        except TooManyRequestsError as error:
            count_refusal = getattr(engine, "count_refusal", None)
            if count_refusal is not None:
                count_refusal(request, error)
            raise
        undo.callback(place.give_back)
        return place

    def _submit(
        self, engine: Engine, request: InferenceRequest, budgets: Budgets
    ) -> InferenceHandle:
        """Hand *request* to *engine*, with its deadline and this app's context."""
        deadline = Deadline(self.arrived_at + budgets.total_seconds)
        request.deadline = min(deadline, request.deadline or deadline)
        request.run_context = self.app.app_context
        return engine.submit(request)

    def _abandon(self, request: InferenceRequest, handle: InferenceHandle) -> None:
        """*request* was accepted, and another part of its answer was not."""
        handle.cancel(
            RequestCancelledError("Another part of the request was refused.", cause="other_part")
        )
        self.finisher(Submission((request,), (handle,), handle))()

    def unless_answered(self, cancel: Callable[[], None]) -> None:
        """
        Call *cancel* where the view, having made its stream, answers with an error.

        The stream would be cancelled when it is finalized, but `abort` leaves the view's
        frame, and all that it refers to, in a cycle that lives until the next collection.

        Args:
            cancel: A method; its object is not kept, for it may be dropped before.
        """
        if not has_request_context():
            return
        cancel_if_alive = weakref.WeakMethod(cancel)

        def look(response: Response) -> Response:
            if response.status_code >= 400:
                method = cancel_if_alive()
                if method is not None:
                    method()
            return response

        after_this_request(look)

    def finisher(
        self, submission: Submission, on_finish: Callable[[Outcome], Any] | None = None
    ) -> Callable[[], None]:
        """
        What to call once, when the answer is out or given up. It tells of each request, and
        logs how it ended. It raises nothing.
        """
        app, route, arrived_at = self.app, self.route, self.arrived_at

        def send(outcome: Outcome) -> None:
            request_finished.send(app, outcome=outcome)

        receivers = (send,) if on_finish is None else (on_finish, send)

        def finish() -> None:
            is_noted = journal.is_kept()
            if on_finish is None and not (is_noted or request_finished.receivers):
                return
            seconds = monotonic() - arrived_at
            for request, handle in zip(submission.requests, submission.handles, strict=True):
                outcome = outcome_of(request, handle)
                note = partial(journal.note, handle=handle, route=route, seconds=seconds)
                with app.app_context():
                    for tell in (note, *receivers) if is_noted else receivers:
                        try:
                            tell(outcome)
                        except Exception:
                            _logger.exception(
                                "A receiver of the outcome failed (request %s).",
                                outcome.request.request_id,
                            )

        return finish
