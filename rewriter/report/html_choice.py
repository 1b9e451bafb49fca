"""The section about "auto": the frontier as a chart, and what each attention loses by itself, as a table of heat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewriter.report.charts import Chart, tradeoff
from rewriter.report.choice import choice_line


@dataclass(frozen=True)
class Cell:
    """What one target costs at one unit alone.

    Attributes:
        text: the drift, or nothing where it was not tried. shade: the drift as a part of the largest.
        chosen: whether the plan takes it.
    """

    text: str
    shade: float
    chosen: bool


@dataclass(frozen=True)
class UnitRow:
    """The sites of one unit, and a cell for "keep" and for each target."""

    sites: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ChoiceValues:
    """What the template draws."""

    line: str
    chart: Chart | None
    targets: tuple[str, ...]
    rows: tuple[UnitRow, ...]


def choice_values(auto: Mapping[str, Any]) -> ChoiceValues:
    """From the JSON of the key ``auto``."""
    targets = tuple(dict.fromkeys(e["target"] for e in auto["sensitivity"]))
    return ChoiceValues(choice_line(auto), _chart(auto), ("keep", *targets), _rows(auto, targets))


def _chart(auto: Mapping[str, Any]) -> Chart | None:
    """Over the K/V bytes that are left; over the flops where no bytes can be saved."""
    plan, mixes = auto["plan"], auto["frontier"]
    saves_bytes = any(mix["kv"] < 1 for mix in mixes)

    def left(mix: Mapping[str, Any]) -> float:
        return float(mix["kv"] if saves_bytes else 1 / mix["speed"])

    return tradeoff(
        f"Drift ({auto['drift_is']})",
        "K/V bytes left" if saves_bytes else "flops left",
        [(left(mix), mix["predicted_drift"]) for mix in mixes],
        (left(plan), plan["predicted_drift"]),
        plan["measured_drift"],
    )


def _rows(auto: Mapping[str, Any], targets: Sequence[str]) -> tuple[UnitRow, ...]:
    drifts: dict[tuple[str, ...], dict[str, float]] = {}
    for effect in auto["sensitivity"]:
        drifts.setdefault(tuple(effect["sites"]), {})[effect["target"]] = effect["drift"]
    largest = max((d for unit in drifts.values() for d in unit.values()), default=0.0) or 1.0
    rows = []
    for sites, found in drifts.items():
        taken = auto["plan"]["targets"].get(sites[0], "keep")
        tried = [
            Cell(f"{found[t]:.3g}" if t in found else "", max(found.get(t, 0.0), 0.0) / largest, t == taken)
            for t in targets
        ]
        rows.append(UnitRow(sites, (Cell("0", 0.0, taken == "keep"), *tried)))
    return tuple(rows)
