"""The sections of a page about a rewrite: summary, choice of "auto", sites, refusals, arithmetic, growth, drawings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from passes.picture import Picture, distinct
from rewriter.report.charts import Bar, Chart, bars, growth, remaining
from rewriter.report.html_choice import choice_values
from rewriter.report.html_page import Page, short, times
from rewriter.report.rewrite_report import Change, RewriteReport, SiteRow, note_lines, number, requantised_line

if TYPE_CHECKING:
    from passes.arithmetic import Arithmetic

SECTIONS = ("summary", "choice", "sites", "refused", "arithmetic", "growth", "drawings", "seconds")


@dataclass(frozen=True)
class Card:
    """One figure of the summary: what it is, how large, and what it was before."""

    label: str
    figure: str
    detail: str


@dataclass(frozen=True)
class HeatRow:
    """A row of the site table.

    Attributes:
        number: in execution order, from 0.
        heat: the error as a part of its floor; None if it was not measured.
        shade: the same between 0 and 1, for colours: 1 is an error that does not beat the floor.
    """

    number: int
    row: SiteRow
    error: str
    floor: str
    heat: float | None

    @property
    def shade(self) -> float:
        return min(self.heat or 0.0, 1.0)


def rewrite_page(report: RewriteReport) -> Page:
    """Everything that a rewrite's report knows."""
    rows = tuple(_heat_row(i, row) for i, row in enumerate(report.sites))
    found = report.arithmetic
    values: dict[str, Any] = {
        "report": report,
        "cards": _cards(report),
        "rows": rows,
        "notes": (
            *requantised_line([row.requantised for row in report.sites]),
            *note_lines([(row.name, row.notes) for row in report.sites]),
        ),
        "arithmetic": found,
        "cache": () if found is None else tuple((t, *_bytes(t.numbers, found.bytes_per_number)) for t in found.cache),
        "work_bars": () if found is None else _work_bars(found),
        "charts": () if found is None else tuple(c for c in _charts(found) if c is not None),
        "drawings": report.drawings,
        "total_seconds": sum(report.seconds.values()),
        "choice": None if report.choice is None else choice_values(report.choice.to_dict()),
    }
    return Page(f"Rewrite to {report.target}", lead(report), _present(report), values)


def with_drawings(report: RewriteReport, pictures: Sequence[Picture]) -> RewriteReport:
    """The report with drawings of those sites that it speaks of; one that travelled with a model has lost its own."""
    known = {row.name for row in report.sites} | {row.name for row in report.refused}
    found = distinct(p for p in pictures if p.name in known)
    return replace(report, drawings=found) if found else report


def _present(report: RewriteReport) -> tuple[str, ...]:
    there = {
        "choice": report.choice is not None,
        "arithmetic": report.arithmetic is not None,
        "growth": report.arithmetic is not None,
        "drawings": bool(report.drawings),
        "seconds": bool(report.seconds),
    }
    return tuple(name for name in SECTIONS if there.get(name, True))


def lead(report: RewriteReport) -> str:
    """What came out, in one sentence."""
    done = [row for row in report.sites if not row.kept]
    exact = sum(row.exact for row in done)
    kind = "all exactly" if exact == len(done) else f"{exact} exactly" if exact else "none exactly"
    refused = f", {len(report.refused)} refused" if report.refused else ""
    plural = "site" if len(done) == 1 else "sites"
    return f"{len(done)} {plural} rewritten to {report.target}, {kind}{refused}."


def _cards(report: RewriteReport) -> tuple[Card, ...]:
    cards = [
        _card("K/V cache per token", report.kv_bytes_per_token, "B"),
        *([] if report.flops is None else [_card("flops of a pass", report.flops, "")]),
        _card("parameters", report.parameters, ""),
    ]
    if report.fidelity is not None:
        drift = report.fidelity
        kl = "" if drift.kl is None else f", KL {drift.kl:.3g} nats"
        cards.append(Card("output drift", f"cos {drift.cosine:.4f}", f"max |Δ| {drift.max_abs:.3g}{kl}"))
    return tuple(cards)


def _card(label: str, change: Change, unit: str) -> Card:
    figure = "unchanged" if change.before == change.after else times(change.before, change.after)
    detail = f"{short(change.before, unit)} → {short(change.after, unit)}" if change.before != change.after else ""
    return Card(label, figure, detail or short(change.before, unit))


def _heat_row(index: int, row: SiteRow) -> HeatRow:
    heat = None if row.error is None or not row.floor else row.error / row.floor
    return HeatRow(index, row, number(row.error), number(row.floor), heat)


def _bytes(numbers: Sequence[int], each: int) -> tuple[int, ...]:
    return tuple(n * each for n in numbers)


def _charts(found: Arithmetic) -> tuple[Chart | None, ...]:
    lengths = [work.tokens for work in found.curve]
    totals = [work.total for work in found.curve]
    per_token = [sum(t.numbers[i] for t in found.cache) * found.bytes_per_number for i in (0, 1)]
    flops = growth(
        "Flops of one pass",
        lengths,
        {
            "before": ("before", [before for before, _ in totals]),
            "after": ("after", [after for _, after in totals]),
        },
        "",
    )
    left = remaining(
        "What is left of them",
        lengths,
        {
            "all flops": ("after", [_part(before, after) for before, after in totals]),
            "token mixing alone": ("after dashed", [_part(*work.mixing) for work in found.curve]),
        },
    )
    cache = growth(
        "K/V cache of one sequence",
        lengths,
        {
            name: (name, [float(n * bytes_) for n in lengths])
            for name, bytes_ in zip(("before", "after"), per_token, strict=True)
        },
        "B",
    )
    return flops, left, cache


def _work_bars(found: Arithmetic) -> tuple[Bar, ...]:
    work = found.recorded
    return bars({"projections, feed-forward": work.projections, "token mixing": work.mixing, "flops": work.total})


def _part(before: float, after: float) -> float:
    return after / before if before else 0.0
