"""Small charts as SVG text, coloured by the page's style: classes `before`, `after`, `grid` and `label`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 34


def lines(series: Mapping[str, Sequence[float]], *, across: str) -> str:
    """Positive values per block on a logarithmic scale.

    Args:
        series: CSS classes of a line -> its values, one per block.
        across: what the horizontal axis counts.
    """
    values = [max(value, 1e-6) for row in series.values() for value in row]
    low, high = min(values) / 1.15, max(values) * 1.15
    count = max(len(row) for row in series.values())

    def x(index: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / count

    def y(value: float) -> float:
        share = math.log(max(value, 1e-6) / low) / math.log(high / low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [_horizontal(y(tick), f"{tick:g}") for tick in round_ticks(low, high)]
    step = -(-count // 16)
    parts += [_text(x(index), HEIGHT - 18, str(index)) for index in range(0, count, step)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, across))
    for name, row in series.items():
        points = [(x(index), y(value)) for index, value in enumerate(row)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="line {name}" points="{path}"/>')
        parts += [
            f'<circle class="dot {name}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{row[index]:.4g}</title></circle>'
            for index, (px, py) in enumerate(points)
        ]
    return _svg(parts)


def histogram(series: Mapping[str, Sequence[int]], edges: Sequence[float], *, across: str) -> str:
    """Counts per bin as bars, several series over each other; bins and counts on logarithmic scales.

    Args:
        series: CSS class of the bars -> counts, one per bin.
        edges: of the bins, ascending and positive; one more than bins.
        across: what the horizontal axis measures.
    """
    most = max(max(row) for row in series.values())

    def x(value: float) -> float:
        share = math.log(value / edges[0]) / math.log(edges[-1] / edges[0])
        return LEFT + (WIDTH - LEFT - RIGHT) * share

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log1p(count) / math.log1p(max(most, 1))

    powers = [10**power for power in range(int(math.log10(max(most, 1))) + 1)]
    parts = [_horizontal(y(count), f"{count:,}") for count in powers]
    parts += [_text(x(tick), HEIGHT - 18, f"{tick:g}") for tick in round_ticks(edges[0], edges[-1])]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, across))
    for name, row in series.items():
        for start, end, count in zip(edges, edges[1:], row, strict=False):
            if count:
                top = y(count)
                parts.append(
                    f'<rect class="bar {name}" x="{x(start):.1f}" y="{top:.1f}" width="{x(end) - x(start):.1f}" '
                    f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{count:,} at {start:.3g} to {end:.3g}</title></rect>'
                )
    return _svg(parts)


def round_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; powers alone where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(decades) < 6 else (1,)
    return [tick for decade in decades for digit in digits if low <= (tick := digit * 10.0**decade) <= high]


def _horizontal(y: float, text: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(LEFT - 6, y + 4, text, "end")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
