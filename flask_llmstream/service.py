"""How the requests of an app are answered: the parts that views and blueprints are made of."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, current_app

from .admitting import Admission
from .answering import Answer, count
from .call import Call
from .config import Settings
from .dialects.answer_ids import request_ids_of
from .engines.callers import Callers
from .exceptions import (
    ConfigurationError,
    EngineClosedError,
    InvalidRequestError,
    UnknownModelError,
)
from .framing import negotiate
from .recording import Recordings
from .registry import AppEngines, ModelRegistry
from .shutdown import ShutdownWatch
from .stores import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .call import Admitted
    from .core.messages import InferenceRequest
    from .dialects import Parsed
    from .framing import Framing
    from .outcome import Outcome
    from .typing import Dialect, Engine, Store

__all__ = ["Service", "get_current_app"]


@dataclass(slots=True)
class _AppState:
    """What belongs to one app."""

    engines: AppEngines
    recordings: Recordings
    shutdown_watch: ShutdownWatch
    request_ids: dict[str, str] = field(default_factory=dict)
    callers: Callers = field(default_factory=Callers)


class Service:
    """
    The base of `LLMStream`, and what it answers with: its models, and what belongs to each
    of its apps.

    Args:
        store: See `LLMStream`.

    Thread safety: any thread or greenlet.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._registry = ModelRegistry()
        self._states: weakref.WeakKeyDictionary[Flask, _AppState] = weakref.WeakKeyDictionary()
        self._admission = Admission(self._registry)

    def _add_app(self, app: Flask) -> None:
        settings = Settings.from_config(app.config)
        engines = self._registry.add_app(settings)
        self._states[app] = _AppState(
            engines,
            Recordings(self._store or MemoryStore(max_bytes=settings.resume_bytes)),
            ShutdownWatch(engines.all, settings.shutdown_grace_seconds),
        )
        # A test suite makes an app a test: their threads must not pile up.
        weakref.finalize(app, engines.let_go).atexit = False

    def call(self, overrides: Mapping[str, Any] | None = None) -> Call:
        """The current use of the current app; *overrides* are a blueprint's settings."""
        app = get_current_app()
        state = self._state(app)
        settings = state.engines.settings
        return Call.here(
            app, replace(settings, **overrides) if overrides else settings, state.callers
        )

    def admit(
        self, call: Call, request: InferenceRequest, *, models: Iterable[str] | None = None
    ) -> Admitted:
        """
        Complete *request* and hold it to the app's policy, before anything is queued.

        Args:
            call: Who asks.
            request: Stays as it is; a copy is completed, then by the `before_submit`
                functions.
            models: Which the route offers; None is all.

        Returns:
            The completed copy, and the engine of its model.

        Raises:
            LLMStreamError: 404, 400 or 403, in this order.
            TypeError: What a view gives is no request.
        """
        state = self._state(call.app)
        admitted = self._admission.admit(call, request, state.engines, models)
        state.shutdown_watch.start()
        return admitted

    def identify(self, call: Call) -> Any:
        """Who asks in this HTTP request; None outside of one."""
        return self._admission.identify(call)

    def cancel(self, call: Call, id: str) -> bool:
        """
        End the caller's own answer with this *id*, as it stands in the answer or its
        ``X-Request-ID``. False where it has none that is under way in this process.
        """
        state = self._state(call.app)
        engines = set(state.engines.by_model.values())
        identity = self.identify(call)
        ended = [
            engine.cancel(request_id, identity=identity)
            for request_id in {*request_ids_of(id), state.request_ids.get(id, id)}
            for engine in engines
        ]
        return any(ended)

    def answer(
        self,
        call: Call,
        dialect: Dialect,
        parsed: Parsed,
        *,
        models: Iterable[str] | None = None,
        on_finish: Callable[[Outcome], Any] | None = None,
    ) -> Response:
        """
        The response to *parsed* in *dialect*, framed as `Accept` has it.

        See `LLMStream.stream`.
        """
        framing = negotiate(
            call.headers.get("Accept"),
            stream=parsed.stream,
            streams_by_default=dialect.streams_by_default,
            offers=dialect.framings,
        )
        answer = self.answering(call, dialect, framing)
        if call.method == "HEAD":
            return answer.head()
        rest = answer.rest(parsed, partial(self._admission.identity_of, call, parsed.request))
        if rest is not None:
            return rest
        budgets = call.budgets(streams=framing.streams)
        admitted = [self.admit(call, each, models=models) for each in parsed.requests]
        request, *others = (each.request for each in admitted)
        parsed = replace(parsed, request=request, others=tuple(others))
        respond = answer.stream if framing.streams else answer.document
        return respond(parsed, admitted, budgets, on_finish)

    def answering(self, call: Call, dialect: Dialect, framing: Framing) -> Answer:
        """What answers *call* in *dialect*, one way or the other."""
        state = self._state(call.app)
        return Answer(call, dialect, framing, state.recordings, state.request_ids)

    def count_tokens(
        self, call: Call, request: InferenceRequest, *, models: Iterable[str] | None = None
    ) -> int:
        """
        How many tokens the prompt of *request* has, as the app's functions complete it.

        Args:
            call: Who asks.
            request: Stays as it is.
            models: Which the route offers; None is all.

        Raises:
            LLMStreamError: As `admit`; 400 where the model's backend does not count.
        """
        budgets = call.budgets(streams=False)
        request, engine = self.admit(call, request, models=models)
        if not callable(getattr(engine.backend_for(request.model), "count_tokens", None)):
            raise InvalidRequestError(
                f"The model {request.model!r} does not count tokens.", param="model"
            )
        engines = self._state(call.app).engines
        counter = self._registry.counter_of(request.model, engine, engines)
        return count(call, request, counter, budgets)

    # Looking.

    def models(self) -> list[str]:
        """
        The ids of all models, in the order of their registration; then what upstreams
        offer beside them (`UpstreamBackend`'s `discover`).
        """
        return self._registry.models()

    def settings(self) -> Settings:
        """The current app's."""
        return self._state(get_current_app()).engines.settings

    def recordings(self) -> Recordings:
        """The current app's."""
        return self._state(get_current_app()).recordings

    def check_ready(self, model: str) -> None:
        """
        Whether a request for *model* could be served now.

        Raises:
            UnknownModelError: There is no such model.
            EngineClosedError: Its engine is shut down, or all its workers are stuck.
            UpstreamError: All of its backends failed lately.
            ConfigurationError: Its backend's own `check_ready` says so (a missing file).
        """
        engine = self.engine_of(model)
        if engine is None:
            raise UnknownModelError(f"There is no model {model!r} here.", param="model")
        if not engine.is_available:
            raise EngineClosedError(f"The engine of {model!r} takes no requests.")
        check = getattr(engine.backend_for(model), "check_ready", None)
        if check is not None:
            check()

    def load_model(self, model: str) -> None:
        """
        Load *model* now, where its backend has a ``load()`` and has not done so: before the
        process serves, but after it was forked.

        Raises:
            UnknownModelError: There is no such model.
            Exception: What ``load()`` raises.
        """
        engine = self.engine_of(model)
        if engine is None:
            raise UnknownModelError(f"There is no model {model!r} here.", param="model")
        backend = engine.backend_for(model)
        for each in getattr(backend, "backends", (backend,)):
            load = getattr(each, "load", None)
            if callable(load):
                load()

    def default_model(self) -> str:
        """Which model a request without one gets; empty where there is none at all."""
        return self.settings().default_model or next(iter(self.models()), "")

    def engine_of(self, model: str) -> Engine | None:
        """The current app's engine for *model*, made at its first use; None without one."""
        return self._registry.engine_of(model, self._state(get_current_app()).engines)

    def _state(self, app: Flask) -> _AppState:
        try:
            return self._states[app]
        except KeyError:
            raise ConfigurationError(
                "This LLMStream is not initialised for the current app. "
                "Call llm.init_app(app) where the app is made."
            ) from None


def get_current_app() -> Flask:
    """
    The app of the current context.

    Raises:
        ConfigurationError: There is none.
    """
    if not current_app:
        raise ConfigurationError(
            "There is no current app. Call this in a request, or under app.app_context()."
        )
    return current_app._get_current_object()  # type: ignore[attr-defined, no-any-return]
