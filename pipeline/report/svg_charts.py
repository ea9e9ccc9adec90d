"""SVG charts without scripts for the report.

Written by hand because the report must stay small and self-contained: a plotting library's SVG is ten times larger and
fixes its colours. These charts take their colours from `report.css` (classes `s0`, `s1`, ... for series) and so follow
the light or dark scheme of the reader. They are drawn about as wide as a phone, which keeps their text legible there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
from markupsafe import Markup

Point = tuple[float, float]
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 40
CELL = 24


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = power * min((factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough), default=10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """`value` with at most four significant digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


class _Axes:
    """Linear axes: maps values to coordinates of the drawing. With `whole_x`, only whole numbers are labelled in x."""

    def __init__(self, x: Point, y: Point, whole_x: bool = False) -> None:
        self.x_range, self.y_range = _widened(x, 0.5), _widened(y, 0.05 * abs(y[0]) or 0.5)
        self.whole_x = whole_x

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def draw(
        self, x_label: str, y_label: str, x_format: Callable[[float], str], y_format: Callable[[float], str]
    ) -> str:
        across = ticks(*self.x_range)
        if self.whole_x:
            across = [value for value in across if float(value).is_integer()]
        parts = []
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{y_format(value)}</text>')
        for value in across:
            x = self.x(value)
            parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{x_format(value)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
        turned = f"rotate(-90 11 {(TOP + HEIGHT - BOTTOM) / 2})"
        parts.append(
            f'<text class="label" x="11" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
            f'transform="{turned}">{escape(y_label)}</text>'
        )
        return "".join(parts)


def line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str] = number,
    y_range: Point | None = None,
    markers: bool = False,
) -> Markup:
    """Named lines over common axes, with a legend if there are several. Points that are not finite are left out."""
    finite = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    everything = [point for points in finite.values() for point in points] or [(0.0, 0.0)]
    xs, ys = zip(*everything, strict=True)
    axes = _Axes((min(xs), max(xs)), y_range or (min(ys), max(ys)), whole_x=all(float(x).is_integer() for x in xs))
    parts = [axes.draw(x_label, y_label, number, y_format)]
    for index, (name, points) in enumerate(finite.items()):
        places = [(axes.x(x), axes.y(y)) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="s{index}" points="{path}"><title>{escape(name)}</title></polyline>')
        if markers or len(points) == 1:
            parts += [f'<circle class="s{index}" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    return _figure(parts, f"{y_label} over {x_label}", list(finite))


def reliability_chart(bins: Sequence[Mapping[str, float | None]]) -> Markup:
    """Reliability diagram: the accuracy of each confidence bin as a bar, and its gap to the mean confidence on top.

    Args:
        bins: as `pipeline.evaluation.calibration.reliability` returns them. A bin with fewer rows is drawn fainter.
    """
    axes = _Axes((0, 1), (0, 1))
    parts = [axes.draw("confidence", "accuracy", percent, percent)]
    most = max((b["rows"] or 0) for b in bins) or 1
    for b in bins:
        lower, upper, rows, accuracy, confidence = (b[k] for k in ("lower", "upper", "rows", "accuracy", "confidence"))
        if not rows or accuracy is None or confidence is None or lower is None or upper is None:
            continue
        x, width = axes.x(lower) + 1, axes.x(upper) - axes.x(lower) - 2
        opacity = round(0.3 + 0.7 * math.sqrt(rows / most), 2)
        title = f"{percent(lower)} to {percent(upper)}: {rows} rows, {percent(accuracy)} right"
        for style, low, high in (("s0", 0.0, accuracy), ("gap", min(accuracy, confidence), max(accuracy, confidence))):
            top, bottom = axes.y(high), axes.y(low)
            parts.append(
                f'<rect class="{style}" x="{x}" y="{top}" width="{width:.1f}" height="{bottom - top:.1f}" '
                f'opacity="{opacity}"><title>{escape(title)}</title></rect>'
            )
    parts.append(f'<line class="diagonal" x1="{axes.x(0)}" y1="{axes.y(0)}" x2="{axes.x(1)}" y2="{axes.y(1)}"/>')
    return _figure(parts, "accuracy over confidence", [])


def matrix_chart(matrix: np.ndarray, names: Sequence[str]) -> Markup:
    """Confusion matrix with named rows and columns. A cell is darker the larger its share of its row."""
    longest = max(map(len, names))
    left, top = 7 * longest + 10, 6 * longest + 10
    size = CELL * len(names)
    shares = row_shares(matrix)
    parts = []
    for row, name in enumerate(names):
        middle = (row + 0.5) * CELL
        parts.append(f'<text x="{left - 6}" y="{top + middle + 4}" text-anchor="end">{escape(name)}</text>')
        at = f"{left + middle - 2} {top - 6}"
        parts.append(f'<text x="{left + middle - 2}" y="{top - 6}" transform="rotate(-60 {at})">{escape(name)}</text>')
        for column, other in enumerate(names):
            count, share = int(matrix[row, column]), float(shares[row, column])
            x, y = left + column * CELL, top + row * CELL
            if not count:
                continue
            title = f"{name}, taken for {other}: {count} rows" if row != column else f"{name}: {count} right"
            style = "hit" if row == column else "miss"
            parts.append(
                f'<rect class="{style}" x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'opacity="{0.12 + 0.88 * math.sqrt(share):.2f}"><title>{escape(title)}</title></rect>'
            )
            if len(names) <= 20:
                ink = "on" if share > 0.3 else ""
                parts.append(
                    f'<text class="count {ink}" x="{x + CELL / 2 - 0.5}" y="{y + CELL / 2 + 3}" '
                    f'text-anchor="middle">{count}</text>'
                )
    frame = f'<rect class="frame" x="{left - 1}" y="{top - 1}" width="{size + 1}" height="{size + 1}"/>'
    width, height = left + size + 6 * min(longest, 12), top + size + 4
    return Markup(
        f'<div class="scroll"><svg class="matrix" viewBox="0 0 {width} {height}" style="min-width:{0.8 * width:.0f}px;'
        f'max-width:{width}px" role="img" aria-label="confusion matrix">{frame}{"".join(parts)}</svg></div>'
    )


def row_shares(matrix: np.ndarray) -> np.ndarray:
    """Confusion counts divided by the sum of their row; a row without counts stays zero."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _figure(parts: Sequence[str], description: str, names: Sequence[str]) -> Markup:
    entries = [f'<span class="s{index}">{escape(name)}</span>' for index, name in enumerate(names)]
    legend = f'<div class="legend">{"".join(entries)}</div>' if len(names) > 1 else ""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description, quote=True)}">'
        f"{''.join(parts)}</svg>{legend}"
    )


def _widened(extent: Point, margin: float) -> Point:
    """`extent`, widened by `margin` on both sides if it is a single value."""
    low, high = extent
    return (low, high) if high > low else (low - margin, high + margin)
