"""The ways of the clients to ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from .scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .dialects import Dialect


@dataclass(frozen=True)
class Reader:
    """
    One way of one client to ask.

    Args:
        name: The client's and the way's.
        read: Does a `Job`, and notes in a `Reading` what the client gives. None for a
            client in another process, which finds it by the name.
        streams: Whether it asks for a stream.
        untold: What the client keeps to itself though the dialect says it.
    """

    name: str
    dialect: Dialect
    read: Callable | None = None
    streams: bool = True
    untold: frozenset[str] = frozenset()

    def expects(self, scenario):
        """What it is to read; None where the scenario is not for it."""
        answer = scenario.streamed if self.streams else scenario.whole
        if answer is None or not scenario.needs <= self.dialect.has:
            return None
        return self.tells(answer)

    def tells(self, answer):
        """*answer* without what it cannot know."""
        return answer.without(self.dialect.untold | self.untold)


def cases(readers):
    """Parameters for a test of `reader` and `scenario`."""
    return [
        pytest.param(reader, scenario, id=f"{reader.name}-{scenario.name}".replace(" ", "_"))
        for reader in readers
        for scenario in SCENARIOS
        if reader.expects(scenario) is not None
    ]
