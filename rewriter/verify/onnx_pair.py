"""Compares a rewritten ONNX model with its original: validity, interface, untouched tensors, outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rewriter.capture.bounded_run import time_limit
from rewriter.capture.input_roles import InputRole, input_roles
from rewriter.capture.memory_limit import too_much
from rewriter.capture.onnx_load import load
from rewriter.capture.stretches import Stretches
from rewriter.errors import UnsupportedModel, first_line
from rewriter.verify.drift import Drift
from rewriter.verify.kv_cache import Array, Feeds, cache_ports
from rewriter.verify.record import Record, read_record
from rewriter.verify.result import Check, Fidelity, Verification
from rewriter.verify.script import Outputs, Rehearsal, Script, Size, play
from rewriter.verify.session import cpu_session, is_long
from rewriter.verify.tensors import differing_tensors
from rewriter.verify.wellformed import checker_complaint

TOLERANCE = {ir.DataType.FLOAT: 1e-4, ir.DataType.DOUBLE: 1e-4, ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 5e-2}
"""Largest difference of an exact rewrite's outputs, as a part of their largest magnitude, by computing type."""
QUANTISED_TOLERANCE = 5e-2
"""Where activations are quantised: another rounding before a quantiser may move an element by a whole step."""

_LOGITS_FROM = 16


@dataclass(frozen=True)
class _Side:
    """One model of the pair: how to read it and how a runtime is to open it."""

    model: ir.Model
    source: ir.Model | Path

    @staticmethod
    def of(given: ir.Model | str | Path) -> _Side:
        if isinstance(given, ir.Model):
            return _Side(given, given)
        return _Side(load(given), Path(given))


def verify_onnx(
    after: ir.Model | str | Path,
    before: ir.Model | str | Path,
    *,
    sizes: Sequence[Size] | None = None,
    seeds: Sequence[int] = (0, 1),
    threads: int = 1,
) -> Verification:
    """Check `after` against `before`, both in onnxruntime on the CPU and never both in its memory at once.

    Checks: ``valid`` (onnx's checker and strict shape inference; what the original fails too is not held against the
    rewrite), ``interface`` (same input and output names and types), ``untouched`` (initializers that the rewrite's
    record does not list are there, bit for bit), ``loads``, ``runs`` (at two sizes where the file allows it and, with
    a key/value cache, a prefill and two decode steps on the model's own cache), ``finite`` and, if every site was
    rewritten exactly, ``exact`` (outputs agree within the tolerance of the model's dtype).

    Fidelity is taken on the first output that belongs to no cache: cosine over its last axis, averaged over tokens
    that are no padding; KL(before ‖ after) if that output holds logits, that is, if it is called so or is as wide as
    the table that the ids index, and at least 16 wide.

    Args:
        sizes: (batch, length, past) to try in turn; read off the file by default.
        threads: of onnxruntime; one thread makes runs reproducible to the bit.

    Raises:
        InvalidModelFile, UsageError: a path cannot be opened.
        UnsupportedModel: an input is no tensor, or a loop does not come to an end.
    """
    new, old = _Side.of(after), _Side.of(before)
    record = read_record(new.model)
    checks = [_valid(new, old), _interface(new.model, old.model), _untouched(new.model, old.model, record)]
    fidelity, more = _compare_runs(new, old, record, sizes, seeds, threads)
    return Verification(fidelity, (*checks, *more))


# --- without running -----------------------------------------------------------------------------


def _valid(new: _Side, old: _Side) -> Check:
    complaint = checker_complaint(new.model)
    if complaint is None:
        return Check("valid", True, "passes onnx's checker and strict shape inference")
    if checker_complaint(old.model) is not None:
        return Check("valid", True, f"as the original: {complaint}")
    return Check("valid", False, complaint)


def _interface(new: ir.Model, old: ir.Model) -> Check:
    for kind, mine, theirs in (
        ("inputs", _ports(new.graph.inputs), _ports(old.graph.inputs)),
        ("outputs", _ports(new.graph.outputs), _ports(old.graph.outputs)),
    ):
        if mine != theirs:
            odd = [f"{name} ({dtype})" for name, dtype in sorted(set(mine) ^ set(theirs))] or ["another order"]
            return Check("interface", False, f"{kind} differ: {', '.join(odd[:5])}")
    return Check("interface", True, "same inputs and outputs")


