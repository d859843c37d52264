"""Processor time a token and lateness over the number of streams, as an SVG."""

from __future__ import annotations

from math import ceil, floor, log10
from statistics import median
from xml.sax.saxutils import escape

from .measurements import streams
from .servers import KINDS

WIDTH, HEIGHT = 400, 320
LEFT, TOP, RIGHT, BOTTOM = 56, 40, 16, 44
LEGEND = 24
COLORS = {
    "limit": "#666666",
    "ours-worker": "#0b6e4f",
    "ours-gevent": "#5fb49c",
    "fastapi-orjson": "#d1495b",
    "fastapi-pydantic": "#8f2d56",
    "flask-generator": "#edae49",
}


def draw(runs):
    """Two plots side by side over one legend; both vertical axes are logarithmic."""
    points = [point for point in streams.figures(runs) if point["costs"]]
    below = TOP + HEIGHT + BOTTOM
    width, height = 2 * (LEFT + WIDTH + RIGHT), below + LEGEND * ceil(len(COLORS) / 2) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *panel(points, "costs", "CPU a delivered token, µs", LEFT),
        *panel(points, "p99", "99th percentile of the lateness, ms", 2 * LEFT + WIDTH + RIGHT),
    ]
    for place, (server, color) in enumerate(COLORS.items()):
        x = LEFT + (place % 2) * (width // 2)
        y = below + LEGEND * (place // 2) + 12
        parts += [
            f'<line x1="{x}" y1="{y}" x2="{x + 24}" y2="{y}" stroke="{color}" stroke-width="2.5"/>',
            f'<text x="{x + 32}" y="{y + 4}">{escape(KINDS[server].title)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def panel(points, field, title, left):
    """The axes, and a line for each server."""
    most = max(point["streams"] for point in points)
    values = [median(point[field]) for point in points]
    lowest, highest = floor(log10(max(min(values), 0.01))), ceil(log10(max(values)))
    highest = max(highest, lowest + 1)

    def x_of(count):
        return left + WIDTH * count / most

    def y_of(value):
        return TOP + HEIGHT * (highest - log10(max(value, 0.01))) / (highest - lowest)

    yield f'<text x="{left}" y="{TOP - 16}" font-weight="bold">{escape(title)}</text>'
    for decade in range(lowest, highest + 1):
        yield grid(left, y_of(10**decade), left + WIDTH, f"{10**decade:,g}", "#bbbbbb")
        for step in (2, 5):
            if decade < highest:
                value = step * 10**decade
                yield grid(left, y_of(value), left + WIDTH, f"{value:,g}", "#e8e8e8")
    for count in sorted({point["streams"] for point in points}):
        x = x_of(count)
        if count in (600, 1200) or count * 5 >= most * 2:
            yield f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{count:,}</text>'
    yield (
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">'
        "streams, 25 tokens/s each</text>"
    )
    for server, color in COLORS.items():
        line = [
            (x_of(point["streams"]), y_of(median(point[field])))
            for point in points
            if point["server"] == server
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in line)


def grid(left, y, right, label, color):
    return (
        f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="{color}"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )
