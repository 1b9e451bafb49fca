"""A rewrite's report as text that travels with the rewritten model: in a file's metadata, or beside a checkpoint.

Times and drawings are left out, and numbers are rounded, so that the same rewrite gives the same text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from passes.arithmetic import Arithmetic, CacheTerm, Work
from rewriter.report.choice import StoredChoice
from rewriter.report.printable import jsonable
from rewriter.report.rewrite_report import Change, Refused, RewriteReport, SiteRow
from rewriter.verify.result import Fidelity

PROPERTY = "rewriter.report"
FILE = "rewrite_report.json"


def to_text(report: RewriteReport) -> str:
    """JSON on one line."""
    found = {k: v for k, v in report.to_dict().items() if k != "seconds"}
    if report.arithmetic is not None:
        found["arithmetic"] = _arithmetic_dict(report.arithmetic)
    return json.dumps(_rounded(jsonable(found)), allow_nan=False, separators=(",", ":"))


def from_text(text: str | None) -> RewriteReport | None:
    """The report that `to_text` wrote; None for anything else, since files come from anywhere."""
    if text is None:
        return None
    try:
        return _report(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _report(found: Mapping[str, Any]) -> RewriteReport:
    drift, numbers = found["fidelity"], found.get("arithmetic")
    return RewriteReport(
        target=_text(found["target"]),
        sites=tuple(_site(row) for row in found["sites"]),
        refused=tuple(Refused(_text(row["name"]), _text(row["reason"])) for row in found["refused"]),
        parameters=_change(found["parameters"]),
        kv_bytes_per_token=_change(found["kv_bytes_per_token"]),
        flops=None if found["flops"] is None else _change(found["flops"]),
        fidelity=None if drift is None else _fidelity(drift),
        arithmetic=None if numbers is None else _arithmetic(numbers),
        choice=None if found.get("auto") is None else _choice(found["auto"]),
    )


def _choice(found: Mapping[str, Any]) -> StoredChoice:
    """Everything that is shown of it, each number and text read as such."""
    plan = found["plan"]
    return StoredChoice(
        {
            "budget": {_text(name): _real(limit) for name, limit in found["budget"].items()},
            "drift_is": _text(found["drift_is"]),
            "plan": {**_mix(plan), "measured_drift": _real(plan["measured_drift"])},
            "frontier": [_mix(mix) for mix in found["frontier"]],
            "sensitivity": [_effect(effect) for effect in found["sensitivity"]],
            "batches": {name: _count(found["batches"][name]) for name in ("all", "measured")},
            "held_out": found["held_out"] is True,
        }
    )


def _mix(found: Mapping[str, Any]) -> dict[str, Any]:
    kv, speed = _real(found["kv"]), _real(found["speed"])
    if not 0 <= kv <= 1 or speed <= 0:
        raise ValueError("not a part that is left")
    targets = {_text(name): _text(target) for name, target in found["targets"].items()}
    return {"predicted_drift": _real(found["predicted_drift"]), "kv": kv, "speed": speed, "targets": targets}


def _effect(found: Mapping[str, Any]) -> dict[str, Any]:
    sites = [_text(name) for name in found["sites"]]
    if not sites:
        raise ValueError("an effect of no site")
    numbers = {key: _real(found[key]) for key in ("drift", "local_error")}
    saved = {key: _real(found[key]) for key in ("kv_numbers_saved", "flops_saved", "parameters_saved")}
    return {"sites": sites, "target": _text(found["target"]), **numbers, **saved}


def _real(value: Any) -> float:
    """The number as it stands there, whole or not."""
    if _number(value) is None:
        raise TypeError("not a number")
    found: float = value
    return found


def _fidelity(found: Mapping[str, Any]) -> Fidelity | None:
    largest, cosine = _number(found["max_abs"]), _number(found["cosine"])
    if largest is None or cosine is None:
        return None
    return Fidelity(largest, cosine, _number(found["kl"]))


def _site(row: Mapping[str, Any]) -> SiteRow:
    notes = row.get("notes", [])
    return SiteRow(
        _text(row["name"]),
        _text(row["from"]),
        _text(row["to"]),
        exact=row["exact"] is True,
        error=_number(row["error"]),
        floor=_number(row["floor"]),
        requantised=_number(row.get("requantised")),
        merge=_text(row.get("merge", "mean")),
        notes=tuple(_text(note) for note in notes),
    )


def _arithmetic_dict(found: Arithmetic) -> dict[str, Any]:
    terms = [[t.sites, t.kv_before, t.kv_after, t.head_dim, t.value_dim] for t in found.cache]
    works = [[w.tokens, *w.mixing, *w.projections, w.batch] for w in (found.recorded, *found.curve)]
    return {"bytes_per_number": found.bytes_per_number, "cache": terms, "work": works}


def _arithmetic(found: Mapping[str, Any]) -> Arithmetic:
    terms = tuple(CacheTerm(*(_count(n) for n in term)) for term in found["cache"])
    works = []
    for row in found["work"]:
        tokens, a, b, c, d, batch = (_count(n) for n in row)
        works.append(Work(tokens, (a, b), (c, d), batch))
    lengths = [work.tokens for work in works[1:]]
    if len(lengths) < 2 or lengths[0] < 1 or lengths != sorted(set(lengths)):
        raise ValueError("not a curve")
    return Arithmetic(_count(found["bytes_per_number"]), terms, works[0], tuple(works[1:]))


def _change(found: Mapping[str, Any]) -> Change:
    return Change(_count(found["before"]), _count(found["after"]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("not a number")
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise TypeError("not a count")
    return value
