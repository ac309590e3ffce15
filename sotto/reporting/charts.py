"""Line charts as inline SVG: no library, no script and no file of its own, so that a page can be mailed and printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 44
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
      label: what it shows.
      low, high: its ends, in the chart's units; low < high, and low > 0 on a logarithmic axis.
      ticks: where to write numbers: (value, text).
      log: logarithmic.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is between the ends: 0 to 1, and there when it is beyond them."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return (at - low) / (high - low)


@dataclass(frozen=True)
class Line:
    """A line of a chart. `name` is written at its end; `faint` draws what the others are compared with."""

    name: str
    points: Sequence[Point]
    faint: bool = False


def round_ticks(low: float, high: float, most: int = 5) -> list[tuple[float, str]]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    span = (high - low) / most
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= span * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, f"{n * step:.10g}") for n in range(first, last + 1)]


def line_chart(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """An SVG element. Everything in it is escaped; `title` is what a screen reader says."""
    body = [*_grid(x, y)]
    for line in lines:
        body += _line(line, x, y)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _at(x: Axis, y: Axis, point: Point) -> Point:
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + across * x.place(point[0]), TOP + up * (1 - y.place(point[1]))


def _grid(x: Axis, y: Axis) -> list[str]:
    bottom, parts = HEIGHT - BOTTOM, list[str]()
    for value, text in x.ticks:
        across, _ = _at(x, y, (value, y.low))
        parts.append(f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{across:.1f}" y="{bottom + 15}" text-anchor="middle">{escape(text)}</text>')
    for value, text in y.ticks:
        _, up = _at(x, y, (x.low, value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    turned = f"rotate(-90 12 {(TOP + bottom) / 2})"
    parts.append(
        f'<text class="axis" x="12" y="{(TOP + bottom) / 2}" text-anchor="middle" transform="{turned}">'
        f"{escape(y.label)}</text>"
    )
    return parts


def _line(line: Line, x: Axis, y: Axis) -> list[str]:
    placed = [_at(x, y, point) for point in line.points if all(map(math.isfinite, point))]
    if not placed:
        return []
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
    kind = "faint" if line.faint else "line"
    last = placed[-1]
    # Inside the chart and above the line's end, where no other part of a rising line is.
    label = (
        f'<text class="name" x="{last[0] - 4:.1f}" y="{max(last[1] - 6, TOP + 9):.1f}" text-anchor="end">'
        f"{escape(line.name)}</text>"
    )
    return [f'<polyline class="{kind}" points="{path}"/>', label if line.name else ""]
