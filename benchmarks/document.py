"""``python -m benchmarks.document``: put the kept results into docs/performance.md."""

from __future__ import annotations

import sys

from . import machine, plot, results, tables
from .measurements import NAMES

PAGE = machine.ROOT / "docs" / "performance.md"
PLOT = PAGE.with_suffix(".svg")
BEGIN = "<!-- Written by `make bench-docs`. -->\n"
END = "<!-- So far. -->\n"


def figures(found):
    """The part of the page between its marks; *found* are results."""
    abouts = [each["machine"] for each in found]
    parts = [tables.machine_and_versions(abouts[0])]
    parts.append(tables.targets([row for each in found for row in results.rows_of(each)]))
    for each in found:
        if each["measurement"] == "streams":
            parts.append(f"![Processor time a token, and lateness, over streams]({PLOT.name})")
            parts.append(tables.stream_figures(each["runs"]))
    parts.append("\n".join(f"- {tables.circumstances(each)}" for each in found))
    return "\n\n".join(parts) + "\n"


def main():
    found = results.load_all()
    if not found:
        sys.exit("Nothing was measured: make bench")
    if missing := set(NAMES) - {each["measurement"] for each in found}:
        print(f"Not measured: {', '.join(sorted(missing))}", file=sys.stderr)
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{PAGE} lacks the marks {BEGIN.strip()} and {END.strip()}")
    PAGE.write_text(f"{before}{BEGIN}\n{figures(found)}\n{END}{after}")
    for each in found:
        if each["measurement"] == "streams":
            PLOT.write_text(plot.draw(each["runs"]))


if __name__ == "__main__":
    main()
