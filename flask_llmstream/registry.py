"""Which models there are, and what serves each of them, app by app."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from .backends.function import check_synchronous
from .config import model_ids
from .core import runtime
from .engines.asynchronous import AsyncInferenceEngine
from .engines.balancing import BalancedBackend
from .engines.counting import CountingBackend
from .engines.ledger import merge
from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .config import Settings
    from .typing import Engine

__all__ = ["AppEngines", "ModelRegistry"]

_GREENLETS = 1000
"""How many requests a greenlet backend works on at a time: they wait, and cost little."""


@dataclass(slots=True)
class _Registration:
    """The backends under one model id, and the options of the engine before them."""

    backends: list[Any]
    options: dict[str, Any]


@dataclass(eq=False)
class AppEngines:
    """
    One app's engines, by model; made at their first use.

    Attributes:
        settings: The app's.
        counters: Those that count tokens, by model.
        made: Those that belong to this app alone.
    """

    settings: Settings
    by_model: dict[str, Engine] = field(default_factory=dict)
    counters: dict[str, Engine] = field(default_factory=dict)
    made: list[AsyncInferenceEngine] = field(default_factory=list)
    lock: Any = field(default_factory=runtime.allocate_lock)  # Guards both.

    def all(self) -> tuple[Engine, ...]:
        """All that were used so far."""
        return (*self.by_model.values(), *self.counters.values())

    def request_stats(self) -> dict[str, dict[str, Any]]:
        """What became of the requests, by model, as far as the engines tell."""
        tellers = [
            getattr(engine, "request_stats", None)
            for engine in dict.fromkeys(tuple(self.by_model.values()))
        ]
        return merge(tell() for tell in tellers if tell is not None)

    def let_go(self) -> None:
        """The app is gone. On whatever thread the collector runs, so it only asks."""
        for engine in self.made:
            runtime.run_detached(partial(engine.shutdown, timeout_seconds=0))


class ModelRegistry:
    """
    What `LLMStream` serves under which id: backends, from which every app gets engines of
    its own, or engines that apps share.

    Thread safety: registration from one thread, while the app is set up; the rest from any
    thread or greenlet.
    """

    def __init__(self) -> None:
        self._owners: dict[str, _Registration | Engine] = {}
        self._apps: WeakSet[AppEngines] = WeakSet()

    def add_app(self, settings: Settings) -> AppEngines:
        """A new app's engines: none yet."""
        engines = AppEngines(settings)
        self._apps.add(engines)
        return engines

    def add_backend(self, model: str, backend: Any, options: dict[str, Any]) -> None:
        """See `LLMStream.add_backend`."""
        self.check_is_free(model)
        if isinstance(backend, type):
            raise ConfigurationError(
                f"{backend.__name__} is a class. Give an object: {backend.__name__}(…)."
            )
        for name in ("generate", "submit"):
            check_synchronous(getattr(backend, name, None))
        AsyncInferenceEngine(backend, **options)  # Now, where the mistake is, not later.
        known = self._owners.get(model)
        if not isinstance(known, _Registration):
            self._owners[model] = _Registration([backend], options)
            return
        BalancedBackend([*known.backends, backend])
        known.backends.append(backend)
        known.options.update(options)

    def add_engine(self, engine: Engine, models: Iterable[str]) -> None:
        """See `LLMStream.add_engine`."""
        models = model_ids(models)
        for model in models:
            self.check_is_free(model)
            if model in self._owners:
                raise ConfigurationError(f"The model {model!r} has a backend already.")
        for model in models:
            self._owners[model] = engine
            for engines in self._apps:
                engines.by_model[model] = engine

    def check_is_free(self, model: str) -> None:
        """
        Whether a backend may be registered under *model*.

        Raises:
            ConfigurationError: It is no id, has an engine, or was asked for already.
        """
        if not isinstance(model, str) or not model:
            raise ConfigurationError(f"A model id must be a non-empty string, not {model!r}.")
        owner = self._owners.get(model)
        if not (owner is None or isinstance(owner, _Registration)):
            raise ConfigurationError(f"The model {model!r} has an engine already.")
        if any(model in engines.by_model for engines in self._apps):
            raise ConfigurationError(
                f"The model {model!r} is in use already. Register its backends before "
                "the first request."
            )

    def __contains__(self, model: str) -> bool:
        """Whether *model* was registered, not only listed by an upstream."""
        return model in self._owners

    def models(self) -> list[str]:
        """All ids, in the order of their registration; then what upstreams list beside them."""
        return list(self._owners | self._discovered())

    def _discovered(self) -> dict[str, _Registration]:
        """What upstreams list that has no registration of its own, as if it had one."""
        found: dict[str, _Registration] = {}
        for owner in self._owners.values():
            if not isinstance(owner, _Registration):
                continue
            for backend in owner.backends:
                for model in getattr(backend, "discovered", ()):
                    if model not in self._owners:
                        listed = found.setdefault(model, _Registration([], owner.options))
                        listed.backends.append(backend)
        return found

    def engine_of(self, model: str, engines: AppEngines) -> Engine | None:
        """The engine for *model* among an app's *engines*; None where there is no such model."""
        engine = engines.by_model.get(model)
        owner = self._owners.get(model)
        if owner is None:
            owner = self._discovered().get(model)
            if isinstance(engine, AsyncInferenceEngine) and owner is not None:
                _keep_up(engine, owner.backends)
        if engine is not None or owner is None:
            return engine
        if isinstance(owner, _Registration):
            made = _make_engine(owner, engines.settings)
            engines.made.append(made)
            owner = made
        with engines.lock:
            return engines.by_model.setdefault(model, owner)

    def counter_of(self, model: str, engine: Engine, engines: AppEngines) -> Engine:
        """What counts tokens for *model*, whose *engine* has a backend that can."""
        counter = engines.counters.get(model)
        if counter is not None:
            return counter
        made = _make_counter(engine, model, engines.settings)
        engines.made.append(made)
        with engines.lock:
            return engines.counters.setdefault(model, made)


def _keep_up(engine: AsyncInferenceEngine, backends: list[Any]) -> None:
    """Balance *engine* also over those of *backends* that list its model since lately."""
    new = [backend for backend in backends if backend not in engine.backend.backends]
    for backend in new:
        engine.backend.add(backend)
    if new:
        engine.backend_changed()


def _make_engine(registration: _Registration, settings: Settings) -> AsyncInferenceEngine:
    backends = registration.backends
    is_alone = len(backends) == 1 and not getattr(backends[0], "fails_over", False)
    backend = backends[0] if is_alone else BalancedBackend(backends)
    is_greenlet = getattr(backend, "worker", "thread") == "greenlet"
    defaults = {
        "worker_threads": _GREENLETS if is_greenlet else settings.worker_threads,
        **_admission(settings),
    }
    return AsyncInferenceEngine(backend, **{**defaults, **registration.options})


def _make_counter(engine: Engine, model: str, settings: Settings) -> AsyncInferenceEngine:
    backend = CountingBackend(engine, model)
    # One thread: it takes milliseconds, and with llama.cpp a slot that answers need.
    workers = _GREENLETS if backend.worker == "greenlet" else 1
    return AsyncInferenceEngine(backend, worker_threads=workers, **_admission(settings))


def _admission(settings: Settings) -> dict[str, Any]:
    return {
        "queue_size": settings.queue_size,
        "backpressure": settings.backpressure,
        "block_timeout_seconds": settings.block_timeout_seconds,
        "identity_queue_share": settings.identity_queue_share,
        "stuck_seconds": settings.stuck_seconds,
    }
