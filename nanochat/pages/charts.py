"""Numbers over steps to small line charts: SVG inside the page, without scripts; the page's style sheet colours them.

Drawn in a box of WIDTH x HEIGHT units that grows and shrinks with the page, so the type stays readable on a phone.
Not covered: logarithmic y axes, dates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
SMOOTHED_SHARE = 1 / 15
"""A smoothed line averages over about this share of the points."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    """(x, y) in the order of x; those that are not finite are left out."""
    style: Literal["line", "faint", "dotted"] = "line"
    """faint = raw values behind a smoothed line; dotted = a line with a dot on each value."""
    label: str = ""
    """Written beside the last point."""


def smooth(values: Sequence[float], span: float | None = None) -> list[float]:
    """Return exponential moving averages over about `span` values (none = SMOOTHED_SHARE of them).

    The first values are not pulled to zero: each is a weighted mean of those before it (Adam's bias correction,
    arXiv:1412.6980, section 3).
    """
    span = max(1.0, len(values) * SMOOTHED_SHARE) if span is None else span
    new = 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values:
        total = (1 - new) * total + new * value
        weight = (1 - new) * weight + new
        averages.append(total / weight)
    return averages


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about that many round numbers in [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not low < high:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.8 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten in [low, high], which are positive; where these are few, as `ticks`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high]
    return found if len(found) > 1 else ticks(low, high)


def short_number(value: float) -> str:
    """Return a number as an axis shows it: 1500 as 1.5k, 2000000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    y_max: float | None = None,
    percent: bool = False,
    log_x: bool = False,
    over: str = "step",
) -> Markup:
    """Return a figure with a chart over steps, or what `over` says; one that has no finite value says so.

    `from_zero` starts the y axis at 0, `y_max` is the least upper end, `percent` writes shares as percentages, `log_x`
    has positive x on a logarithmic axis.
    """  # fmt: skip
    finite = [replace(one, points=[point for point in one.points if all(map(math.isfinite, point))]) for one in series]
    xs = [x for one in finite for x, _ in one.points]
    ys = [y for one in finite for _, y in one.points]
    if not xs:
        return Markup("<figure><figcaption>{}</figcaption><p class=missing>no values</p></figure>").format(title)
    low, high = (0.0 if from_zero else min(ys)), max(ys if y_max is None else [*ys, y_max])
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    axes = _Axes(min(xs), max(xs), low if from_zero else low - margin, high + margin, log_x, over)
    last = finite[-1].points[-1] if finite[-1].points else (xs[-1], ys[-1])
    return Markup(
        "<figure><figcaption>{title}</figcaption>"
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}: {last} at {over} {step}">'
        "{grid}{lines}</svg></figure>"
    ).format(
        title=title, width=WIDTH, height=HEIGHT, last=_label(last[1], percent), step=short_number(last[0]), over=over,
        grid=_grid(axes, percent), lines=Markup("").join(_line(axes, one) for one in finite),
    )  # fmt: skip


@dataclass(frozen=True)
class _Axes:
    """The ranges of a chart and where they lie in its box."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_x: bool
    over: str

    def x(self, value: float) -> float:
        place = math.log10 if self.log_x else float
        low, high = place(self.x_low), place(self.x_high)
        return LEFT + (place(value) - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.y_high - value) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _grid(axes: _Axes, percent: bool) -> Markup:
    parts = []
    for value in ticks(axes.y_low, axes.y_high):
        y = f"{axes.y(value):.1f}"
        parts.append(
            Markup(
                '<line x1="{}" x2="{}" y1="{}" y2="{}" class="grid"/><text x="{}" y="{}" dy="4" class="y">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 7, y, _label(value, percent))
        )
    for value in (log_ticks if axes.log_x else ticks)(axes.x_low, axes.x_high):
        parts.append(
            Markup('<text x="{}" y="{}" class="x">{}</text>').format(
                f"{axes.x(value):.1f}", HEIGHT - 6, short_number(value)
            )
        )
    return Markup("").join(parts)


def _line(axes: _Axes, series: Series) -> Markup:
    places = [(f"{axes.x(x):.1f}", f"{axes.y(y):.1f}") for x, y in series.points]
    line = Markup('<polyline points="{}" class="{}"><title>{}</title></polyline>').format(
        " ".join(",".join(place) for place in places), series.style, series.name
    )
    if series.label and places:
        x, y = places[-1]
        side = "y" if float(x) > WIDTH / 2 else ""  # class y ends at its place
        line += Markup('<text x="{}" y="{}" dy="-6" class="{}">{}</text>').format(x, y, side, series.label)
    if series.style != "dotted" and len(places) > 1:
        return line
    dots = (
        Markup('<circle cx="{}" cy="{}" r="2.6"><title>{} {} at {} {}</title></circle>').format(
            x, y, series.name, f"{value:.4f}", axes.over, short_number(step)
        )
        for (x, y), (step, value) in zip(places, series.points, strict=True)
    )
    return line + Markup("").join(dots)


def _label(value: float, percent: bool) -> str:
    return f"{100 * value:.3g}%" if percent else short_number(value)
