"""The results as Markdown, which also reads well on a terminal."""

from __future__ import annotations

from statistics import median

from .figures import number, spread
from .measurements import streams
from .servers import KINDS


def table(head, lines):
    """Columns as wide as what is in them."""
    cells = [head, *lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def targets(rows):
    return table(
        ("what", "measured: median (least to most)", "target", ""),
        [(row.what, row.measured, row.target, row.verdict) for row in rows],
    )


def stream_figures(runs):
    """The figures behind the ratios."""
    return table(
        (
            "streams",
            "server",
            "CPU a token, µs",
            "tokens a read",
            "p50, ms",
            "p99, ms",
            "delivered",
        ),
        [stream_line(line) for line in streams.figures(runs)],
    )


def stream_line(line):
    head = (f"{line['streams']:,}", KINDS[line["server"]].title)
    if not line["costs"]:
        return (*head, f"only {median(line['started']):,.0f} began", "", "", "", "")
    return (
        *head,
        spread(line["costs"]),
        number(median(line["merged"])),
        number(median(line["p50"])),
        number(median(line["p99"])),
        f"{median(line['shares']):.0f} %",
    )


def circumstances(result):
    """In one line: when, how long, and on what kind of a day."""
    about = result["machine"]
    others = [run["others_share"] for run in result["runs"] if "others_share" in run]
    return (
        f"{result['measurement']}: {result['at'][:16].replace('T', ' ')} UTC, "
        f"commit {about['commit'] or 'unknown'}, {result['rounds']} rounds of "
        f"{result['seconds']:g} s, load average {result['load_average']} before"
        + (
            f", other processes had {median(others):.0%} of the server's processor"
            if others
            else ""
        )
    )


def machine_and_versions(about):
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    return (
        f"{about['processor']}, {about['processors']} processors, {about['system']}, "
        f"{about['python']}; {versions}."
    )
