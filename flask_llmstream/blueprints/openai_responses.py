"""
OpenAI's Responses: asked, kept, gone on from, and run in the background.

What is kept is in this process's memory: with several workers, a client has to come back to
the same one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flask import request as http_request

from ..budgets import background_budgets_of
from ..dialects import OpenAIResponsesDialect
from ..dialects.answer_ids import RESPONSE
from ..dialects.decoding import invalid
from ..dialects.encoding import decode, encode
from ..dialects.openai_responses import ReaderAsides
from ..exceptions import RequestCancelledError, UnknownStreamError
from ..framing import JSON, SSE, negotiate
from ..hangup import ClientLeftError
from ..recording import EventId
from ..stores import KeptResponse, ResponseStore, Turn, owner_of
from .body import read_body
from .operation import describe

if TYPE_CHECKING:
    from flask import Flask, Response

    from ..call import Call
    from ..dialects.openai_responses_body import ParsedResponses
    from ..dialects.openai_responses_input import ResponseItem
    from ..engines.handle import InferenceHandle
    from ..extension import LLMStream
    from ..framing import Framing
    from .routes import Routes

__all__ = ["add_responses"]

_UNDER_WAY = frozenset({"queued", "in_progress"})

_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_(?:in)?[0-9]+")
"""The ids that we give items hold the one of their response."""

_NUMBER = re.compile(r"[0-9]{1,10}")

_PAGE = 20
_MAX_PAGE = 100
"""How many input items come at a time; both are OpenAI's."""

_MAX_NUMBER = 2**31
"""Of an event."""

_READING = {
    "stream": {"type": "boolean"},
    "starting_after": {"type": "integer", "minimum": 0, "maximum": _MAX_NUMBER},
}
_LISTING = {
    "limit": {"type": "integer", "minimum": 1, "maximum": _MAX_PAGE},
    "order": {"enum": ["asc", "desc"]},
    "after": {"type": "string"},
}


def add_responses(routes: Routes, llm: LLMStream) -> None:
    """Add the routes under ``/responses`` to a blueprint."""
    by_app: WeakKeyDictionary[Flask, _Responses] = WeakKeyDictionary()

    def visit() -> tuple[Call, _Responses, bytes | None]:
        call = routes.begin()
        # One for each blueprint: its bounds are its own, and its keys may have the names of
        # another one's.
        responses = by_app.get(call.app) or by_app.setdefault(
            call.app, _Responses(llm, routes, call)
        )
        return call, responses, owner_of(llm.identify(call))

    @routes.blueprint.post("/responses")
    @describe(OpenAIResponsesDialect())
    def create_response() -> Response:
        """Answer, and keep what was said."""
        call, responses, owner = visit()
        return responses.create(call, owner)

    @routes.blueprint.get("/responses/<id>")
    @describe(framings=(JSON, SSE), query=_READING)
    def get_response(id: str) -> Response:
        """Look at a response, or read one on that was begun in the background."""
        call, responses, owner = visit()
        found = responses.find(id, owner)
        if http_request.args.get("stream", "").lower() == "true" and call.method != "HEAD":
            return responses.read_on(call, found, _starting_after())
        return routes.json(call, found.document)

    @routes.blueprint.delete("/responses/<id>")
    def delete_response(id: str) -> Response:
        """Forget a response, and end it where it is under way."""
        call, responses, owner = visit()
        responses.delete(responses.find(id, owner))
        return routes.json(call, encode({"id": id, "object": "response", "deleted": True}))

    @routes.blueprint.get("/responses/<id>/input_items")
    @describe(query=_LISTING)
    def list_input_items(id: str) -> Response:
        """List what a response was asked."""
        call, responses, owner = visit()
        return routes.json(call, encode(_page(responses.find(id, owner).input_items)))

    @routes.blueprint.post("/responses/<id>/cancel")
    def cancel_response(id: str) -> Response:
        """End a response that runs in the background."""
        call, responses, owner = visit()
        found = responses.find(id, owner)
        if not found.is_background:
            raise invalid("response_id", "only what runs in the background can be cancelled here")
        found.cancel()
        return routes.json(call, found.document)


class _Answered:
    """A response that is over, as it was kept."""

    def __init__(self, kept: KeptResponse) -> None:
        self.id = kept.id
        self.owner = kept.owner
        self.document = kept.document
        self.turns = kept.turns

    @property
    def items(self) -> list[ResponseItem]:
        """The whole conversation, its output included."""
        return [item for turn in self.turns for item in decode(turn.items)]

    @property
    def input_items(self) -> list[ResponseItem]:
        items = self.items
        return items[: len(items) - len(decode(self.document)["output"])]

    @property
    def is_background(self) -> bool:
        return bool(decode(self.document)["background"])

    def cancel(self) -> None:
        """Nothing: it is over. Whoever cancels twice is told the same twice."""


