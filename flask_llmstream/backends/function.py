"""A function as a backend."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError
from ..typing import FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..core.messages import InferenceRequest
    from ..typing import WorkerKind

__all__ = ["FunctionBackend", "check_synchronous"]


def check_synchronous(function: Any) -> None:
    """
    Refuse what would return a coroutine that nobody awaits.

    Raises:
        ConfigurationError: *function* is asynchronous.
    """
    for each in (function, getattr(function, "__call__", None)):  # noqa: B004 - looked at, not asked
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            raise ConfigurationError(
                f"{getattr(each, '__qualname__', repr(each))} is asynchronous. A backend runs on "
                "a thread or a greenlet: make it a plain generator function, and give it "
                'worker="greenlet" if it waits on sockets.'
            )


class FunctionBackend:
    """
    Generates by calling *function*, whose result is what `Backend.generate` may return.

    Args:
        function: Usually a generator function; not an asynchronous one.
        worker: Where it runs; see `Backend`.
        supports: What requests may ask of it; None leaves it unsaid. See `Backend`.

    Raises:
        ConfigurationError: *function* is asynchronous, or nothing that can be called; or
            *supports* names what is neither one of `FEATURES` nor ``extra_body``.
    """

    def __init__(
        self,
        function: Callable[[InferenceRequest], Any],
        *,
        worker: WorkerKind = "thread",
        supports: Iterable[str] | None = None,
    ) -> None:
        name = getattr(function, "__qualname__", repr(function))
        if not callable(function):
            raise ConfigurationError(f"{name} is no backend: it cannot be called.")
        check_synchronous(function)
        # Itself, not through a method: no frame of ours between the worker and its tokens.
        self.generate = function
        self.worker = worker
        if supports is not None:
            self.supports = frozenset(supports)
            known = FEATURES | {"extra_body"}
            if not self.supports <= known:  # Also a string, which is a set of letters.
                raise ConfigurationError(
                    f"supports must be a list of {', '.join(sorted(known))}, not {supports!r}."
                )
        self.__name__ = name

    def __repr__(self) -> str:
        return f"<FunctionBackend {self.__name__}>"
