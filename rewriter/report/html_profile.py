"""The sections of a page about a profile: summary, the machine, times, operators; then what was rewritten, if known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from passes.picture import Picture, distinct
from rewriter.report.charts import bars
from rewriter.report.html_page import Page, short
from rewriter.report.html_rewrite import Card, rewrite_page, with_drawings

if TYPE_CHECKING:
    from rewriter.profile.result import Measured, Profile

SECTIONS = ("summary", "machine", "times", "operators")
OPERATORS = 14


def profile_page(profile: Profile, pictures: Sequence[Picture] = ()) -> Page:
    """`pictures` are of the model before; those of sites that were rewritten are shown, or all if that is not known."""
    before, after = profile.before, profile.after
    slowest = sorted({*before.ops, *after.ops}, key=lambda op: -max(_ms(before, op), _ms(after, op)))
    ops = {op: (_ms(before, op), _ms(after, op)) for op in slowest}
    times = {which: (getattr(before.ms, which), getattr(after.ms, which)) for which in ("min", "median", "max")}
    if before.cpu_ms is not None and after.cpu_ms is not None:
        times["processors, median"] = (before.cpu_ms.median, after.cpu_ms.median)
    values: dict[str, Any] = {
        "cards": _cards(profile),
        "facts": _facts(profile),
        "times": bars(times),
        "operators": bars(ops, OPERATORS),
    }
    page = Page("Profile, before and after", _lead(profile), SECTIONS, values)
    if profile.rewrite is not None:
        return page.joined(rewrite_page(with_drawings(profile.rewrite, pictures)))
    drawings = distinct(pictures)
    return page.joined(Page("", "", ("drawings",) if drawings else (), {"drawings": drawings}))


def _ms(measured: Measured, op: str) -> float:
    return float(measured.ops.get(op, 0.0))


def _lead(profile: Profile) -> str:
    factor = profile.speedup["median"]
    what = "new token" if profile.workload.mode == "decode" else "call"
    verdict = f"{factor:.2f} times as fast" if factor >= 1 else f"slower: {factor:.2f} times as fast"
    return f"The second model is {verdict} by the median {what} of {profile.runs} runs in turn, on {profile.device}."


def _cards(profile: Profile) -> tuple[Card, ...]:
    cards = [
        Card(f"speed, {which}", f"× {profile.speedup[which]:.2f}", _arrow(profile, which))
        for which in ("median", "min")
    ]
    for label, before, after in (
        ("peak memory", profile.before.peak_bytes, profile.after.peak_bytes),
        ("K/V cache", profile.before.kv_bytes, profile.after.kv_bytes),
    ):
        if before and after is not None:
            cards.append(Card(label, f"× {after / before:.2f}", f"{short(before, 'B')} → {short(after, 'B')}"))
    return tuple(cards)


def _arrow(profile: Profile, which: str) -> str:
    return f"{getattr(profile.before.ms, which):.3f} → {getattr(profile.after.ms, which):.3f} ms"


def _facts(profile: Profile) -> tuple[tuple[str, str], ...]:
    inputs = ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in profile.shapes.items())
    return (
        ("device", profile.device),
        ("provider", profile.provider),
        ("threads", str(profile.threads)),
        ("runs", str(profile.runs)),
        ("measured", f"{profile.workload}{', a CUDA graph replayed' if profile.cuda_graph else ''}"),
        ("inputs", inputs),
        *((name, version) for name, version in profile.versions.items()),
    )