class _Running:
    """
    A response in the background that is being made.

    Thread safety: every method, from any thread or greenlet.
    """

    is_background = True

    def __init__(
        self,
        question: _Question,
        owner: bytes,
        handle: InferenceHandle,
        input_items: list[ResponseItem],
    ) -> None:
        self.question = question
        self.owner = owner
        self.input_items = input_items
        self._handle = handle

    @property
    def id(self) -> str:
        return str(self.question.response["id"])

    @property
    def document(self) -> bytes:
        response = self.question.response
        is_cancelled = isinstance(self._handle.outcome, RequestCancelledError)
        if is_cancelled and response["status"] in _UNDER_WAY:
            # The stream is about to say so.
            response = {**response, "status": "cancelled"}
        return encode(response)

    def cancel(self) -> None:
        self._handle.cancel(RequestCancelledError("The response was cancelled."))


class _Question:
    """
    What a response goes on from, and what becomes of it: its dialect's `History` and
    `Notice`.

    Attributes:
        owner: Whose it is; None where that cannot be told again.
        earlier: The conversation that it goes on from.
        response: The response object as it was told last.
        is_wanted: Not so once it was deleted.
        is_closed: Whether it has an end, and that is kept.

    Thread safety: `note` from the thread or greenlet that renders the answer, the rest from
    the one that reads the question.
    """

    def __init__(self, responses: _Responses, owner: bytes | None) -> None:
        self._responses = responses
        self.owner = owner
        self.earlier: tuple[Turn, ...] = ()
        self.response: dict[str, Any] = {}
        self.is_wanted = True
        self.is_closed = False

    def conversation(self, response_id: str) -> list[ResponseItem]:
        """See `History.conversation`."""
        found = self._responses.get(response_id, self.owner)
        if isinstance(found, _Running):
            raise invalid("previous_response_id", "that response is not finished yet")
        if found is None:
            error = invalid(
                "previous_response_id",
                "there is no such response of yours, or it is not kept any more",
            )
            error.code = "previous_response_not_found"  # OpenAI's own
            raise error
        self.earlier = found.turns
        return found.items

    def item(self, item_id: str) -> ResponseItem | None:
        """See `History.item`."""
        match = _ITEM_ID.fullmatch(item_id)
        found = self._responses.get(RESPONSE + match[1], self.owner) if match else None
        if not isinstance(found, _Answered):
            return None
        items: list[ResponseItem] = decode(found.turns[-1].items)
        return next((item for item in items if item["id"] == item_id), None)

    def note(self, parsed: ParsedResponses, response: dict[str, Any]) -> None:
        """See `Notice`."""
        self.response = response
        if response["status"] not in _UNDER_WAY:
            self._responses.close(self, parsed)


