"""The door out for attentions whose module cannot be rebuilt: their forward stays, their K/V projections shrink.

The new projections compute each head that is left once and lay it out where the old ones had it and its likes. The
forward goes on with repeated heads, which is what sharing heads means, and a cache among its arguments is seen through
a view that keeps each of them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.dataflow import Array, Flow, Value
from passes.site import AttentionSite, Operand
from passes.targets.replacement import Replacement
from passes.weights.head_gains import gains_like, stored_gains
from passes.weights.repetition import Part, repetition
from rewriter.errors import UnsupportedModel, first_line
from rewriter.install.call_record import CallRecord, record_calls, snapshot
from rewriter.install.huggingface import guard_saving
from rewriter.install.kept import Kept
from rewriter.install.neutral_norm import NormedColumns, neutralise, normed_columns
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
from rewriter.install.shared_cache import share, sharing, unshare
from rewriter.install.stored_weight import Location, locate
from rewriter.install.tensors import owned_parameter
from rewriter.module_modes import evaluating, unchanged

HINT = "rewrite its exported program instead: pass torch.export.export(model, ...)"

TURNED = 'a forward that is kept takes heads merged by their mean alone: give this site a target with merge="mean"'

Run = Callable[[], list[Any]]


def keep_forwards(
    model: nn.Module,
    flow: Flow,
    groups: Mapping[str, Sequence[Replacement]],
    why: Mapping[str, str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, Kept], dict[str, str]]:
    """Shrink the K/V projections of these sites, by path of the module that owns them, in place.

    `why`, by site name: what keeps their modules from being replaced. Returns what was done, and why the rest was
    not, both by site name. Sites that share a projection are edited together; what is refused is left as it was.
    """
    refused = {r.site.name: f"{why[r.site.name]}; {TURNED}" for rs in groups.values() for r in rs if r.turned}
    groups = {owner: rs for owner, rs in groups.items() if not any(r.turned for r in rs)}
    if not groups:
        return {}, refused
    saves: dict[str, bool] = {}
    records = record_calls(model, dict.fromkeys(p for owner in groups for p in _outwards(owner)), args, kwargs)
    for members in _sharing(groups):
        replacements = [r for owner in members for r in groups[owner]]
        names = [r.site.name for r in replacements]
        callers = list(dict.fromkeys(_caller(owner, records) for owner in members))
        try:
            saves.update(dict.fromkeys(names, _edit(model, flow, replacements, callers, records)))
        except UnsupportedModel as error:
            refused.update({name: f"{why[name]}; {error}" for name in names})
    edited = {owner: rs for owner, rs in groups.items() if all(r.site.name in saves for r in rs)}
    shared = share_caches(model, edited, args, kwargs)
    return {n: Kept(not saved, n not in shared, why[n]) for n, saved in saves.items()}, refused


def share_caches(
    model: nn.Module, groups: Mapping[str, Sequence[Replacement]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> set[str]:
    """Let the owners of edited sites see caches through views; names of the sites where that was proved.

    Tried where the model makes its cache itself when asked to (``use_cache``): with the views it must answer as
    without, for the recorded tokens and for a further one, and the cache must hold fewer heads.
    """
    owners = {o: rs[0].grouped.kv_heads for o, rs in groups.items() if o and len({r.grouped.kv_heads for r in rs}) == 1}
    plain = _with_cache(model, args, kwargs)
    if not owners or plain is None:
        return set()
    for owner, kv_heads in owners.items():
        share(model.get_submodule(owner), kv_heads)
    shared = _with_cache(model, args, kwargs)
    proved = shared is not None and disagreement(shared.answers, plain.answers) is None
    caching = {o for o in owners if (hooks := sharing(model.get_submodule(o))) is not None and hooks.heads is not None}
    if not proved or shared is None or shared.numbers >= plain.numbers:
        caching = set()
    for owner in owners.keys() - caching:
        unshare(model.get_submodule(owner))
    return {r.site.name for o in caching for r in groups[o]}


def _outwards(owner: str) -> list[str]:
    """The owner and the modules around it, the model itself last."""
    parts = owner.split(".") if owner else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _caller(owner: str, records: Mapping[str, CallRecord]) -> str:
    """The innermost module around an owner that is called: containers are not."""
    return next(path for path in _outwards(owner) if path in records)


def _sharing(groups: Mapping[str, Sequence[Replacement]]) -> list[list[str]]:
    """Owners in groups that have a projection in common."""
    found: list[tuple[set[str], list[str]]] = []
    for owner, replacements in groups.items():
        weights = {o.projection.weight for r in replacements for _, o in r.site.shared}
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
        return _merged(model, _edits(model, flow, replacements), run)
    except UnsupportedModel:
        restore()
        raise


def _without_norms(model: nn.Module, flow: Flow, replacements: Sequence[Replacement], run: Run) -> Callable[[], None]:
    """Make batch norms behind these sites' keys and values neutral, and prove that this changes nothing; what undoes
    it. Raises UnsupportedModel, the model unchanged."""
    found = {
        (columns.norm, columns.channels.tobytes()): columns
        for r in replacements
        for _, operand in r.site.shared
        if (columns := _normed(flow, operand)) is not None
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


def _normed(flow: Flow, operand: Operand) -> NormedColumns | None:
    projection = operand.projection
    return normed_columns(flow, projection.weight, 0 if projection.out_first else -1, operand.columns)


def _merged(model: nn.Module, edits: Sequence[_Edit], run: Run) -> bool:
    """As `_edit`, of edits that are worked out."""
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


def _compared(run: Run, expected: list[Any]) -> str | None:
    try:
        return disagreement(run(), expected)
    except Exception as error:  # whatever foreign code raises on a module it did not expect
        return f"{type(error).__name__}: {first_line(error)}"


def _edits(model: nn.Module, flow: Flow, replacements: Sequence[Replacement]) -> list[_Edit]:
    """One for each stored parameter that keys or values are projected or, in a norm, multiplied by, biases included."""
    entries: dict[str, dict[bytes, _Entry]] = {}
    places: dict[str, Location] = {}
    norms: set[str] = set()
    for r in replacements:
        for role, operand in r.site.shared:
            projection = operand.projection
            axes = projection.feature_axes(flow.shape(projection.weight))
            read = (
                ("weight", projection.weight, axes, operand.columns),
                ("bias", projection.bias, (), projection.bias_positions(operand.columns)),
            )
            for part, value, along, where in read:
                if value is None:
                    continue
                place, rows = _place(flow, operand, value, along, where), r.tensors[f"{role}_{part}"]
                if place is None or not _is_parameter(model, place.key):
                    if part == "bias" and _stays(flow.value(value), where, rows):
                        continue
                    raise UnsupportedModel(f"its {role} {part} is computed, not stored", hint=HINT)
                entry = _Entry(Part(place.positions, r.grouped.kv_heads), rows)
                entries.setdefault(place.key, {})[place.positions.tobytes()] = entry
                places[place.key] = place
            for part, value in stored_gains(operand).items():
                place, entry = _gains_entry(flow, operand, value, r.tensors[f"{role}_{part}"], r.grouped.kv_heads)
                entries.setdefault(place.key, {})[entry.part.columns.tobytes()] = entry
                places[place.key] = place
                norms.add(place.key)
    edits = [_edit_of(model, places[key], list(found.values())) for key, found in entries.items()]
    return [replace(edit, projects=key not in norms) for key, edit in zip(entries, edits, strict=True)]


def stores_heads(flow: Flow, site: AttentionSite) -> bool:
    """Whether keys' and values' matrices are stored, so that a forward that stays can be given fewer of their rows."""
    shared = ((o, o.projection) for _, o in site.shared)
    return all(
        _place(flow, o, p.weight, p.feature_axes(flow.shape(p.weight)), o.columns) is not None for o, p in shared
    )


def _place(flow: Flow, operand: Operand, value: Value, axes: Sequence[int], columns: Array) -> Location | None:
    """Where columns of a matrix (which has axes of them) or of a bias are stored."""
    summed = [axis for axis in operand.projection.weight_axes or () if axis not in axes]
    if axes and summed != sorted(summed):
        return None  # rows of its matrix run otherwise than what is stored
    place = locate(flow, value, axes, columns)
    if place is None and (normed := _normed(flow, operand)) is not None:
        return normed.matrix if axes else normed.bias
    return place


def _gains_entry(flow: Flow, operand: Operand, value: Value, numbers: Array, heads: int) -> tuple[Location, _Entry]:
    """Where what a norm multiplies heads by is stored, and what becomes of it; `numbers` [heads * dim]. Raises
    UnsupportedModel."""
    shape = flow.shape(value)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    by_head = len(long) > 1  # heads and features have an axis each
    place = locate(flow, value, long[:1] if by_head else ())
    if place is None or operand.norm is None or operand.norm.gains is None:
        raise UnsupportedModel("what a norm multiplies its heads by is computed, not stored", hint=HINT)
    where = np.arange(operand.heads)[:, None] if by_head else operand.norm.gains.places
    rows = gains_like(operand, numbers, shape).reshape(heads, -1) if by_head else numbers
    return place, _Entry(Part(place.positions[where], heads), rows)


def _stays(old: Array, columns: Array, numbers: Array) -> bool:
    """Whether the new `numbers` of merged heads are what stands in `columns` [heads, dim] already, as zeros are."""
    heads, dim = columns.shape
    before, after = old.reshape(-1)[columns], numbers.reshape(-1, dim)
    return bool(np.array_equal(before, after[np.arange(heads) * len(after) // heads]))


def _is_parameter(model: nn.Module, key: str) -> bool:
    return any(name == key for name, _ in model.named_parameters(remove_duplicate=False))


def _edit_of(model: nn.Module, place: Location, entries: Sequence[_Entry]) -> _Edit:
    path, _, name = place.key.rpartition(".")
    old = _parameter(model, path, name)
    sizes = [old.shape[axis] for axis in place.axes]
    if int(np.prod(sizes)) != place.features:
        raise UnsupportedModel(f"it shares {place.key} with a module that was rewritten by itself", hint=HINT)
    try:
        laid = repetition(place.features, [entry.part for entry in entries])
    except ValueError as error:
        raise UnsupportedModel(str(error), hint=HINT) from error
    columns = joined(old.detach(), place.axes)
    new = [torch.from_numpy(np.ascontiguousarray(e.rows)).to(dtype=old.dtype, device=old.device) for e in entries]
    index = torch.from_numpy(laid.index).to(old.device)
    distinct = torch.cat(
        [columns[torch.from_numpy(laid.kept).to(old.device)], *(n.view(-1, *columns.shape[1:]) for n in new)]
    )
    return _Edit(path, name, place.axes, index, parted(distinct[index], place.axes, sizes).contiguous())


def _parameter(model: nn.Module, path: str, name: str) -> nn.Parameter:
    try:
        found = model.get_submodule(path)._parameters.get(name)
    except AttributeError:
        found = None
    if found is None:
        raise UnsupportedModel(f"{path}.{name} is no parameter of the module", hint=HINT)
    return found


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


# ------------------------------------------------------------ caches


@dataclass(frozen=True)
class _Cached:
    """Answers for the recorded tokens and for one more, and how many numbers the cache then holds."""

    answers: list[Any]
    numbers: int


def _with_cache(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Cached | None:
    """None where the model makes no cache that it hands out."""
    tokens = next((n for n in ("decoder_input_ids", "input_ids", "decoder_inputs_embeds") if n in kwargs), None)
    if args or tokens is None or "use_cache" not in kwargs:
        return None
    given = {**kwargs, "use_cache": True}
    try:
        with torch.no_grad(), evaluating(model), unchanged(model):
            first = model(**given)
            cache = first.past_key_values
            if tokens == "input_ids" and (mask := given.get("attention_mask")) is not None:
                given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            second = model(**{**given, tokens: given[tokens][:, -1:], "past_key_values": cache})
    except Exception:  # whatever a model says to a call that it does not take
        return None
    if cache is None or not (numbers := _numbers(cache)):
        return None
    return _Cached([_main(first), _main(second)], numbers)


def _main(output: Any) -> Tensor:
    found = output[0] if isinstance(output[0], Tensor) else output[1]
    assert isinstance(found, Tensor)
    return found


def _numbers(cache: Any) -> int:
    """Elements of all keys and values in a cache, or in the two of a decoder with cross-attention."""
    pair = (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None))
    layers = [layer for part in (pair if all(pair) else (cache,)) for layer in getattr(part, "layers", ())]
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(t.numel() for t in tensors if isinstance(t, Tensor))
