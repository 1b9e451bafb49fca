"""Curves of a benchmark as an SVG: what grows, over steps or lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping

WIDE, HIGH, EDGE = 640, 360, 48
LABELS = 4 * EDGE
"""Room for names, at the right."""
COLOURS = ("#444444", "#c05a00", "#0060b0", "#2f7d32", "#8e3ca8")


def svg(curves: Mapping[str, Mapping[int, float]], note: str, *, powers: bool = False) -> str:
    """Lines through the points of each curve, and its name with its last value beside it.

    The vertical scale is logarithmic; with `powers` the horizontal one too, so that powers are straight lines. `note`
    says below what both are.
    """
    over = [math.log(x) if powers else float(x) for curve in curves.values() for x in curve]
    up = [math.log(y) for curve in curves.values() for y in curve.values()]
    left = min(over) if powers else 0.0

    def place(x: int, y: float) -> str:
        passed = ((math.log(x) if powers else x) - left) / max(max(over) - left, 1e-9)
        risen = (math.log(y) - min(up)) / max(max(up) - min(up), 1e-9)
        return f"{EDGE + (WIDE - EDGE - LABELS) * passed:.1f},{HIGH - EDGE - (HIGH - 2 * EDGE) * risen:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" '
             'font-size="12">']  # fmt: skip
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(place(x, y) for x, y in curve.items())
        label = f"{name}: {list(curve.values())[-1]:.3g}"
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDE - LABELS + 8}" y="{EDGE + 16 * number}" fill="{colour}">{label}</text>')
    parts.append(f'<text x="{EDGE}" y="{HIGH - EDGE / 3}">{note}</text>')
    return "\n".join([*parts, "</svg>\n"])
