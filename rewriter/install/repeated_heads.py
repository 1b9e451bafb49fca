"""The door out for attentions whose module cannot be rebuilt: their forward stays, their K/V projections shrink.

The new projections compute each head that is left once and lay it out where the old ones had it and its likes. The
forward goes on with repeated heads, which is what sharing heads means, and a cache among its arguments is seen through
a view that keeps each of them once. Queries and output projections that follow a merge are changed where they are
stored (`rewriter/install/turned_in_place.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.dataflow import Array, Flow, Value
from passes.targets.replacement import Replacement
from passes.weights.head_gains import stored_gains
from passes.weights.repetition import Part, repetition
from rewriter.errors import UnsupportedModel, first_line
from rewriter.install.call_record import CallRecord, record_calls, snapshot
from rewriter.install.huggingface import guard_saving
from rewriter.install.kept import Kept
from rewriter.install.neutral_norm import neutralise
from rewriter.install.repeated_projection import (
    RepeatedProjection,
    joined,
    parted,
    replace_projection,
    spread_parameter,
    swap,
    unspread_parameter,
)
from rewriter.install.reproduction import disagreement
from rewriter.install.smaller_caches import share_caches
from rewriter.install.stored_heads import HINT, gains_place, is_parameter, norm_behind, parameter_at, parts_of, place_of
from rewriter.install.stored_weight import Location
from rewriter.install.tensors import owned_parameter
from rewriter.install.turned_in_place import Writes, Written, filled, followed, put, turned_originals
from rewriter.module_modes import evaluating

TURNED = 'where queries and output cannot follow, heads can be merged by their mean alone: give this site merge="mean"'

SLACK = 10.0
"""Times its usual tolerance by which an answer of turned heads may differ: sums run in another order."""

Run = Callable[[], list[Any]]
Average = Callable[[Replacement, str], Replacement]
"""A replacement whose heads are averaged instead, for a reason."""


@dataclass(frozen=True)
class KeptForwards:
    """What became of sites whose forward is kept, by site name.

    Attributes:
        kept: what was done; refused: why it was not.
        averaged: replacements that took the place of those that were asked for.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    averaged: Mapping[str, Replacement] = field(default_factory=dict)


def keep_forwards(
    model: nn.Module,
    flow: Flow,
    groups: Mapping[str, Sequence[Replacement]],
    why: Mapping[str, str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    average: Average,
) -> KeptForwards:
    """Shrink the K/V projections of these sites, by path of the module that owns them, in place.

    `why`, by site name: what keeps their modules from being replaced. `average` is asked where queries and output
    cannot follow a merge that nobody asked for. Sites that share a projection are edited together; what is refused is
    left as it was.
    """
    if not groups:
        return KeptForwards()
    saves: dict[str, bool] = {}
    refused: dict[str, str] = {}
    averaged: dict[str, Replacement] = {}
    records = record_calls(model, dict.fromkeys(p for owner in groups for p in _outwards(owner)), args, kwargs)
    for members in _sharing(groups):
        replacements = [r for owner in members for r in groups[owner]]
        names = [r.site.name for r in replacements]
        callers = list(dict.fromkeys(_caller(_with_output(flow, owner, groups[owner]), records) for owner in members))
        try:
            settled = _with_averages(model, flow, replacements, average)
            try:
                saved = _edit(model, flow, settled, callers, records)
            except CannotTurn as error:
                settled = _averaged(settled, [r.turned for r in settled], error, average)
                saved = _edit(model, flow, settled, callers, records)
        except UnsupportedModel as error:
            refused.update({name: f"{why[name]}; {error}" for name in names})
            continue
        saves.update(dict.fromkeys(names, saved))
        averaged.update({r.site.name: r for r, old in zip(settled, replacements, strict=True) if r is not old})
    edited = {owner: rs for owner, rs in groups.items() if all(r.site.name in saves for r in rs)}
    shared = share_caches(model, edited, args, kwargs)
    return KeptForwards({n: Kept(not saved, n not in shared, why[n]) for n, saved in saves.items()}, refused, averaged)


class CannotTurn(UnsupportedModel):
    """Queries and output cannot follow a merge."""


def _with_averages(
    model: nn.Module, flow: Flow, replacements: Sequence[Replacement], average: Average
) -> list[Replacement]:
    """With heads averaged where queries or output are not stored, and where others share weights with such a site.

    Raises CannotTurn where that was not to be.
    """
    settled = list(replacements)
    for r in replacements:
        try:
            followed(model, flow, [r])
        except UnsupportedModel as error:
            alike = [bool({*_shared_weights(r)} & {*_shared_weights(other)}) for other in settled]
            settled = _averaged(settled, [a and s.turned for a, s in zip(alike, settled, strict=True)], error, average)
    return settled


def _averaged(
    replacements: Sequence[Replacement], which: Sequence[bool], reason: UnsupportedModel, average: Average
) -> list[Replacement]:
    if any(told and not r.may_average for r, told in zip(replacements, which, strict=True)):
        raise CannotTurn(f"{reason}; {TURNED}", hint=reason.hint)
    return [average(r, str(reason)) if told else r for r, told in zip(replacements, which, strict=True)]


def _shared_weights(replacement: Replacement) -> list[Value]:
    return [operand.projection.weight for _, operand in replacement.site.shared]


def _outwards(owner: str) -> list[str]:
    """The owner and the modules around it, the model itself last."""
    parts = owner.split(".") if owner else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _with_output(flow: Flow, owner: str, replacements: Sequence[Replacement]) -> str:
    """The innermost module that holds an owner, and its output projections where these change."""
    steps = owner.split(".") if owner else []
    outs = [r.site.out for r in replacements if r.site.out is not None and "out_weight" in r.tensors]
    for name in (flow.weights[v].name for out in outs for v in flow.weights_above(out.weight)):
        both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, name.split(".")[:-1], strict=False))
        steps = [step for step, _ in both]
    return ".".join(steps)


