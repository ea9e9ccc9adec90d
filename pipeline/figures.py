"""Figures for an HTML page that is complete in itself: charts as SVG, pictures as PNG in data URIs.

Charts take their colours from the page's style sheet (classes `s0`, `s1`, ... for series), so that they follow its
light and its dark scheme, and are drawn about as wide as a phone, so that their text is legible there.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

Point = tuple[float, float]
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 40
CELL = 24

# Black, violet, red, orange, pale yellow: dark is little and bright is much, also for the colour-blind and in grey.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], float)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = power * min((factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough), default=10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high], both positive; the ends, where that leaves less than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [tick for power in powers for factor in (1, 2, 5) if low <= (tick := float(f"{factor}e{power}")) <= high]
    return found if len(found) > 1 else [low, high]


def number(value: float) -> str:
    """At most four significant digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


class _Axes:
    """Where values lie on the paper; logarithmic in x, or with whole numbers there, if asked for."""

    def __init__(self, x: Point, y: Point, log_x: bool = False, whole_x: bool = False) -> None:
        self.x_range, self.y_range = _widened(x, 0.5), _widened(y, 0.05 * abs(y[0]) or 0.5)
        self.log_x, self.whole_x = log_x, whole_x

    def x(self, value: float) -> float:
        low, high = self.x_range
        share = math.log(value / low) / math.log(high / low) if self.log_x else (value - low) / (high - low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def draw(
        self, x_label: str, y_label: str, x_format: Callable[[float], str], y_format: Callable[[float], str]
    ) -> str:
        low, high = self.x_range
        across = log_ticks(low, high) if self.log_x else ticks(low, high)
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
) -> str:
    """Lines over a common axis, with a legend if there are several; points that are not finite are left out."""
    kept = {name: [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])] for name, points in series.items()}
    everything = [point for points in kept.values() for point in points] or [(0.0, 0.0)]
    xs = [x for x, _ in everything]
    axes = _Axes(_extent(xs), y_range or _extent([y for _, y in everything]), whole_x=_whole(xs))
    parts = [axes.draw(x_label, y_label, number, y_format)]
    for index, (name, points) in enumerate(kept.items()):
        places = [(axes.x(x), axes.y(y)) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline class="s{index}" points="{path}"><title>{escape(name)}</title></polyline>')
        if markers or len(points) == 1:
            parts += [f'<circle class="s{index}" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    return _figure(parts, f"{y_label} over {x_label}", list(kept))


def scatter_chart(
    points: Mapping[str, Point],
    *,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str] = number,
    log_x: bool = False,
    marked: str | None = None,
) -> str:
    """Named points, of which one may be `marked`; a name is shown when the pointer rests on its point."""
    xs, up = [x for x, _ in points.values()], _extent([y for _, y in points.values()])
    axes = _Axes(_padded(_extent(xs), log_x), _padded(up), log_x, _whole(xs))
    parts = [axes.draw(x_label, y_label, number, y_format)]
    for name, (x, y) in sorted(points.items(), key=lambda item: item[0] == marked):  # the marked one on top
        style, radius = ("s1", 6) if name == marked else ("s0", 4)
        title = f"<title>{escape(name)}: {number(x)}, {y_format(y)}</title>"
        parts.append(f'<circle class="{style}" cx="{axes.x(x)}" cy="{axes.y(y)}" r="{radius}">{title}</circle>')
    return _figure(parts, f"{y_label} over {x_label}", [])


def reliability_chart(bins: Sequence[Mapping[str, float | None]]) -> str:
    """Accuracy of each bin of confidence as bars, the gap to the confidence on top, and the diagonal of perfection.

    Args:
        bins: as `pipeline.calibration.reliability` gives them; a bar is the fainter the fewer rows its bin has.
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


def matrix_chart(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A confusion matrix with named rows and columns; the darker a cell, the larger its share of its row."""
    longest = max(map(len, names))
    left, top = 7 * longest + 10, 6 * longest + 10
    size = CELL * len(names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
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
    return (
        f'<div class="scroll"><svg class="matrix" viewBox="0 0 {width} {height}" style="min-width:{0.8 * width:.0f}px;'
        f'max-width:{width}px" role="img" aria-label="confusion matrix">{frame}{"".join(parts)}</svg></div>'
    )


def matrix_picture(matrix: np.ndarray) -> str:
    """A large matrix as a picture, a pixel a cell: brighter is a larger share of the row."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    return picture(heat(np.sqrt(shares)))


def heat(values: np.ndarray) -> np.ndarray:
    """Values (H, W) in [0, 1] as colours uint8 (H, W, 3)."""
    places = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, places, HEAT[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def attention_overlay(image: np.ndarray, weights: np.ndarray, size: int = 64) -> np.ndarray:
    """An image with what is looked at in bright colours: uint8 (size, size, 3).

    Args:
        image: uint8 (H, W, C).
        weights: (rows, columns), not negative; scaled so that the largest is as bright as it gets.
    """
    below = np.asarray(as_rgb(image).convert("L").convert("RGB").resize((size, size), Image.Resampling.NEAREST), float)
    scaled = Image.fromarray((weights / max(weights.max(), 1e-12)).astype(np.float32))
    above = np.clip(np.asarray(scaled.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)
    return np.rint(0.4 * below + 0.6 * heat(above)).astype(np.uint8)


def as_rgb(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, C) with 1 or 3 channels as a picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")


def picture(image: np.ndarray) -> str:
    """uint8 (H, W, C) as the address of a PNG that lies in it."""
    data = io.BytesIO()
    as_rgb(image).save(data, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def _figure(parts: Sequence[str], description: str, names: Sequence[str]) -> str:
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
    entries = [f'<span class="s{index}">{escape(name)}</span>' for index, name in enumerate(names)]
    return svg + (f'<div class="legend">{"".join(entries)}</div>' if len(names) > 1 else "")


def _extent(values: Sequence[float]) -> Point:
    return min(values), max(values)


def _whole(values: Sequence[float]) -> bool:
    return all(float(value).is_integer() for value in values)


def _padded(extent: Point, log: bool = False) -> Point:
    low, high = extent
    if log:
        factor = (high / low) ** 0.05
        return low / factor, high * factor
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _widened(extent: Point, margin: float) -> Point:
    """`extent`, made wider where it is a single value."""
    low, high = extent
    return (low, high) if high > low else (low - margin, high + margin)
