"""The extension: backends on one side, Flask responses on the other."""

from __future__ import annotations

import os
import sysconfig
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from flask import Flask, Response, current_app

from .admitting import Admission
from .answering import Answer, complete, count
from .backends.function import FunctionBackend
from .call import Call
from .config import Settings
from .dialects import NativeDialect, Parsed
from .dialects.answer_ids import request_ids_of
from .engines.callers import Callers
from .engines.ledger import add_up, new_figures
from .errors import respond_to
from .exceptions import (
    ConfigurationError,
    EngineClosedError,
    InvalidRequestError,
    LLMStreamError,
    UnknownModelError,
)
from .framing import negotiate
from .recording import Recordings
from .registry import AppEngines, ModelRegistry
from .shutdown import ShutdownWatch
from .stores import MemoryStore
from .tokens import TokenIterator

if TYPE_CHECKING:
    from flask import Blueprint

    from .call import Admitted
    from .core.messages import InferenceRequest, InferenceResponse
    from .framing import Framing
    from .responses import Outcome
    from .typing import Dialect, Engine, Store, WorkerKind

__all__ = ["LLMStream", "extensions"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class _AppState:
    """What belongs to one app."""

    engines: AppEngines
    recordings: Recordings
    shutdown_watch: ShutdownWatch
    request_ids: dict[str, str] = field(default_factory=dict)
    callers: Callers = field(default_factory=Callers)


class LLMStream:
    """
    Streams tokens from a Flask app.

    Register backends with `backend`, `add_backend` or `add_engine`, before or after
    `init_app`; then `stream`, `complete` or `tokens` in a view, or a dialect's blueprint.
    Engines start with the first request, in the process that serves it.

    Args:
        app: Initialised at once, where it is given.
        store: Keeps the events of streams that can be resumed; None is a `MemoryStore` for
            each app, of ``LLMSTREAM_RESUME_BYTES``.

    Raises:
        ConfigurationError: The interpreter is a free-threaded build, which the hand-off
            between threads is not proven on.

    Thread safety: registration while the app is set up, from one thread; everything else
    from any thread or greenlet.
    """

    def __init__(self, app: Flask | None = None, *, store: Store | None = None) -> None:
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            raise ConfigurationError(
                "flask_llmstream is not proven on free-threaded Python yet. "
                "Use the regular build of the same version."
            )
        self._store = store
        self._registry = ModelRegistry()
        self._states: weakref.WeakKeyDictionary[Flask, _AppState] = weakref.WeakKeyDictionary()
        self._admission = Admission(self._registry)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """
        Set up *app*: check its ``LLMSTREAM_…`` settings, and answer errors as JSON.

        Raises:
            ConfigurationError: A setting is wrong, or *app* has an extension already.
        """
        if "llmstream" in app.extensions:
            raise ConfigurationError(
                "This app has an LLMStream already. Use one for all models, "
                'or find it in app.extensions["llmstream"].'
            )
        settings = Settings.from_config(app.config)
        engines = self._registry.add_app(settings)
        self._states[app] = _AppState(
            engines,
            Recordings(self._store or MemoryStore(max_bytes=settings.resume_bytes)),
            ShutdownWatch(engines.all, settings.shutdown_grace_seconds),
        )
        # A test suite makes an app a test: their threads must not pile up.
        weakref.finalize(app, engines.let_go).atexit = False
        _extensions.add(self)
        app.extensions["llmstream"] = self
        app.register_error_handler(LLMStreamError, respond_to(NativeDialect().error_document))

    # Registering.

    def backend(
        self,
        model: str,
        *,
        worker: WorkerKind = "thread",
        supports: Iterable[str] | None = None,
        **options: Any,
    ) -> Callable[[F], F]:
        """
        Serve *model* with the decorated function, usually a generator.

        Args:
            model: The id that requests name.
            worker: ``"greenlet"`` for what waits on sockets.
            supports: `FEATURES` that requests may ask for; None: see `Backend`.
            options: As for `add_backend`.

        Raises:
            ConfigurationError: As `add_backend`; or the function is asynchronous.
        """
        self._registry.check_is_free(model)  # Now: ``@llm.backend`` alone passes the function.

        def register(function: F) -> F:
            self.add_backend(
                model, FunctionBackend(function, worker=worker, supports=supports), **options
            )
            return function

        return register

    def add_backend(self, model: str, backend: Any, **options: Any) -> None:
        """
        Serve *model* with *backend*; several under one id are balanced.

        Args:
            model: The id that requests name.
            backend: A `Backend` or `CallbackBackend`.
            options: Of `AsyncInferenceEngine`. `worker_threads`, `queue_size`,
                `backpressure`, `block_timeout_seconds`, `identity_queue_share` and
                `stuck_seconds` come from the app's config where they are not given; a
                greenlet backend works on 1000 requests at a time.

        Raises:
            ConfigurationError: An option is wrong, *backend* is none, or *model* is taken
                by an engine or in use already.
        """
        self._registry.add_backend(model, backend, options)

    def add_engine(self, engine: Engine, *, models: Iterable[str]) -> None:
        """
        Serve *models* with *engine*, which several apps may share.

        Raises:
            ConfigurationError: A model is taken.
        """
        self._registry.add_engine(engine, models)

    def identity_loader(self, function: F) -> F:
        """Decorate what tells who asks, in the request: () → identity or None."""
        self._admission.identity_loader = function
        return function

    def before_submit(self, function: F) -> F:
        """Decorate what completes a request: (InferenceRequest) → InferenceRequest."""
        self._admission.before_submit.append(function)
        return function

    def permission_check(self, function: F) -> F:
        """
        Decorate what may refuse a request: (identity, InferenceRequest) → None.

        It raises PermissionDeniedError; to return False means the same, so that a check
        which forgets to raise lets nobody in.
        """
        self._admission.permission_checks.append(function)
        return function

    # Blueprints.

    def openai_blueprint(
        self, *, name: str = "openai", models: Iterable[str] | None = None, **settings: Any
    ) -> Blueprint:
        """
        OpenAI's chat completions, completions, responses and models, under ``/v1`` unless
        registered elsewhere.

        Args:
            name: Of the blueprint; each one registered on an app needs its own.
            models: Which models it offers; None is all.
            settings: Put over the app's, by their names in lower case: `deadline_seconds`,
                `api_keys`, `max_tokens_limit`, …

        Raises:
            ConfigurationError: There is no such setting, or its value is wrong.
        """
        from .blueprints.openai import openai_blueprint

        return openai_blueprint(self, name=name, models=models, settings=settings)

    def ai_sdk_blueprint(
        self, *, name: str = "ai_sdk", models: Iterable[str] | None = None, **settings: Any
    ) -> Blueprint:
        """
        The Vercel AI SDK's UI message stream, for pages with `useChat`: under ``/api/ai``
        unless registered elsewhere.

        The prefix itself is the route: ``new DefaultChatTransport({api: "/api/ai"})``. With
        ``url_prefix="/api/chat"`` a page needs no transport at all: that is where `useChat`
        posts by default (and where Ollama's clients do). `TextStreamChatTransport` needs
        ``headers: {Accept: "text/plain"}``.

        Model, tools and sampling go into the transport's ``body``; tools run in the page.
        Usage is in a message's `metadata`. An error before the first token has a status,
        and its JSON (`errorText`, `code`) is what `useChat` has for its error's message.

        Args:
            name: Of the blueprint; each one registered on an app needs its own.
            models: Which models it offers; None is all.
            settings: Put over the app's, by their names in lower case.

        Raises:
            ConfigurationError: There is no such setting, or its value is wrong.
        """
        from .blueprints.ai_sdk import ai_sdk_blueprint

        return ai_sdk_blueprint(self, name=name, models=models, settings=settings)

    def ollama_blueprint(
        self, *, name: str = "ollama", models: Iterable[str] | None = None, **settings: Any
    ) -> Blueprint:
        """
        Ollama's chat, generate and models, under ``/api`` unless registered elsewhere.

        Ollama's clients take the address before ``/api`` for their host, and have
        ``/api`` built in.

        Args:
            name: Of the blueprint; each one registered on an app needs its own.
            models: Which models it offers; None is all.
            settings: Put over the app's, by their names in lower case.

        Raises:
            ConfigurationError: There is no such setting, or its value is wrong.
        """
        from .blueprints.ollama import ollama_blueprint

        return ollama_blueprint(self, name=name, models=models, settings=settings)

    def anthropic_blueprint(
        self, *, name: str = "anthropic", models: Iterable[str] | None = None, **settings: Any
    ) -> Blueprint:
        """
        Anthropic's messages and their token counts, under ``/v1`` unless registered
        elsewhere; beside the OpenAI blueprint, whose models have Anthropic's form for
        Anthropic's clients.

        Args:
            name: Of the blueprint; each one registered on an app needs its own.
            models: Which models it offers; None is all.
            settings: Put over the app's, by their names in lower case.

        Raises:
            ConfigurationError: There is no such setting, or its value is wrong.
        """
        from .blueprints.anthropic import anthropic_blueprint

        return anthropic_blueprint(self, name=name, models=models, settings=settings)

    def native_blueprint(
        self, *, name: str = "llmstream", models: Iterable[str] | None = None, **settings: Any
    ) -> Blueprint:
        """
        What `stream` answers, for a JSON body and without a view: ``POST /stream``, and
        ``DELETE /stream/<id>`` to end an answer. The prefix itself is the route.

        Args:
            name: Of the blueprint; each one registered on an app needs its own.
            models: Which models it offers; None is all.
            settings: Put over the app's, by their names in lower case.

        Raises:
            ConfigurationError: There is no such setting, or its value is wrong.
        """
        from .blueprints.native import native_blueprint

        return native_blueprint(self, name=name, models=models, settings=settings)

    def ops_blueprint(
        self,
        *,
        name: str = "llmstream_ops",
        api_keys: Mapping[str, str] | Sequence[str] | str | None = None,
    ) -> Blueprint:
        """
        ``/healthz`` and ``/readyz`` for everybody; ``/llmstream/stats``, which is `stats`,
        for who has a key.

        Args:
            name: Of the blueprint; each one registered on an app needs its own.
            api_keys: Of those who may see the figures; None is the app's ``API_KEYS``, and
                without any everybody may.

        Raises:
            ConfigurationError: A key is empty, or no string.
        """
        from .blueprints.ops import ops_blueprint

        return ops_blueprint(self, name=name, api_keys=api_keys)

    # Answering.

    def stream(
        self, request: InferenceRequest, *, on_finish: Callable[[Outcome], Any] | None = None
    ) -> Response:
        """
        The response of a view: *request*'s tokens as they are produced.

        `Accept` picks SSE (the default), NDJSON, plain text or one JSON document. It
        waits for the first token, so that what fails before it has a status of its own.

        Args:
            request: What to generate. It stays as it is; a copy is completed and submitted.
            on_finish: Called once with the `Outcome`, in an app context, when the
                response is over, also where the client left. Not for a request that was
                refused.

        Raises:
            LLMStreamError: The request was refused, or failed before its first token.
                Left alone, it is answered as JSON with its status.
        """
        call = self.call()
        return self.answer(call, NativeDialect(), Parsed(request), on_finish=on_finish)

    def complete(self, request: InferenceRequest) -> InferenceResponse:
        """
        The whole answer; waits for it.

        Raises:
            LLMStreamError: The request was refused, or failed.
        """
        call = self.call()
        budgets = call.budgets(streams=False)
        return complete(call, [self.admit(call, request)], budgets)

    def tokens(self, request: InferenceRequest) -> TokenIterator:
        """
        The answer's text, token by token, for a view that makes a response of its own.

        The request is submitted at once; closing or dropping the iterator cancels it.

        Raises:
            LLMStreamError: The request was refused.
        """
        call = self.call()
        budgets = call.budgets(streams=True)
        submission, reception = call.receive([self.admit(call, request)], budgets)
        iterator = TokenIterator(reception, call.connection, call.finisher(submission))
        call.unless_answered(iterator.close)
        return iterator

    # What blueprints are made of.

    def call(self, overrides: Mapping[str, Any] | None = None) -> Call:
        """The current use of the current app; *overrides* are a blueprint's settings."""
        app = _current_app()
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
        """The response to *parsed* in *dialect*, framed as `Accept` has it. See `stream`."""
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

    def stats(self) -> dict[str, Any]:
        """
        What the current app's engines do, and what became of all requests, in this process.

        Every accepted request is counted in one place, at any moment: ``accepted`` is
        ``queued`` + ``active`` and the sum of all ends. There are no texts in it.

        Returns:
            ``pid``; ``models``, figures by model id; and ``total``, their sum. Figures are

            - ``accepted``, ``queued`` and ``active``;
            - ends, as numbers: ``completed``, ``dropped`` (for a newer one) and
              ``slow_readers``;
            - ends, as dicts of numbers: ``cancelled`` by cause (see
              `RequestCancelledError`), ``timed_out`` by budget (``deadline_exceeded``,
              ``first_token_timeout``, ``idle_timeout``) and ``failed`` by the error's code,
              shutdowns among them;
            - who was not accepted: ``rejected``, by code, and ``blocked``, who waits for a
              place in a full queue;
            - who needed no run of its own: ``joined`` another one's, and ``cache_hits``.

            Counting the tokens of a prompt is no request here.
        """
        engines = self._state(_current_app()).engines
        models = {model: new_figures() for model in self.models()} | engines.request_stats()
        return {"pid": os.getpid(), "total": add_up(models.values()), "models": models}

    def settings(self) -> Settings:
        """The current app's."""
        return self._state(_current_app()).engines.settings

    def recordings(self) -> Recordings:
        """The current app's."""
        return self._state(_current_app()).recordings

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
        return self._registry.engine_of(model, self._state(_current_app()).engines)

    def _state(self, app: Flask) -> _AppState:
        try:
            return self._states[app]
        except KeyError:
            raise ConfigurationError(
                "This LLMStream is not initialised for the current app. "
                "Call llm.init_app(app) where the app is made."
            ) from None


_extensions: weakref.WeakSet[LLMStream] = weakref.WeakSet()


def extensions() -> list[tuple[LLMStream, Flask]]:
    """Every app of this process that was initialised, and its extension."""
    return [(llm, app) for llm in list(_extensions) for app in list(llm._states)]


def _current_app() -> Flask:
    if not current_app:
        raise ConfigurationError(
            "There is no current app. Call this in a request, or under app.app_context()."
        )
    return current_app._get_current_object()  # type: ignore[attr-defined, no-any-return]