def _ports(values: Sequence[ir.Value]) -> list[tuple[str, str]]:
    return [(value.name or "", str(value.dtype)) for value in values]


def _untouched(new: ir.Model, old: ir.Model, record: Record | None) -> Check:
    changed = record.changed if record is not None else frozenset[str]()
    wrong = differing_tensors(new, old, changed)
    note = "" if record is not None else " (the file records no rewrite, so all must be)"
    if wrong:
        names = ", ".join(repr(name) for name in wrong[:5])
        return Check("untouched", False, f"{len(wrong)} undeclared tensors are missing or differ: {names}{note}")
    return Check("untouched", True, f"all tensors outside the {len(changed)} declared ones are identical{note}")


# --- running -------------------------------------------------------------------------------------


def _compare_runs(
    new: _Side, old: _Side, record: Record | None, sizes: Sequence[Size] | None, seeds: Sequence[int], threads: int
) -> tuple[Fidelity | None, list[Check]]:
    ports = cache_ports(old.model)
    new_ports = cache_ports(new.model)
    changed = frozenset(
        n for n, r in ports.roles.items() if n in new_ports.roles and new_ports.roles[n].shape != r.shape
    )
    try:
        session = cpu_session(old.source, threads=threads, long=is_long(old.model))
    except Exception as error:  # onnxruntime's errors share no public base class
        if (refused := too_much(error)) is not None:
            raise refused from error
        return None, [Check("runs", False, f"the original does not load in onnxruntime: {first_line(error)}")]
    rehearsal = Rehearsal(old.model, session, ports, changed, time_limit(old.model))
    rehearsed = list(rehearsal.scripts(sizes, seeds))
    del session, rehearsal.session
    if not rehearsed:
        seen = rehearsal.trouble[0] if rehearsal.trouble else "no size to try"
        return None, [Check("runs", False, f"the original runs at no size that was tried: {seen}")]
    try:
        session = cpu_session(new.source, threads=threads, long=is_long(new.model))
    except Exception as error:
        if (refused := too_much(error)) is not None:
            raise refused from error
        return None, [Check("loads", False, first_line(error))]
    parts = f" in {len(session.stretches)} parts, as it is long" if isinstance(session, Stretches) else ""
    checks = [Check("loads", True, f"onnxruntime opens it{parts}")]
    comparison = _Comparison.of(old.model, set(ports.present.values()), record.caches if record is not None else {})
    for script, expected in rehearsed:
        try:
            got = play(session, new_ports, script, time_limit(new.model))
        except UnsupportedModel:
            raise
        except Exception as error:
            return None, [*checks, Check("runs", False, f"{script.label}: {first_line(error)}")]
        complaint = comparison.add(script, expected, got)
        if complaint is not None:
            return None, [*checks, Check("runs", False, f"{script.label}: {complaint}")]
    labels = "; ".join(script.label for script, _ in rehearsed)
    return comparison.main.fidelity(), [*checks, Check("runs", True, labels), *comparison.checks(record)]


