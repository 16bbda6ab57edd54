"""Histograms and curves as inline SVG: they open from disk without a server, a script or a drawing library.

Every text that goes into a chart is escaped here.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

LINE_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569", "#b45309")


_WIDTH, _HEIGHT = 460, 230


_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 40


def histogram(values: NDArray[np.number], *, title: str, axis: str, low: float, high: float, bins: int) -> str:
    """A histogram as an `<svg>` element.

    Args:
        values: (N,) numbers; those outside low..high are counted in the first or last bar.
        title, axis: words above the chart and below its horizontal axis.
        low, high, bins: the range and into how many bars it is cut.
    """
    counts, edges = np.histogram(np.clip(np.asarray(values, dtype=np.float64), low, high), bins=bins, range=(low, high))
    most = max(int(counts.max(initial=0)), 1)
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    bar_width = inner_width / bins
    parts = [_axes(title, axis, x_range=(low, high), y_range=(0, most), whole_x=(high - low) % bins == 0, whole_y=True)]
    for index, count in enumerate(counts):
        bar_height = inner_height * int(count) / most
        parts.append(
            f'<rect class="bar" x="{_LEFT + index * bar_width + 0.5:.1f}" y="{_TOP + inner_height - bar_height:.1f}" '
            f'width="{max(bar_width - 1, 0.5):.1f}" height="{bar_height:.1f}">'
            f"<title>{_number(edges[index])} to {_number(edges[index + 1])}: {int(count):,}</title></rect>"
        )
    return _svg(parts, title)


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, colours: Mapping[str, str], title: str, axis: str = "update"
) -> str:
    """Curves over the same axes as an `<svg>` element; whose curve has which colour is said once, beside the charts.

    Args:
        lines: for each name its (x, y) points, in the order of x; points that are not finite break the line. A noisy line (more than
            60 points) is drawn pale, with its moving mean over a fiftieth of the points on top.
        title, axis: words above the chart and below its horizontal axis.
    """
    arrays = {name: (np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for name, (x, y) in lines.items()}
    finite = [(x[ok], y[ok]) for x, y in arrays.values() if (ok := np.isfinite(x) & np.isfinite(y)).any()]
    if not finite:
        return _svg(
            [_axes(title, axis, x_range=(0, 1), y_range=(0, 1)), _text(_WIDTH / 2, _HEIGHT / 2, "no finite value", "middle")], title
        )
    x_range = _widened(min(x.min() for x, _ in finite), max(x.max() for x, _ in finite))
    y_range = _widened(min(y.min() for _, y in finite), max(y.max() for _, y in finite))
    parts = [_axes(title, axis, x_range=x_range, y_range=y_range, whole_x=True)]
    for name, (x, y) in arrays.items():
        noisy = len(y) > 60
        parts.append(_path(x, y, x_range, y_range, colours[name], opacity=0.25 if noisy else 1.0))
        if noisy:
            parts.append(_path(x, _moving_mean(y, max(3, len(y) // 50)), x_range, y_range, colours[name], opacity=1.0))
    return _svg(parts, title)


def _moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the finite values within the window around each point; not a number where there is none."""
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), np.ones(window), mode="same")
    counts = np.convolve(finite.astype(np.float64), np.ones(window), mode="same")
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)
    return means


def _path(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    colour: str,
    *,
    opacity: float,
) -> str:
    if len(x) > 2000:  # more points than pixels
        keep = np.linspace(0, len(x) - 1, 2000).astype(int)
        x, y = x[keep], y[keep]
    across = _LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - _LEFT - _RIGHT)
    down = _TOP + (y_range[1] - y) / (y_range[1] - y_range[0]) * (_HEIGHT - _TOP - _BOTTOM)
    steps, pen = [], "M"
    for left, top in zip(across, down, strict=True):
        if not (math.isfinite(left) and math.isfinite(top)):
            pen = "M"
            continue
        steps.append(f"{pen}{left:.1f} {top:.1f}")
        pen = "L"
    if len(steps) == 1:
        steps.append("h0.1")  # one point alone: a dot
    return f'<path d="{"".join(steps)}" fill="none" stroke="{colour}" stroke-width="2" stroke-linecap="round" opacity="{opacity}"/>'


def _axes(
    title: str,
    axis: str,
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    whole_x: bool = False,
    whole_y: bool = False,
) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [_text(_LEFT, 16, title, "start", "chart-title"), _text((_LEFT + right) / 2, _HEIGHT - 6, axis, "middle")]
    parts.append(f'<line class="grid" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    for value in round_numbers(*y_range, whole=whole_y):
        y = bottom - (value - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _number(value), "end"))
    for value in round_numbers(*x_range, whole=whole_x):
        x = _LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * (right - _LEFT)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        parts.append(_text(x, bottom + 16, _number(value), "middle"))
    return "".join(parts)


def round_numbers(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Two to six numbers of few digits within low..high (low < high) at equal distances; `whole`: no fractions."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= (high - low) * 0.999)
    if whole:
        step = max(1.0, step)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return float(low), float(high)
    room = abs(low) * 0.05 or 1.0
    return float(low) - room, float(high) + room


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"


def _svg(parts: Sequence[str], title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
