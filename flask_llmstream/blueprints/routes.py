"""What the routes of every dialect's blueprint have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response

from ..config import check_values, model_ids
from ..dialects.encoding import encode
from ..errors import respond_to
from ..exceptions import LLMStreamError, UnknownStreamError
from .body import check_length, read_body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..call import Call
    from ..config import Settings
    from ..extension import LLMStream
    from ..typing import Dialect

__all__ = ["PackageBlueprint", "Routes"]


class PackageBlueprint(Blueprint):
    """One of this package's; `routes` is what made it, where that is `Routes`."""

    routes: Routes | None = None


class Routes:
    """
    A blueprint under construction: who may call it, what it offers, how it answers.

    A route to cancel is there already: it ends the caller's own answer of that id, whichever
    dialect it is in.

    Args:
        llm: The extension.
        name: Of the blueprint; each one registered on an app needs its own.
        url_prefix: Where it is unless registered elsewhere.
        error_document: An error as the JSON body of a 4xx or 5xx.
        models: Which models it offers; None is all.
        settings: Put over the app's, by their names in lower case.
        cancel_path: Where ``DELETE`` ends an answer.

    Raises:
        ConfigurationError: There is no such setting, or its value is wrong.
    """

    def __init__(
        self,
        llm: LLMStream,
        *,
        name: str,
        url_prefix: str,
        error_document: Callable[[LLMStreamError], bytes],
        models: Iterable[str] | None,
        settings: Mapping[str, Any],
        cancel_path: str = "/streams/<path:id>",
    ) -> None:
        self.error_document = error_document
        self._llm = llm
        self._overrides = check_values(settings)
        self._only = None if models is None else model_ids(models)
        self.blueprint = PackageBlueprint(name, __name__, url_prefix=url_prefix)
        self.blueprint.routes = self
        self.blueprint.register_error_handler(LLMStreamError, respond_to(error_document))
        self.blueprint.delete(cancel_path)(self.cancel)

    def begin(self) -> Call:
        """
        What comes before anything is looked up.

        Raises:
            RequestTooLargeError, AuthenticationError: In this order.
        """
        call = self._llm.call(self._overrides)
        check_length(call.settings.max_request_bytes)
        call.authenticate()
        return call

    def settings(self) -> Settings:
        """The current app's, with the blueprint's own put over them."""
        return replace(self._llm.settings(), **self._overrides)

    def offered(self) -> list[str]:
        """The ids of the models that can be had here."""
        known = self._llm.models()
        return known if self._only is None else [model for model in self._only if model in known]

    def answer(self, dialect: Dialect) -> Response:
        """The answer to the current request, whose body is in *dialect*."""
        call = self.begin()
        parsed = dialect.parse(read_body(call))
        return self._llm.answer(call, dialect, parsed, models=self.offered())

    def json(self, call: Call, document: bytes) -> Response:
        """A response that is no model's answer."""
        return Response(
            document,
            headers={"X-Request-ID": call.request_id},
            content_type="application/json",
        )

    def cancel(self, id: str) -> Response:
        """End an answer of one's own, by its id."""
        call = self.begin()
        if not self._llm.cancel(call, id):
            raise UnknownStreamError("No answer of yours with this id is under way.")
        return self.json(call, encode({"id": id, "cancelled": True}))