@dataclass
class _Comparison:
    """Collects, over all scripts, how the outputs of the two models differ.

    Attributes:
        caches: for outputs that hold fewer heads than they did, the axis of heads, and how far each new head is from
            the old ones that it stands for.
    """

    model: ir.Model
    roles: tuple[InputRole, ...]
    main_name: str
    main: Drift
    others: dict[str, Drift]
    caches: dict[str, tuple[int, Drift]]
    not_finite: list[str]

    @staticmethod
    def of(model: ir.Model, paired: set[str], narrowed: Mapping[str, int]) -> _Comparison:
        names = [value.name or "" for value in model.graph.outputs]
        held = paired | set(narrowed)
        main = next((name for name in names if name not in held), names[0])
        others = {name: Drift(False) for name in names if name not in held and name != main}
        caches = {name: (axis, Drift(False)) for name, axis in narrowed.items() if name in names}
        roles = input_roles(model)
        return _Comparison(model, roles, main, Drift(_holds_logits(model, main, roles)), others, caches, [])

    def add(self, script: Script, expected: list[Outputs], got: list[Outputs]) -> str | None:
        """Take in one script's outputs; returns what makes them incomparable."""
        for feeds, old, new in zip(script.steps, expected, got, strict=True):
            for name, drift in {self.main_name: self.main, **self.others}.items():
                x, y = old[name], new[name]
                if x.shape != y.shape:
                    return f"output {name!r} has shape {list(y.shape)} instead of {list(x.shape)}"
                if x.dtype.kind != "f":
                    continue
                if bool((np.isfinite(x) & ~np.isfinite(y)).any()):
                    self.not_finite.append(f"{name!r} at {script.label}")
                x, y = _finite(x, y)
                drift.add(x, y, self._tokens(feeds, x.shape))
            for name, (axis, drift) in self.caches.items():
                spread = _spread(new[name], axis, old[name].shape)
                if spread is None:
                    shapes = f"{list(new[name].shape)} instead of {list(old[name].shape)} with fewer heads"
                    return f"cache {name!r} has shape {shapes}"
                drift.add(*_finite(old[name], spread))
        return None

    def _tokens(self, feeds: Feeds, shape: tuple[int, ...]) -> Array | None:
        """Which tokens are no padding, if the model takes a padding mask and the output has a row per token."""
        for role in self.roles:
            if role.kind == "mask" and role.axes[:2] == ("batch", "total") and len(shape) >= 3:
                mask = feeds[role.name][:, -shape[1] :]
                if mask.shape == shape[:2] and not role.additive:
                    keep = (mask == 0) if role.true_masks else (mask != 0)
                    return np.broadcast_to(keep.reshape(*keep.shape, *(1,) * (len(shape) - 3)), shape[:-1])
        return None

    def checks(self, record: Record | None) -> list[Check]:
        found = self.not_finite
        finite = Check(
            "finite", not found, f"not finite: {'; '.join(found[:3])}" if found else "all outputs are finite"
        )
        if record is None or not record.all_exact:
            return [finite]
        limit = tolerance(self.model)
        caches = [drift for _, drift in self.caches.values()]
        worst = max(drift.relative for drift in (self.main, *self.others.values(), *caches))
        detail = f"largest relative difference {worst:.2e}, allowed {limit:.0e}"
        return [finite, Check("exact", worst <= limit, detail)]


def _spread(array: Array, axis: int, shape: tuple[int, ...]) -> Array | None:
    """Heads along `axis` repeated so that the whole has `shape`; None if it cannot."""
    if len(shape) != array.ndim or not 0 <= axis < array.ndim or not array.shape[axis]:
        return None
    wide: Array = np.repeat(array, shape[axis] // array.shape[axis], axis)
    return wide if wide.shape == shape else None


def _finite(x: Array, y: Array) -> tuple[Array, Array]:
    """Both with zeros wherever one of them is not finite."""
    good = np.isfinite(x) & np.isfinite(y)
    return np.where(good, x, 0), np.where(good, y, 0)


def _holds_logits(model: ir.Model, name: str, roles: tuple[InputRole, ...]) -> bool:
    value = next(v for v in model.graph.outputs if (v.name or "") == name)
    width = value.shape[-1] if value.shape is not None and len(value.shape) else None
    if isinstance(width, int) and width < _LOGITS_FROM:
        return False
    tables = {role.bound for role in roles if role.kind == "ids"}
    return "logits" in name.lower() or (isinstance(width, int) and width in tables)


def tolerance(model: ir.Model) -> float:
    """How far outputs of an exact rewrite may lie apart, relative to their largest magnitude."""
    kinds = {node.op_type for node in model.graph}
    if kinds & {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QuantizeLinear"}:
        return QUANTISED_TOLERANCE
    types = {value.dtype for value in model.graph.initializers.values() if value.dtype is not None}
    return max((TOLERANCE[dtype] for dtype in types if dtype in TOLERANCE), default=TOLERANCE[ir.DataType.FLOAT])
