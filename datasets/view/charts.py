"""Histograms and curves as inline SVG: they open from disk without a server, a script or a drawing library.

What a reader would get wrong: y grows downwards in SVG, so the greatest value has the least y. What is drawn here are numbers only; words
go into `chart.html`, which escapes them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from uniter.datasets.view.page import render

LINE_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569", "#b45309")
_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 446, 30, 190  # of the axes
_Range = tuple[float, float]


def histogram(values: NDArray[np.number], *, title: str, axis: str, low: float, high: float, bins: int) -> Markup:
    """A histogram as an `<svg>` element.

    Args:
        values: (N,) numbers; those outside low..high are counted in the first or last bar.
        title, axis: words above the chart and below its horizontal axis.
        low, high, bins: the range and into how many bars it is cut.
    """
    counts, edges = np.histogram(np.clip(np.asarray(values, dtype=np.float64), low, high), bins=bins, range=(low, high))
    most = max(int(counts.max(initial=0)), 1)
    width = (_RIGHT - _LEFT) / bins
    bars = []
    for index, count in enumerate(counts.tolist()):
        height = (_BOTTOM - _TOP) * count / most
        said = f"{_number(edges[index])} to {_number(edges[index + 1])}: {count:,}"
        place = {"x": _LEFT + index * width + 0.5, "y": _BOTTOM - height, "width": max(width - 1, 0.5), "height": height}
        bars.append({**place, "said": said})
    return _chart(title, axis, (low, high), (0, most), whole_x=(high - low) % bins == 0, whole_y=True, bars=bars)


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, colours: Mapping[str, str], title: str, axis: str = "update"
) -> Markup:
    """Curves over the same axes as an `<svg>` element; whose curve has which colour is said once, beside the charts.

    Args:
        lines: for each name its (x, y) points, in the order of x; points that are not finite break the line. A noisy line (more than
            60 points) is drawn pale, with its moving mean over a fiftieth of the points on top.
        title, axis: words above the chart and below its horizontal axis.
    """
    arrays = {name: (np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for name, (x, y) in lines.items()}
    finite = [(x[ok], y[ok]) for x, y in arrays.values() if (ok := np.isfinite(x) & np.isfinite(y)).any()]
    if not finite:
        return _chart(title, axis, (0, 1), (0, 1), note="no finite value")
    x_range = _widened(min(x.min() for x, _ in finite), max(x.max() for x, _ in finite))
    y_range = _widened(min(y.min() for _, y in finite), max(y.max() for _, y in finite))
    strokes = []
    for name, (x, y) in arrays.items():
        noisy = len(y) > 60
        strokes.append({"path": _path(x, y, x_range, y_range), "colour": colours[name], "opacity": 0.25 if noisy else 1.0})
        if noisy:
            mean = _moving_mean(y, max(3, len(y) // 50))
            strokes.append({"path": _path(x, mean, x_range, y_range), "colour": colours[name], "opacity": 1.0})
    return _chart(title, axis, x_range, y_range, whole_x=True, strokes=strokes)


def _chart(
    title: str,
    axis: str,
    x_range: _Range,
    y_range: _Range,
    *,
    whole_x: bool = False,
    whole_y: bool = False,
    bars: Sequence[Mapping[str, Any]] = (),
    strokes: Sequence[Mapping[str, Any]] = (),
    note: str = "",
) -> Markup:
    """Axes with round numbers, and what lies between them."""
    return render(
        "chart.html",
        **{"title": title, "axis": axis, "bars": bars, "strokes": strokes, "note": note, "width": _WIDTH, "height": _HEIGHT},
        **{"left": _LEFT, "right": _RIGHT, "bottom": _BOTTOM},
        heights=[(_down(value, y_range), _number(value)) for value in round_numbers(*y_range, whole=whole_y)],
        places=[(_across(value, x_range), _number(value)) for value in round_numbers(*x_range, whole=whole_x)],
    )


def _across(value: Any, x_range: _Range) -> Any:
    return _LEFT + (value - x_range[0]) / (x_range[1] - x_range[0]) * (_RIGHT - _LEFT)


def _down(value: Any, y_range: _Range) -> Any:
    return _TOP + (y_range[1] - value) / (y_range[1] - y_range[0]) * (_BOTTOM - _TOP)


def _moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the finite values within the window around each point; not a number where there is none."""
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), np.ones(window), mode="same")
    counts = np.convolve(finite.astype(np.float64), np.ones(window), mode="same")
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)
    return means


def _path(x: NDArray[np.float64], y: NDArray[np.float64], x_range: _Range, y_range: _Range) -> str:
    """The points as the `d` of a `<path>`."""
    if len(x) > 2000:  # more points than pixels
        keep = np.linspace(0, len(x) - 1, 2000).astype(int)
        x, y = x[keep], y[keep]
    steps, pen = [], "M"
    for left, top in zip(_across(x, x_range), _down(y, y_range), strict=True):
        if not (math.isfinite(left) and math.isfinite(top)):
            pen = "M"
            continue
        steps.append(f"{pen}{left:.1f} {top:.1f}")
        pen = "L"
    if len(steps) == 1:
        steps.append("h0.1")  # one point alone: a dot
    return "".join(steps)


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


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"
