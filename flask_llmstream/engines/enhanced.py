"""One engine for several models: routing, load balancing, deduplication, batches."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import replace
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..core import runtime
from ..core.deadlines import Deadline
from ..core.messages import InferenceRequest
from ..exceptions import ConfigurationError, EngineClosedError, UnknownModelError
from ..typing import ANYONE
from .admission import QueueShares
from .asynchronous import AsyncInferenceEngine
from .balancing import BalancedBackend, LoadBalanceStrategy
from .batching import BatchLimits
from .dedup import Deduplicator, dedup_key
from .ledger import TOTALS, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..core.messages import InferenceResponse
    from ..exceptions import LLMStreamError
    from ..typing import TokenCallback
    from .handle import InferenceHandle

__all__ = ["InferenceEngineEnhanced"]

_PREWARM_PRIORITY = -1
"""Below what callers have by default: they go first."""


class InferenceEngineEnhanced:
    """
    Runs requests for several models, each on an `AsyncInferenceEngine` of its own.

    Identical non-streaming requests that come while one of them is under way run once;
    complete answers are remembered for a while. Streams are neither.

    Args:
        dedup_size: Answers to remember, over all models; 0 none.
        dedup_ttl_seconds: How long an answer is good.
        max_batch_size: Requests that a backend with ``generate_batch`` is given at a time;
            1 never batches.
        max_tokens_per_batch: Estimated tokens of a batch, prompts and answers together.
        batch_timeout_seconds: How long an incomplete batch waits for more.
        queue_size: Requests that may wait for each model, ≥ 0.
        worker_threads: Requests worked on at a time for each model, ≥ 1.
        load_balance: Which of a model's backends is next.
        identity_queue_share: See `AsyncInferenceEngine`.

    Raises:
        ConfigurationError: A value is out of range.

    Thread safety: every method, from any thread or greenlet. In a forked child it starts
    empty, with the same models.
    """

    def __init__(
        self,
        *,
        dedup_size: int = 1000,
        dedup_ttl_seconds: float = 60.0,
        max_batch_size: int = 8,
        max_tokens_per_batch: int = 8192,
        batch_timeout_seconds: float = 0.005,
        queue_size: int = 1000,
        worker_threads: int = 4,
        load_balance: LoadBalanceStrategy | str = LoadBalanceStrategy.LEAST_LOADED,
        identity_queue_share: float = 1.0,
    ) -> None:
        for name, value, least in (
            ("dedup_size", dedup_size, 0),
            ("dedup_ttl_seconds", dedup_ttl_seconds, 0),
            ("max_batch_size", max_batch_size, 1),
            ("max_tokens_per_batch", max_tokens_per_batch, 1),
            ("batch_timeout_seconds", batch_timeout_seconds, 0),
            ("queue_size", queue_size, 0),
            ("worker_threads", worker_threads, 1),
        ):
            if value < least:
                raise ConfigurationError(f"{name} must be at least {least}, not {value!r}.")
        QueueShares(identity_queue_share, queue_size)  # Now, and not with the first model.
        self._load_balance = LoadBalanceStrategy(load_balance)
        self._engine_options: dict[str, Any] = {
            "queue_size": queue_size,
            "worker_threads": worker_threads,
            "identity_queue_share": identity_queue_share,
        }
        if max_batch_size > 1:
            self._engine_options["batch_limits"] = BatchLimits(
                max_batch_size, max_tokens_per_batch, batch_timeout_seconds
            )
        self._dedup = Deduplicator(size=dedup_size, ttl_seconds=dedup_ttl_seconds)
        self._engines: dict[str, AsyncInferenceEngine] = {}
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        # Guards everything below, and the engines.
        self._lock = runtime.allocate_lock()
        self._leaving: set[AsyncInferenceEngine] = set()  # Of unregistered models.
        self._left_totals: Counter[str] = Counter()
        self._left_figures: dict[str, dict[str, Any]] = {}  # By model.
        self._refusal: EngineClosedError | None = None
        self._is_started = False

    # Models.

    def register_model(self, model_id: str, backend: Any) -> None:
        """
        Serve *model_id* with *backend*, too: several backends of one model are balanced.

        Raises:
            ConfigurationError: It is no backend, or does not go with the model's others.
        """
        if not isinstance(model_id, str) or not model_id:
            raise ConfigurationError(f"A model id must be a non-empty string, not {model_id!r}.")
        fresh = AsyncInferenceEngine(
            BalancedBackend([backend], strategy=self._load_balance), **self._engine_options
        )
        with self._lock:
            engine = self._engines.setdefault(model_id, fresh)
            refusal = self._refusal
        if engine is not fresh:
            engine.backend.add(backend)
            engine.backend_changed()
        elif refusal is not None:
            engine.refuse(refusal)

    def unregister_model(self, model_id: str) -> None:
        """
        Serve *model_id* no more. What is pending is finished; nothing is remembered.

        Raises:
            UnknownModelError: There is no such model.
        """
        with self._lock:
            engine = self._engines.pop(model_id, None)
            if engine is not None:
                self._leaving.add(engine)
        if engine is None:
            raise self._unknown(model_id)
        engine.refuse(EngineClosedError(f"The model {model_id!r} was unregistered."))
        # Its backend may come back under this id with other weights.
        self._dedup.clear()
        runtime.start_thread(partial(self._see_off, engine))

    def _see_off(self, engine: AsyncInferenceEngine) -> None:
        engine.shutdown(timeout_seconds=None)
        stats, figures = engine.worker_stats(), engine.request_stats()
        with self._lock:
            self._leaving.discard(engine)
            self._left_totals.update({name: stats[name] for name in TOTALS})
            self._left_figures = merge((self._left_figures, figures))

    def available_models(self) -> list[str]:
        """The ids of all models, in the order of their registration."""
        with self._lock:
            return list(self._engines)

    def backend_for(self, model: str) -> BalancedBackend:
        """
        What generates for *model*.

        Raises:
            UnknownModelError: There is no such model.
        """
        backend: BalancedBackend = self._engine_for(model)[1].backend
        return backend

    def _engine_for(self, model: str) -> tuple[str, AsyncInferenceEngine]:
        with self._lock:
            if not model and len(self._engines) == 1:
                return next(iter(self._engines.items()))
            engine = self._engines.get(model)
        if engine is None:
            raise self._unknown(model)
        return model, engine

    def _unknown(self, model: str) -> UnknownModelError:
        available = ", ".join(map(repr, self.available_models())) or "none"
        problem = f"There is no model {model!r}" if model else "The request names no model"
        return UnknownModelError(f"{problem}. Available: {available}.", param="model")

    # Submitting.

    def submit(
        self,
        request: InferenceRequest,
        *,
        allow_caching: bool = True,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> InferenceHandle:
        """
        Queue *request*. With a `stream_callback` of its own it is a stream.

        Args:
            request: Stays as it is; a copy runs. Without a model it gets the only one.
            allow_caching: False has it run on its own, and not remembered.
            priority: Higher is sooner; 0 takes the request's own.
            timeout_seconds: Total budget from now; the request's deadline counts too.

        Raises:
            UnknownModelError: The model is not registered.
            QueueFullError: The deadline passed before the model's queue had a place.
            DeadlineExceededError: The budget is spent already.
            EngineClosedError: The engine is shut down, or all the model's workers are stuck.
        """
        engine, request = self._prepare(request, timeout_seconds)
        is_stream = request.stream or request.stream_callback is not None
        key = dedup_key(request) if allow_caching and not is_stream else None
        if key is None:
            return engine.submit(request, priority=priority)
        return self._dedup.submit(engine, key, request, priority=priority or request.priority)

    def submit_streaming(
        self,
        request: InferenceRequest,
        token_callback: TokenCallback,
        *,
        allow_caching: bool = True,  # noqa: ARG002 - as in the rest of the family
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> InferenceHandle:
        """
        Queue *request*; *token_callback* gets choice 0's text as it is produced, on the
        producing worker, and ``("", True)`` exactly once, last. See `submit`.

        A stream is neither shared nor remembered, whatever *allow_caching* says.
        """
        engine, request = self._prepare(request, timeout_seconds)
        return engine.submit_streaming(request, token_callback, priority=priority)

    def submit_async(
        self,
        request: InferenceRequest,
        callback: Callable[[InferenceResponse | LLMStreamError], Any],
        *,
        allow_caching: bool = True,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> str:
        """
        Queue *request*; *callback* gets the answer or the error, once, on a thread of
        its own kind. See `submit`.

        Returns:
            The request id, for `cancel`.
        """
        handle = self.submit(
            request,
            allow_caching=allow_caching,
            priority=priority,
            timeout_seconds=timeout_seconds,
        )
        handle.deliver(callback)
        return handle.request_id

    def _prepare(
        self, request: InferenceRequest, timeout_seconds: float | None
    ) -> tuple[AsyncInferenceEngine, InferenceRequest]:
        """Who runs *request*, and a copy with its model and its deadline."""
        if self._refusal is not None:
            raise copy(self._refusal)
        model, engine = self._engine_for(request.model)
        deadline = request.deadline
        if timeout_seconds is not None:
            deadline = min(deadline or Deadline(inf), Deadline.after(timeout_seconds))
        self._is_started = True
        return engine, replace(request, model=model, deadline=deadline)

    def prewarm_cache(
        self, prompts: Iterable[str | InferenceRequest], *, model: str | None = None
    ) -> list[InferenceHandle]:
        """
        Have the answers to *prompts* ready, after those whom others wait for.

        Args:
            prompts: Texts, or whole requests: only what is identical is found again, so a
                request has messages, sampling fields and identity as its callers will.
            model: For those that name none.

        Returns:
            Their handles, for who wants to wait.

        Raises:
            LLMStreamError: As `submit`, at the first that is refused.
        """
        handles = []
        for prompt in prompts:
            request = InferenceRequest(prompt=prompt) if isinstance(prompt, str) else prompt
            request = replace(request, model=request.model or model or "")
            handles.append(self.submit(request, priority=_PREWARM_PRIORITY))
        return handles

    def clear_cache(self) -> None:
        """Forget every answer. What runs now is neither joined by others nor remembered."""
        self._dedup.clear()

    # Looking and steering.

    def cancel(self, request_id: str, *, identity: Any = ANYONE) -> bool:
        """
        End every live request with this id and *identity*; False where there is none. A
        run that others wait for, too, goes on for them.
        """
        ended = [engine.cancel(request_id, identity=identity) for engine in self._all_engines()]
        return self._dedup.cancel(request_id, identity=identity) or any(ended)

    def reprioritize(self, request_id: str, priority: int) -> bool:
        """
        Move a waiting request; False where none with this id waits. A run that several
        wait for has the highest of their priorities.
        """
        moved = [engine.reprioritize(request_id, priority) for engine in self._all_engines()]
        return self._dedup.reprioritize(request_id, priority) or any(moved)

    def _all_engines(self) -> list[AsyncInferenceEngine]:
        with self._lock:
            return [*self._engines.values(), *self._leaving]

    def queue_stats(self) -> dict[str, Any]:
        """Sums over all models of `AsyncInferenceEngine.queue_stats`."""
        names = ("waiting", "running", "blocked", "queue_size")
        return self._sum(names, [engine.queue_stats() for engine in self._all_engines()])

    def worker_stats(self) -> dict[str, Any]:
        """Sums over all models of `AsyncInferenceEngine.worker_stats`."""
        names = ("busy", "stuck", "capacity")
        return self._sum(names, [engine.worker_stats() for engine in self._all_engines()])

    def _sum(self, names: Iterable[str], stats: list[dict[str, Any]]) -> dict[str, Any]:
        """Totals never fall: those of models that are gone still count."""
        with self._lock:
            sums = Counter({name: self._left_totals[name] for name in TOTALS})
        for each in stats:
            sums.update(each)
        return {name: sums[name] for name in (*names, *TOTALS)}

    def request_stats(self) -> dict[str, dict[str, Any]]:
        """
        What became of the requests, by model; see `LLMStream.stats` for the figures. A
        caller whom the cache served, or another one's run, is counted as that alone.
        """
        with self._lock:
            left = self._left_figures
            engines = [*self._engines.values(), *self._leaving]
        return merge(
            (left, self._dedup.request_stats(), *(engine.request_stats() for engine in engines))
        )

    def count_refusal(self, request: InferenceRequest, error: LLMStreamError) -> None:
        """Somebody refused *request* on this engine's behalf, with *error*."""
        self._engine_for(request.model)[1].count_refusal(request, error)

    def statistics(self) -> dict[str, Any]:
        """
        `queue_stats` and `worker_stats`; ``cache_size``, ``cache_hits``, ``cache_misses``,
        ``joined`` (callers who waited for another one's run) and ``in_flight`` (runs that
        may be joined); and for each of the ``models`` its queue and its ``backends``.

        Totals count runs: a caller whom the cache or another one's run served is none.
        """
        with self._lock:
            engines = dict(self._engines)
        return {
            **self.queue_stats(),
            **self.worker_stats(),
            **self._dedup.statistics(),
            "models": {
                model: {**engine.queue_stats(), "backends": engine.backend.statistics()}
                for model, engine in engines.items()
            },
        }

    @property
    def is_available(self) -> bool:
        """Whether `submit` would take a request for any model, a full queue aside."""
        return self._refusal is None and any(engine.is_available for engine in self._all_engines())

    # Coming and going.

    @property
    def is_running(self) -> bool:
        """Started, by `start` or by the first request, and not shut down."""
        return self._is_started and self._refusal is None

    def start(self) -> None:
        """
        Be running. Workers are made with the first request, which starts it as well.

        Raises:
            EngineClosedError: It was shut down.
        """
        if self._refusal is not None:
            raise copy(self._refusal)
        self._is_started = True

    def wait_for_completion(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing waits or runs; False where the time ran out first."""
        until = inf if timeout_seconds is None else monotonic() + timeout_seconds
        return all(engine.wait_for_completion(_remaining(until)) for engine in self._all_engines())

    def refuse(self, error: EngineClosedError) -> None:
        """Take no more requests, for *error*; what is pending goes on."""
        with self._lock:
            self._refusal = self._refusal or error
        for engine in self._all_engines():
            engine.refuse(error)

    def end_all(self, error: LLMStreamError) -> None:
        """End everything pending, with *error*."""
        for engine in self._all_engines():
            engine.end_all(error)

    def shutdown(self, *, timeout_seconds: float | None = 30.0) -> None:
        """
        Refuse new requests, finish what is pending, then end the rest.

        Args:
            timeout_seconds: How long to finish; what is left gets EngineClosedError.
        """
        self.refuse(EngineClosedError("The engine is shut down."))
        until = inf if timeout_seconds is None else monotonic() + timeout_seconds
        for engine in self._all_engines():
            engine.shutdown(timeout_seconds=_remaining(until))


def _remaining(until: float) -> float | None:
    return None if until == inf else max(0.0, until - monotonic())
