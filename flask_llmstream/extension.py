"""The extension: backends on one side, Flask responses on the other."""

from __future__ import annotations

import os
import sysconfig
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .answering import complete
from .backends.function import FunctionBackend
from .dialects import NativeDialect, Parsed
from .engines.ledger import add_up, new_figures
from .errors import respond_to
from .exceptions import ConfigurationError, LLMStreamError
from .service import Service, get_current_app
from .tokens import TokenIterator

if TYPE_CHECKING:
    from flask import Blueprint, Flask, Response

    from .core.messages import InferenceRequest, InferenceResponse
    from .outcome import Outcome
    from .typing import Engine, Store, WorkerKind

__all__ = ["LLMStream", "extensions"]

F = TypeVar("F", bound=Callable[..., Any])


class LLMStream(Service):
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
        super().__init__(store)
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
        self._add_app(app)
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

    # Looking.

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
        engines = self._state(get_current_app()).engines
        models = {model: new_figures() for model in self.models()} | engines.request_stats()
        return {"pid": os.getpid(), "total": add_up(models.values()), "models": models}


_extensions: weakref.WeakSet[LLMStream] = weakref.WeakSet()


def extensions() -> list[tuple[LLMStream, Flask]]:
    """Every app of this process that was initialised, and its extension."""
    return [(llm, app) for llm in list(_extensions) for app in list(llm._states)]
