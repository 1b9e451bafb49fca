"""Graph surgery where an attention cannot be written anew: its K/V projections shrink, and repeat to the old layout.

Whatever follows the projections stays as it is; it works on repeated heads, which is what sharing heads means. Queries
and the output projection, where they follow a merge, get new numbers and keep their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from passes.dataflow import Array, Value
from passes.site import Operand, Projection
from passes.targets.replacement import Replacement
from passes.weights.repetition import Part, Repetition, repetition
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_editor import Editor
from rewriter.install.fx_emit import HINT, aten
from rewriter.install.fx_plan import output_parts


@dataclass(frozen=True)
class RepeatPlan:
    """One site to be rewritten in this way, and why it is not written anew."""

    replacement: Replacement
    why: str


@dataclass(frozen=True)
class _Reader:
    """One operand that a projection feeds, and its new rows.

    Attributes:
        heads: those that are left; of queries all.
    """

    site: str
    operand: Operand
    heads: int
    weight: Array
    bias: Array | None

    @property
    def part(self) -> Part:
        return Part(self.operand.columns, self.heads)


def plan_repeats(editor: Editor, replacement: Replacement, why: str) -> RepeatPlan:
    """Raises UnsupportedModel if a projection lies where the graph cannot be edited."""
    for value in output_parts(replacement):
        editor.node(value)
    for reader in _readers(replacement):
        projection = reader.operand.projection
        for value in (projection.input, projection.output):
            editor.node(value)
        stored = editor.flow.weights.get(projection.weight)
        if replacement.site.hidden_bias and stored is not None and stored.readers > 1:
            raise UnsupportedModel(
                f"{projection.weight} is read elsewhere, too (for relative positions, say); rewrite the module "
                "that the graph was made from, or its .onnx file"
            )
        if projection.weight_axes is not None:
            raise UnsupportedModel(f"{why}; its projections are stacks of matrices, which would have to be kept")
        if projection.bias_index is not None:
            raise UnsupportedModel(f"{why}; a bias is added further on, which would have to shrink with the projection")
    for output in {r.operand.projection.output for r in _readers(replacement)}:
        _laid([r for r in _readers(replacement) if r.operand.projection.output == output])
    return RepeatPlan(replacement, why)


def apply_repeats(editor: Editor, plans: Sequence[RepeatPlan]) -> None:
    """Edit all projections of these sites, each once."""
    by_output: dict[Value, dict[bytes, _Reader]] = {}
    for plan in plans:
        for reader in _readers(plan.replacement):
            here = by_output.setdefault(reader.operand.projection.output, {})
            here[reader.operand.columns.tobytes()] = reader
        site = plan.replacement.site
        editor.attended[site.name] = editor.node(site.output)
        editor.project_output(plan.replacement)
    for readers in by_output.values():
        _reproject(editor, list(readers.values()))


def _readers(replacement: Replacement) -> list[_Reader]:
    site, tensors, spec = replacement.site, replacement.tensors, replacement.grouped
    changed = [(role, operand, spec.kv_heads) for role, operand in site.shared]
    if "q_weight" in tensors:
        changed.append(("q", site.q, spec.heads))
    return [
        _Reader(site.name, operand, heads, tensors[f"{role}_weight"], tensors.get(f"{role}_bias"))
        for role, operand, heads in changed
    ]


def _laid(readers: Sequence[_Reader]) -> Repetition:
    try:
        return repetition(readers[0].operand.projection.features, [r.part for r in readers])
    except ValueError as error:
        raise UnsupportedModel(str(error), hint=HINT) from error


def _reproject(editor: Editor, readers: Sequence[_Reader]) -> None:
    """Put a projection to the distinct columns, repeated, in the place of the old projection's output."""
    projection, site = readers[0].operand.projection, readers[0].site
    laid = _laid(readers)
    old = editor.node(projection.output)
    weight = editor.parameters.of_all_columns(
        site, projection.weight, _rows(editor, projection, laid, readers), whole=_whole(projection)
    )
    bias = None
    if projection.bias is not None:
        kept = editor.flow.value(projection.bias).reshape(-1)[laid.kept]
        new = np.concatenate([kept, *(r.bias for r in readers if r.bias is not None)])
        bias = editor.parameters.of_all_columns(site, projection.bias, new, whole=_whole(projection))
    repeats = not np.array_equal(laid.index, np.arange(projection.features))
    device = editor.view.tensors[projection.output].device
    index = editor.parameters.table(site, torch.from_numpy(laid.index).to(device)) if repeats else None
    with editor.graph.inserting_before(old):
        out = editor.emitter.call(old, aten.linear.default, editor.node(projection.input), weight, bias)
        if index is not None:
            out = editor.emitter.call(old, aten.index_select.default, out, -1, index)
        wanted = editor.view.tensors[projection.output].dtype
        if wanted != editor.view.tensors[projection.input].dtype:
            out = editor.emitter.call(old, aten.to.dtype, out, wanted)
    old.replace_all_uses_with(out)


def _whole(projection: Projection) -> bool:
    return projection.out_first


def _rows(editor: Editor, projection: Projection, laid: Repetition, readers: Sequence[_Reader]) -> Array:
    matrix = editor.flow.value(projection.weight)
    rows = matrix if projection.out_first else matrix.T
    return np.concatenate([rows[laid.kept], *(r.weight for r in readers)])
