"""Where each request of an engine stands, and how those that are over have ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from ..core.lifecycle import State, advance, name_after
from ..exceptions import SlowReaderError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..exceptions import LLMStreamError
    from .run import Run

__all__ = ["TOTALS", "Ledger", "add_up", "merge", "new_figures"]

TOTALS = ("total_submitted", *(f"total_{state.value}" for state in State if state.is_terminal))
"""What `Ledger.totals` names."""

_MOST_MODELS = 256
"""Models with figures of their own. Who submits to an engine may let clients make them up."""


class Ledger:
    """
    Counts requests by their model, their state, and the finer name of their end.

    A request is *moved* from one place to the next, so that at any moment it is in exactly
    one: what was accepted is what waits, what runs, and the sum of all ends.

    Thread safety: none of its own; the engine's lock guards it.
    """

    def __init__(self) -> None:
        self._places: Counter[tuple[str, State, str]] = Counter()
        self._models: set[str] = set()

    def open(self, run: Run) -> None:
        """A request came."""
        self._places[self._model_of(run.request.model), run.state, ""] += 1

    def move(self, run: Run, target: State, error: LLMStreamError | None = None) -> None:
        """*run* is in *target* now; for *error*, where that is an end."""
        state = advance(run.state, target)
        model = self._model_of(run.request.model)
        self._places[model, run.state, ""] -= 1
        self._places[model, state, name_after(error)] += 1
        run.state = state

    def refuse(self, model: str, error: LLMStreamError) -> None:
        """A request for *model* was refused before there was a run of it."""
        self._places[self._model_of(model), State.REJECTED, name_after(error)] += 1

    def _model_of(self, model: str) -> str:
        if model not in self._models:
            if len(self._models) >= _MOST_MODELS:
                return ""
            self._models.add(model)
        return model

    def copy(self) -> Ledger:
        """How it is now, to be read without the lock."""
        copy = Ledger()
        copy._places = self._places.copy()
        return copy

    def count(self, state: State) -> int:
        """How many requests are in *state*."""
        return sum(number for (_, each, _), number in self._places.items() if each is state)

    def totals(self) -> dict[str, int]:
        """How many came (``total_submitted``), and how many have ended in each state."""
        ended = {state.value: self.count(state) for state in State if state.is_terminal}
        return {
            "total_submitted": sum(self._places.values()),
            **{f"total_{name}": number for name, number in ended.items()},
        }

    def figures(self) -> dict[str, dict[str, Any]]:
        """By model, what `new_figures` names."""
        by_model: defaultdict[str, dict[str, Any]] = defaultdict(new_figures)
        for (model, state, name), number in self._places.items():
            figures = by_model[model]
            if state not in (State.SUBMITTED, State.REJECTED):
                figures["accepted"] += number
            if state is State.FAILED and name == SlowReaderError.code:
                figures["slow_readers"] += number
            elif state in _WITH_NAMES:
                figures[state.value][name] = number
            else:
                figures[_FIGURES[state]] += number
        return dict(by_model)


_WITH_NAMES = frozenset({State.CANCELLED, State.TIMED_OUT, State.FAILED, State.REJECTED})
_FIGURES = {
    State.SUBMITTED: "blocked",
    State.WAITING: "queued",
    State.RUNNING: "active",
    State.COMPLETED: "completed",
    State.DROPPED: "dropped",
}


def new_figures() -> dict[str, Any]:
    """The figures of no request at all: numbers, and numbers by the finer name of an end."""
    return {
        "accepted": 0,
        "queued": 0,
        "active": 0,
        "completed": 0,
        "cancelled": {},
        "timed_out": {},
        "dropped": 0,
        "slow_readers": 0,
        "failed": {},
        "rejected": {},
        "blocked": 0,
        "joined": 0,
        "cache_hits": 0,
    }


def add_up(several: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of *several* together."""
    total = new_figures()
    for figures in several:
        for name, value in figures.items():
            if isinstance(value, int):
                total[name] += value
            else:
                total[name] = dict(Counter(total[name]) + Counter(value))
    return total


def merge(several: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figures by model from *several* places, those of one model added up."""
    by_model: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in several:
        for model, figures in each.items():
            by_model[model].append(figures)
    return {model: add_up(figures) for model, figures in by_model.items()}
