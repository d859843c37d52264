"""
Prints which client reads what, as a Markdown table: ``python tests/clients/matrix.py``.

Arguments are pytest's (``-k node``). Exits as it does.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

PASSED, PARTLY, FAILED, SKIPPED, NONE = "✓", "(✓)", "✗", "skipped", ""


class Matrix:
    """A plugin that remembers the outcome of each reader and scenario."""

    def __init__(self):
        self._places = {}
        self._cells = {}
        self._untold = {}
        self._scenarios = []

    def pytest_collection_modifyitems(self, items):
        from clients.scenarios import SCENARIOS

        self._scenarios = [scenario.name for scenario in SCENARIOS]
        for item in items:
            parameters = getattr(item, "callspec", None) and item.callspec.params
            if parameters and "reader" in parameters:
                reader, scenario = parameters["reader"], parameters["scenario"]
                untold = reader.untold | reader.dialect.untold
                self._untold[reader.name] = untold
                place = (reader.name, scenario.name)
                self._places[item.nodeid] = (place, PARTLY if scenario.needs & untold else PASSED)

    def pytest_runtest_logreport(self, report):
        if report.nodeid not in self._places:
            return
        place, passed = self._places[report.nodeid]
        if report.failed:
            self._cells[place] = FAILED
        elif report.skipped:
            self._cells[place] = SKIPPED
        else:
            self._cells.setdefault(place, passed)

    def lines(self):
        """
        The table. A cell is empty where the scenario is not for the client, and in
        parentheses where the client keeps what it is about to itself.
        """
        scenarios = [name for name in self._scenarios if any(name == at[1] for at in self._cells)]
        yield self._row("client", [*scenarios, "cannot tell"])
        yield self._row("---", ["---"] * (len(scenarios) + 1))
        for reader, untold in self._untold.items():
            cells = [self._cells.get((reader, scenario), NONE) for scenario in scenarios]
            yield self._row(reader, [*cells, ", ".join(sorted(untold))])

    @staticmethod
    def _row(head, cells):
        return f"| {' | '.join([head, *cells])} |"


def main(arguments):
    matrix = Matrix()
    here = str(Path(__file__).parent)
    with redirect_stdout(sys.stderr):
        status = pytest.main([here, "-q", *arguments], plugins=[matrix])
    print("\n".join(matrix.lines()))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
