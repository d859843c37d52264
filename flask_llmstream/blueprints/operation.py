"""What a route says of itself to who describes the API: its body, its answers, its query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ..framing import JSON

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..framing import Framing
    from ..typing import Dialect

__all__ = ["Operation", "describe", "operation_of"]

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "llmstream_operation"


@dataclass(frozen=True, slots=True)
class Operation:
    """
    One route.

    Args:
        body: The type that the body is read as; None where there is no body.
        framings: What an answer can be framed as; `Accept` chooses.
        query: The query's parameters, with their JSON schemas.
        answers: The statuses that are no errors of the package, with what they mean.
    """

    body: type | None = None
    framings: Sequence[Framing] = (JSON,)
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    answers: Mapping[int, str] = field(default_factory=lambda: {200: "The answer."})


def describe(dialect: Dialect | None = None, **fields: Any) -> Callable[[F], F]:
    """
    Decorate a view with its `Operation`; the first line of its docstring is the summary.

    Args:
        dialect: Gives `body`, its ``body_type``, and `framings`.
        fields: Of the `Operation`.
    """
    if dialect is not None:
        body = getattr(dialect, "body_type", None)
        fields = {"body": body, "framings": dialect.framings, **fields}
    operation = Operation(**fields)

    def attach(view: F) -> F:
        setattr(view, _ATTRIBUTE, operation)
        return view

    return attach


def operation_of(view: Callable[..., Any]) -> Operation:
    """What *view* says of itself; without a word, that it answers with JSON."""
    operation: Operation = getattr(view, _ATTRIBUTE, Operation())
    return operation