class _Responses:
    """
    The responses of one blueprint on one app.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(self, llm: LLMStream, routes: Routes, call: Call) -> None:
        settings = call.settings
        self._llm = llm
        self._routes = routes
        self._store = ResponseStore(
            max_responses=settings.stored_responses,
            max_bytes=settings.stored_bytes,
            keep_seconds=settings.stored_seconds,
        )
        # As many as the engines take.
        self._running: dict[str, _Running] = {}

    def create(self, call: Call, owner: bytes | None) -> Response:
        """``POST /responses``."""
        question = _Question(self, owner)
        dialect = OpenAIResponsesDialect(notice=question.note)
        parsed = dialect.parse(read_body(call), question)
        is_kept = owner is not None and call.settings.stored_responses > 0
        parsed = replace(parsed, store=parsed.store and is_kept)
        if not parsed.background:
            return self._llm.answer(call, dialect, parsed, models=self._routes.offered())
        if owner is None or not parsed.store:
            raise invalid("background", "needs responses to be kept, which they are not here")
        return self._begin(call, dialect, parsed, question, owner)

    def _begin(
        self,
        call: Call,
        dialect: OpenAIResponsesDialect,
        parsed: ParsedResponses,
        question: _Question,
        owner: bytes,
    ) -> Response:
        framing = _negotiate(call, stream=parsed.stream)
        budgets = background_budgets_of(call.headers, call.settings)
        admitted = self._llm.admit(call, parsed.request, models=self._routes.offered())
        parsed = replace(parsed, request=admitted.request)
        # Events are recorded as SSE, whether or not anybody reads them.
        answer = self._llm.answering(call, dialect, SSE)
        handle, replay = answer.begin(
            parsed,
            [admitted],
            budgets,
            identity=owner,
            stream_id=parsed.token,
            keep_seconds=call.settings.stored_seconds,
        )
        running = _Running(question, owner, handle, [*parsed.history, *parsed.items])
        self._running[parsed.answer_id] = running
        if question.is_closed:
            # Too late for `close` to see that it was here.
            self._running.pop(parsed.answer_id, None)
        if framing == SSE:
            return answer.replay(replay, ReaderAsides(SSE), admitted.request.request_id)
        replay.leave(ClientLeftError())
        return self._routes.json(call, running.document)

    def close(self, question: _Question, parsed: ParsedResponses) -> None:
        """*question* is answered, or has failed: keep what is to be kept."""
        response, owner = question.response, question.owner
        # Who cancels an answer that is waited for, by leaving, does not want it.
        is_dropped = response["status"] == "cancelled" and not parsed.background
        if parsed.store and owner is not None and not is_dropped:
            turn = Turn(encode([*parsed.items, *response["output"]]))
            turns = (*question.earlier, turn)
            self._store.put(KeptResponse(parsed.answer_id, owner, encode(response), turns))
            if not question.is_wanted:
                # Afterwards, since it may be deleted at any time: now, or there.
                self._store.delete(parsed.answer_id, owner)
        # In this order, so that there is always one of the two to be found.
        question.is_closed = True
        self._running.pop(parsed.answer_id, None)

    def get(self, id: str, owner: bytes | None) -> _Running | _Answered | None:
        """The response with this *id*, where it is *owner*'s."""
        if owner is None:
            return None
        running = self._running.get(id)
        if running is not None and running.owner == owner:
            return running
        kept = self._store.get(id, owner)
        return None if kept is None else _Answered(kept)

    def find(self, id: str, owner: bytes | None) -> _Running | _Answered:
        """
        As `get`.

        Raises:
            UnknownStreamError: There is none.
        """
        found = self.get(id, owner)
        if found is None:
            raise UnknownStreamError(
                "There is no such response of yours, or it is not kept any more."
            )
        return found

    def delete(self, found: _Running | _Answered) -> None:
        """Forget it, and end it where it is under way."""
        if isinstance(found, _Running):
            found.question.is_wanted = False
            found.cancel()
        self._store.delete(found.id, found.owner)
        self._running.pop(found.id, None)

    def read_on(self, call: Call, found: _Running | _Answered, starting_after: int) -> Response:
        """The events of *found* that come after the one with number *starting_after*."""
        if not found.is_background:
            raise invalid("stream", "only what was begun in the background is streamed again")
        _negotiate(call, stream=True)
        id = EventId(found.id.removeprefix(RESPONSE), starting_after + 1)
        try:
            replay = self._llm.recordings().replay(id, identity=found.owner, settings=call.settings)
        except UnknownStreamError as exc:
            raise UnknownStreamError(
                "starting_after: that event has not come yet, or the events are not kept any more.",
                param="starting_after",
            ) from exc
        answer = self._llm.answering(call, OpenAIResponsesDialect(), SSE)
        return answer.replay(replay, ReaderAsides(SSE))


def _negotiate(call: Call, *, stream: bool | None) -> Framing:
    """How what is recorded is sent; see `negotiate`."""
    return negotiate(
        call.headers.get("Accept"), stream=stream, streams_by_default=False, offers=(SSE, JSON)
    )


def _starting_after() -> int:
    """The number of the last event that the client has; -1 where it has none."""
    return _number("starting_after", -1, least=0, most=_MAX_NUMBER)


def _number(name: str, default: int, *, least: int, most: int) -> int:
    text = http_request.args.get(name)
    if text is None:
        return default
    if _NUMBER.fullmatch(text) is None or not least <= int(text) <= most:
        raise invalid(name, f"must be a whole number from {least} to {most}")
    return int(text)


def _page(items: list[ResponseItem]) -> dict[str, Any]:
    """The part of *items* that the query asks for."""
    limit = _number("limit", _PAGE, least=1, most=_MAX_PAGE)
    order = http_request.args.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", "must be `asc` or `desc`")
    rest = items if order == "asc" else items[::-1]
    after = http_request.args.get("after")
    if after is not None:
        places = [place for place, item in enumerate(rest) if item["id"] == after]
        if not places:
            raise invalid("after", "is no item of this response")
        rest = rest[places[0] + 1 :]
    page = rest[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(rest) > limit,
    }