def _caller(owner: str, records: Mapping[str, CallRecord]) -> str:
    """The innermost module around an owner that is called: containers are not."""
    return next(path for path in _outwards(owner) if path in records)


def _sharing(groups: Mapping[str, Sequence[Replacement]]) -> list[list[str]]:
    """Owners in groups that have a projection in common."""
    found: list[tuple[set[str], list[str]]] = []
    for owner, replacements in groups.items():
        weights = {w for r in replacements for w in _shared_weights(r)}
        joined = [entry for entry in found if entry[0] & weights]
        found = [entry for entry in found if entry not in joined]
        members = [m for _, ms in joined for m in ms]
        found.append((weights.union(*(w for w, _ in joined)), [*members, owner]))
    return [members for _, members in found]


# ------------------------------------------------------------ edits


@dataclass(frozen=True)
class _Entry:
    """One operand's rows in one stored parameter."""

    part: Part
    rows: Array


@dataclass(frozen=True)
class _Edit:
    """One stored parameter and what becomes of it.

    Attributes:
        path, name: of the module that holds it, and of the parameter there.
        axes: along which its columns lie, joined.
        index: for each old column the new one that it repeats.
        wide: of the old shape, each new head repeated for the heads it stands for.
        projects: False for what a norm multiplies heads by.
    """

    path: str
    name: str
    axes: tuple[int, ...]
    index: Tensor
    wide: Tensor
    projects: bool = True

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def _edit(
    model: nn.Module,
    flow: Flow,
    replacements: Sequence[Replacement],
    callers: Sequence[str],
    records: Mapping[str, CallRecord],
) -> bool:
    """Edit and prove; True if the projections compute less, too. Raises UnsupportedModel, the model unchanged."""

    def run() -> list[Any]:
        with torch.no_grad(), evaluating(model):
            return [_called(model.get_submodule(path), records[path]) for path in callers]

    restore = _without_norms(model, flow, replacements, run)
    try:
        _prove_turns(model, flow, replacements, run)
        follow = followed(model, flow, replacements)
        edits = _edits(model, flow, replacements, follow)
        return _merged(model, edits, {key: w for key, w in follow.items() if key not in {e.key for e in edits}}, run)
    except UnsupportedModel:
        restore()
        raise


def _prove_turns(model: nn.Module, flow: Flow, replacements: Sequence[Replacement], run: Run) -> None:
    """Raises CannotTurn if the original, its heads turned and queries and output with them, answers otherwise."""
    if not any(r.combined for r in replacements):
        return
    expected = run()
    try:
        undo = put(model, turned_originals(model, flow, [r for r in replacements if r.combined]))
    except UnsupportedModel as error:
        raise CannotTurn(str(error), hint=error.hint) from error
    try:
        reason = _compared(run, expected, SLACK)
    finally:
        undo()
    if reason is not None:
        raise CannotTurn(f"heads that are turned do not give what they should: {reason}", hint=HINT)


