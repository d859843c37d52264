"""Several takes of a figure, and what a target says of them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """
    A line of the results.

    Attributes:
        is_hit: None where there is no target.
    """

    what: str
    measured: str
    target: str = ""
    is_hit: bool | None = None

    @property
    def verdict(self):
        return {None: "", True: "hit", False: "missed"}[self.is_hit]


def number(value):
    """Three digits, or as many as it has."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{decimals}f}"


def spread(values, unit=""):
    """The median, and from what to what."""
    text = number(median(values))
    if len(values) > 1:
        text += f" ({number(min(values))} to {number(max(values))})"
    return f"{text} {unit}".strip()


def at_most(what, values, target, unit=""):
    return Row(what, spread(values, unit), f"≤ {target:g} {unit}".strip(), median(values) <= target)


def at_least(what, values, target, unit=""):
    return Row(what, spread(values, unit), f"≥ {target:g} {unit}".strip(), median(values) >= target)


def only(what, values, unit=""):
    """Without a target."""
    return Row(what, spread(values, unit))


def by_round(runs, field, **of):
    """*field* of the runs with these properties, by round."""
    return {
        run["round"]: run[field]
        for run in runs
        if field in run and all(run.get(name) == value for name, value in of.items())
    }


def ratios(above, below):
    """Of two figures by round, round by round."""
    return [above[each] / below[each] for each in above if below.get(each)]
