"""Geometry of the reports' charts: numbers in, points and ticks out; templates draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rewriter.report.html_page import short

WIDTH, HEIGHT = 420.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 12.0, 34.0


@dataclass(frozen=True)
class Tick:
    """A line of the grid: where, and what it says (maybe nothing)."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve: its name, the style it is drawn in, its points as an SVG path, and the last point."""

    name: str
    style: str
    path: str
    end: tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A chart of `WIDTH` by `HEIGHT` units; `left`, `right`, `top` and `bottom` bound the plot inside."""

    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    x_label: str
    summary: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Bar:
    """A quantity before and after; widths are parts of the longest bar of its group."""

    label: str
    before: float
    after: float
    before_width: float
    after_width: float

    @property
    def ratio(self) -> float | None:
        """How many times as large it was before; None where nothing is left, or nothing was there."""
        return self.before / self.after if self.before and self.after else None


def bars(pairs: Mapping[str, tuple[float, float]], most: int | None = None) -> tuple[Bar, ...]:
    """One bar for each label in the given order; what is beyond `most` is summed up in a last one."""
    items = list(pairs.items())
    if most is not None and len(items) > most:
        rest = [pair for _, pair in items[most - 1 :]]
        items = [*items[: most - 1], (f"{len(rest)} others", (sum(b for b, _ in rest), sum(a for _, a in rest)))]
    longest = max((max(pair) for _, pair in items), default=0.0) or 1.0
    return tuple(Bar(label, b, a, b / longest, a / longest) for label, (b, a) in items)


def growth(
    title: str, lengths: Sequence[int], series: Mapping[str, tuple[str, Sequence[float]]], unit: str
) -> Chart | None:
    """Quantities over a length, both axes logarithmic; None if there is nothing positive to draw.

    Args:
        series: (style, one quantity for each length) by name.
    """
    flat = [y for _, ys in series.values() for y in ys if y > 0]
    if not flat:
        return None
    low, high = math.floor(math.log10(min(flat))), math.ceil(math.log10(max(flat)))
    high = max(high, low + 1)
    x = _scale(math.log2(lengths[0]), math.log2(lengths[-1]), _LEFT, WIDTH - _RIGHT)
    y = _scale(low, high, HEIGHT - _BOTTOM, _TOP)
    lines = tuple(
        _line(name, style, [(x(math.log2(n)), y(math.log10(v))) for n, v in zip(lengths, ys, strict=True) if v > 0])
        for name, (style, ys) in series.items()
        if any(v > 0 for v in ys)
    )
    across = tuple(Tick(x(math.log2(n)), _tokens(n) if i % 2 == 0 else "") for i, n in enumerate(lengths))
    up = tuple(Tick(y(power), short(10.0**power, unit)) for power in range(low, high + 1))
    last = ", ".join(f"{name} {short(ys[-1], unit)}" for name, (_, ys) in series.items())
    return Chart(title, lines, across, up, "tokens", f"{title}: at {_tokens(lengths[-1])} tokens {last}")


def remaining(title: str, lengths: Sequence[int], series: Mapping[str, tuple[str, Sequence[float]]]) -> Chart | None:
    """What is left of quantities, as parts of what they were, over a length on a logarithmic axis.

    Args:
        series: (style, one part for each length) by name.
    """
    largest = max((y for _, ys in series.values() for y in ys), default=0.0)
    if largest <= 0:
        return None
    step = 0.25 if largest <= 1.0 else math.ceil(largest / 4 * 2) / 2
    x = _scale(math.log2(lengths[0]), math.log2(lengths[-1]), _LEFT, WIDTH - _RIGHT)
    y = _scale(0.0, 4 * step, HEIGHT - _BOTTOM, _TOP)
    lines = tuple(
        _line(name, style, [(x(math.log2(n)), y(v)) for n, v in zip(lengths, ys, strict=True)])
        for name, (style, ys) in series.items()
    )
    across = tuple(Tick(x(math.log2(n)), _tokens(n) if i % 2 == 0 else "") for i, n in enumerate(lengths))
    up = tuple(Tick(y(i * step), f"{i * step:.0%}") for i in range(5))
    ends = ", ".join(f"{name} {ys[0]:.0%} to {ys[-1]:.0%}" for name, (_, ys) in series.items())
    return Chart(title, lines, across, up, "tokens", f"{title}: {ends}")


def course(title: str, steps: Sequence[int], values: Sequence[float], split: int | None = None) -> Chart | None:
    """A quantity over training steps, upright axis logarithmic; `split` is the first step of the second phase."""
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0 and math.isfinite(v)]
    if len(points) < 2:
        return None
    low, high = math.log10(min(v for _, v in points)), math.log10(max(v for _, v in points))
    margin = max(0.05 * (high - low), 0.02)
    x = _scale(points[0][0], points[-1][0], _LEFT, WIDTH - _RIGHT)
    y = _scale(low - margin, high + margin, HEIGHT - _BOTTOM, _TOP)
    parts = [("", "after", points)]
    if split is not None and 0 < sum(s < split for s, _ in points) < len(points):
        parts = [
            ("blocks alone", "before", [p for p in points if p[0] < split]),
            ("outputs and blocks", "after", [p for p in points if p[0] >= split]),
        ]
    lines = tuple(_line(name, style, [(x(s), y(math.log10(v))) for s, v in some]) for name, style, some in parts)
    marks = [points[0][0] + (points[-1][0] - points[0][0]) * i / 4 for i in range(5)]
    heights = [low + (high - low) * i / 3 for i in range(4)]
    return Chart(
        title,
        lines,
        tuple(Tick(x(m), f"{m:,.0f}") for m in marks),
        tuple(Tick(y(h), f"{10**h:.3g}") for h in heights),
        "steps",
        f"{title}: {points[0][1]:.3g} at first, {points[-1][1]:.3g} at last",
    )


def tradeoff(
    title: str, x_label: str, mixes: Sequence[tuple[float, float]], plan: tuple[float, float], measured: float
) -> Chart | None:
    """Predicted drift over the part that is left of a cost, 100 % at the left; None if there are not two mixes.

    Args:
        mixes: (part left, drift) along the frontier, least saved first.
        plan: the same of the chosen mix. measured: the drift that it was found to have.
    """
    if len(mixes) < 2:
        return None
    least = math.floor(min(left for left, _ in (*mixes, plan)) * 4) / 4
    step = _round_up(max(measured, *(drift for _, drift in (*mixes, plan))) / 4)
    x = _scale(1.0, least, _LEFT, WIDTH - _RIGHT)
    y = _scale(0.0, 4 * step, HEIGHT - _BOTTOM, _TOP)
    found = [
        _line("best mixes", "after", [(x(left), y(drift)) for left, drift in mixes]),
        _line("the plan, predicted", "after", [(x(plan[0]), y(plan[1]))]),
        _line("the plan, measured", "before", [(x(plan[0]), y(measured))]),
    ]
    marks = [1.0 + (least - 1.0) * i / 4 for i in range(5)]
    return Chart(
        title,
        tuple(found),
        tuple(Tick(x(m), f"{m:.0%}") for m in marks),
        tuple(Tick(y(i * step), f"{i * step:.3g}") for i in range(5)),
        x_label,
        f"{title}: the plan leaves {plan[0]:.0%}, drift {plan[1]:.3g} predicted, {measured:.3g} measured",
    )


def _round_up(value: float) -> float:
    """The next number that reads well on an axis; 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        f * power for f in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0) if f * power >= value * (1 - 1e-9)
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _line(name: str, style: str, points: Sequence[tuple[float, float]]) -> Line:
    path = " ".join(f"{'L' if i else 'M'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(points))
    return Line(name, style, path, points[-1])


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)