def _without_norms(model: nn.Module, flow: Flow, replacements: Sequence[Replacement], run: Run) -> Callable[[], None]:
    """Make batch norms behind these sites' keys and values neutral, and prove that this changes nothing; what undoes
    it. Raises UnsupportedModel, the model unchanged."""
    operands = [o for r in replacements for o in (*(o for _, o in r.site.shared), *((r.site.q,) * r.turned))]
    found = {
        (columns.norm, columns.channels.tobytes()): columns
        for operand in operands
        if (columns := norm_behind(flow, operand)) is not None
    }
    if not found:
        return lambda: None
    expected = run()
    restore = neutralise(model, list(found.values()))
    reason = _compared(run, expected)
    if reason is not None:
        restore()
        raise UnsupportedModel(f"its batch normalisation cannot be moved into the projection: {reason}", hint=HINT)
    return restore


def _merged(model: nn.Module, edits: Sequence[_Edit], writes: Writes, run: Run) -> bool:
    """As `_edit`, of edits that are worked out, and what is to be written elsewhere."""
    unwrite = put(model, writes)
    try:
        return _repeated(model, edits, run)
    except Exception:
        unwrite()
        raise


def _repeated(model: nn.Module, edits: Sequence[_Edit], run: Run) -> bool:
    expected = _widened(model, edits, run)
    reasons = []
    for method in (_as_projections, _as_parameters):
        undo = method(model, edits)
        if undo is None:
            continue
        reason = _compared(run, expected)
        if reason is None:
            for edit in edits:
                guard_saving(model, edit.path)
            return method is _as_projections
        undo()
        reasons.append(reason)
    raise UnsupportedModel(f"repeated heads do not give what they should: {reasons[0]}", hint=HINT)


def _called(module: nn.Module, record: CallRecord) -> Any:
    with record.surroundings():
        return module(*map(snapshot, record.args), **{name: snapshot(value) for name, value in record.kwargs.items()})


def _compared(run: Run, expected: list[Any], slack: float = 1.0) -> str | None:
    try:
        return disagreement(run(), expected, slack)
    except Exception as error:  # whatever foreign code raises on a module it did not expect
        return f"{type(error).__name__}: {first_line(error)}"


def _edits(model: nn.Module, flow: Flow, replacements: Sequence[Replacement], follow: Writes) -> list[_Edit]:
    """One for each stored parameter that keys or values are projected or, in a norm, multiplied by, biases included;
    with what is to be written there for queries."""
    entries: dict[str, dict[bytes, _Entry]] = {}
    places: dict[str, Location] = {}
    norms: set[str] = set()
    for r in replacements:
        for role, operand in r.site.shared:
            for part, value, along, where in parts_of(flow, operand):
                if value is None:
                    continue
                place, rows = place_of(flow, operand, value, along, where), r.tensors[f"{role}_{part}"]
                if place is None or not is_parameter(model, place.key):
                    if part == "bias" and _stays(flow.value(value), where, rows):
                        continue
                    raise UnsupportedModel(f"its {role} {part} is computed, not stored", hint=HINT)
                entry = _Entry(Part(place.positions, r.grouped.kv_heads), rows)
                entries.setdefault(place.key, {})[place.positions.tobytes()] = entry
                places[place.key] = place
            for part, value in stored_gains(operand).items():
                numbers, heads = r.tensors[f"{role}_{part}"], r.grouped.kv_heads
                place, columns, rows = gains_place(flow, operand, value, numbers, heads)
                entries.setdefault(place.key, {})[columns.tobytes()] = _Entry(Part(columns, heads), rows)
                places[place.key] = place
                norms.add(place.key)
    edits = [_edit_of(model, places[key], list(found.values()), follow.get(key, ())) for key, found in entries.items()]
    return [replace(edit, projects=key not in norms) for key, edit in zip(entries, edits, strict=True)]


def _stays(old: Array, columns: Array, numbers: Array) -> bool:
    """Whether the new `numbers` of merged heads are what stands in `columns` [heads, dim] already, as zeros are."""
    heads, dim = columns.shape
    before, after = old.reshape(-1)[columns], numbers.reshape(-1, dim)
    return bool(np.array_equal(before, after[np.arange(heads) * len(after) // heads]))


def _edit_of(model: nn.Module, place: Location, entries: Sequence[_Entry], writes: Sequence[Written]) -> _Edit:
    path, _, name = place.key.rpartition(".")
    old = parameter_at(model, place.key)
    sizes = [old.shape[axis] for axis in place.axes]
    if int(np.prod(sizes)) != place.features:
        raise UnsupportedModel(f"it shares {place.key} with a module that was rewritten by itself", hint=HINT)
    try:
        laid = repetition(place.features, [entry.part for entry in entries])
    except ValueError as error:
        raise UnsupportedModel(str(error), hint=HINT) from error
    columns = joined(filled(old, writes), place.axes)
    new = [torch.from_numpy(np.ascontiguousarray(e.rows)).to(dtype=old.dtype, device=old.device) for e in entries]
    index = torch.from_numpy(laid.index).to(old.device)
    distinct = torch.cat(
        [columns[torch.from_numpy(laid.kept).to(old.device)], *(n.view(-1, *columns.shape[1:]) for n in new)]
    )
    return _Edit(path, name, place.axes, index, parted(distinct[index], place.axes, sizes).contiguous())


def _widened(model: nn.Module, edits: Sequence[_Edit], run: Run) -> list[Any]:
    """What the original answers with each new head repeated; it is left as it was."""
    held = [model.get_submodule(edit.path) for edit in edits]
    before = [module._parameters[edit.name] for module, edit in zip(held, edits, strict=True)]
    try:
        for module, edit in zip(held, edits, strict=True):
            module._parameters[edit.name] = nn.Parameter(edit.wide, requires_grad=False)
        return run()
    finally:
        for module, edit, parameter in zip(held, edits, before, strict=True):
            module._parameters[edit.name] = parameter


def _as_projections(model: nn.Module, edits: Sequence[_Edit]) -> Callable[[], None] | None:
    """Replace whole projection modules; what undoes it, or None if one of them does more than project."""
    by_path: dict[str, list[_Edit]] = {}
    for edit in (e for e in edits if e.projects):
        by_path.setdefault(edit.path, []).append(edit)
    modules = {path: model.get_submodule(path) for path in by_path}
    if not all(_projects(modules[path], mine) for path, mine in by_path.items()):
        return None
    new = {path: _projection(modules[path], mine) for path, mine in by_path.items()}
    for path, projection in new.items():
        replace_projection(model, path, projection)
    unspread = _as_parameters(model, [e for e in edits if not e.projects])

    def undo() -> None:
        unspread()
        for path, projection in new.items():
            swap(model, projection, modules[path])

    return undo


def _split(edits: Sequence[_Edit]) -> tuple[_Edit | None, _Edit | None]:
    """The edits of one module's matrix and bias."""
    matrix = next((e for e in edits if e.wide.dim() == 2), None)
    return matrix, next((e for e in edits if e.wide.dim() == 1), None)


def _projects(module: nn.Module, edits: Sequence[_Edit]) -> bool:
    """Whether a module is a projection by these parameters and nothing else: seen by trying."""
    matrix, bias = _split(edits)
    held = {name for name, parameter in module._parameters.items() if parameter is not None}
    if matrix is None or len(matrix.axes) > 1 or held != {e.name for e in edits}:
        return False
    if bias and not torch.equal(bias.index, matrix.index):
        return False
    if isinstance(module, RepeatedProjection):
        return True
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return False
    weight = module._parameters[matrix.name]
    assert weight is not None
    rows = joined(weight, matrix.axes)
    offset = None if bias is None else module._parameters[bias.name]
    x = torch.linspace(-1, 1, 6 * rows.shape[1], device=weight.device, dtype=weight.dtype).view(2, 3, -1)
    try:
        with torch.no_grad(), evaluating(module):
            return disagreement(module.forward(x), nn.functional.linear(x, rows, offset)) is None
    except Exception:  # whatever a module says to an input that it does not take
        return False


def _projection(module: nn.Module, edits: Sequence[_Edit]) -> RepeatedProjection:
    matrix, bias = _split(edits)
    assert matrix is not None
    weight = _distinct(module, matrix)
    index = matrix.index
    if isinstance(module, RepeatedProjection):  # it was edited before: its columns are repeated already
        index = index[module.index]
    return RepeatedProjection(weight, None if bias is None else _distinct(module, bias), index)


def _distinct(module: nn.Module, edit: _Edit) -> nn.Parameter:
    """Each new column once."""
    old = module._parameters[edit.name]
    assert old is not None
    first = np.unique(edit.index.cpu().numpy(), return_index=True)[1]
    rows = joined(edit.wide, edit.axes)[torch.from_numpy(first).to(edit.wide.device)]
    return owned_parameter(rows, old, old.requires_grad)


def _as_parameters(model: nn.Module, edits: Sequence[_Edit]) -> Callable[[], None]:
    """Shrink the stored parameters, which are spread out whenever they are read."""
    held = [model.get_submodule(edit.path) for edit in edits]
    before = [module._parameters[edit.name] for module, edit in zip(held, edits, strict=True)]
    for module, edit, old in zip(held, edits, before, strict=True):
        assert old is not None
        module._parameters[edit.name] = nn.Parameter(edit.wide, requires_grad=old.requires_grad)
        spread_parameter(module, edit.name, edit.index, edit.axes)

    def undo() -> None:
        for module, edit, old in zip(held, edits, before, strict=True):
            unspread_parameter(module, edit.name)
            module._parameters[edit.name] = old

    return undo
