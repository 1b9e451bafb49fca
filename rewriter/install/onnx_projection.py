"""Products with new weights in a file: keys, values and queries for other heads, and the output's projection.

New weights are stored the way the old ones were (`rewriter/install/onnx_weights.py`), equal ones once.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from passes.dataflow import Array
from passes.refused_readers import path_read_elsewhere
from passes.site import AttentionSite, Operand
from passes.targets.replacement import Replacement
from passes.weights.head_gains import gains_like, stored_gains
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_kept_operator import kept_operator, stem_is_inside
from rewriter.install.onnx_layout import arrange
from rewriter.install.onnx_obstacles import group_size, laid_freely, unflattened_input
from rewriter.install.onnx_path import rewire
from rewriter.install.onnx_quantised import emit_product
from rewriter.install.onnx_weights import Emitted, emit_like, emit_plain


def reproject(
    editor: Editor, site: AttentionSite, role: str, operand: Operand, heads: int, weight: Array, bias: Array | None
) -> float:
    """Feed the path from its stem on with a projection to `heads` heads."""
    projection = operand.projection
    stem = editor.value(operand.stem)
    order = list(operand.stem_features)
    rows = weight.reshape(heads, operand.dim, -1)[:, order].reshape(heads * operand.dim, -1)
    tokens = ("b", "s") if operand.batch_first else ("s", "b")
    nodes: list[ir.Node] = []
    out, error = _project(editor, nodes, operand, rows, f"{site.name}.{role}")
    if bias is not None:
        vector = bias.reshape(heads, operand.dim)[:, order].reshape(-1)
        assert projection.bias is not None
        emitted = emit_like(editor.value(projection.bias), vector, f"{site.name}.{role}.bias", editor.write.unique)
        added = editor.hold(nodes, emitted)
        out = editor.write.op(nodes, "Add", [out, added], f"{site.name}.{role}.projected")
    wanted, present = (editor.capture.element_type(v) for v in (operand.stem, projection.output))
    if wanted is not None and present is not None and wanted != present:
        out = editor.write.op(nodes, "Cast", [out], f"{site.name}.{role}.cast", to=int(wanted))
    axes = operand.stem_axes
    kept = kept_operator(editor, site)
    inside = kept is not None and stem_is_inside(editor, kept, role, operand)
    if kept is not None and inside:
        axes = ("b", "s", "hd") if kept.flat else ("b", "h", "s", "d")
    elif laid_freely(operand):
        axes = ("b", "h", "s", "d")
    group = group_size(editor.capture.flow, operand)
    out = arrange(editor.write, nodes, out, tokens, axes, heads, operand.dim, f"{site.name}.{role}", group)
    producer = stem.producer()
    assert producer is not None
    editor.graph.insert_after(producer, nodes)
    if inside:
        editor.fed[role] = out
        return error
    at_stem = operand.seam == operand.stem
    seam = rewire(editor, operand, stem, out, heads, copied=not at_stem and _must_copy(editor, site, operand, heads))
    editor.seams[operand.seam] = (out, axes) if at_stem else (seam, operand.seam_axes)
    return error


def _must_copy(editor: Editor, site: AttentionSite, operand: Operand, heads: int) -> bool:
    """Whether another attention goes on reading a path with all heads; caches are one for all that read them."""
    cached = operand.past is not None or bool(operand.presents) or bool(stored_gains(operand))
    return heads != operand.heads and not cached and path_read_elsewhere(editor.capture.flow, site, operand)


def regain(editor: Editor, site: AttentionSite, role: str, operand: Operand, replacement: Replacement) -> list[str]:
    """A norm on the path multiplies the new heads by their own numbers; returns removed initializers."""
    removed: list[str] = []
    for part, name in stored_gains(operand).items():
        assert operand.norm is not None and operand.norm.gains is not None
        old, reader = editor.value(name), editor.capture.nodes[operand.norm.gains.reader]
        shape = editor.capture.flow.shape(name)
        numbers = gains_like(operand, replacement.tensors[f"{role}_{part}"], shape)
        emitted = emit_like(old, numbers, f"{site.name}.{role}.{part}", editor.write.unique)
        _exchange(editor, old, emitted, [reader])
        removed += editor.unread(old)
    return removed


def _project(editor: Editor, nodes: list[ir.Node], operand: Operand, rows: Array, name: str) -> tuple[ir.Value, float]:
    """The product with `rows` [out, in], without bias; and the error of weights that had to be quantised anew."""
    projection, x = operand.projection, three_axes(editor, operand)
    if len(editor.capture.flow.shape(x.name or "")) == 2:  # one sequence, without a batch
        shape = editor.write.ints([1, -1, rows.shape[1]], f"{name}.sequence")
        x = editor.write.op(nodes, "Reshape", [x, shape], f"{name}.input")
    quantised = editor.capture.quantised.get(projection.node)
    if quantised is not None:
        product = emit_product(quantised, x, rows.T, f"{name}.weight", editor.write.unique)
        nodes += product.nodes
        editor.register(product.initializers)
        return product.value, product.error
    store = emit_like if projection.weight_axes is None else emit_plain
    stored = rows if projection.out_first else rows.T
    emitted = store(editor.value(projection.weight), stored, f"{name}.weight", editor.write.unique)
    matrix = editor.hold(nodes, emitted)
    if projection.out_first:
        matrix = editor.write.op(nodes, "Transpose", [matrix], f"{name}.weight_t", perm=[1, 0])
    return editor.write.op(nodes, "MatMul", [x, matrix], f"{name}.matmul"), emitted.error


def project_output(editor: Editor, replacement: Replacement) -> tuple[list[str], float]:
    """Give the output projection its new weight and bias; returns removed initializers, requantisation error."""
    site, out = replacement.site, replacement.site.out
    removed: list[str] = []
    worst = 0.0
    for part, name in () if out is None else (("weight", out.weight), ("bias", out.bias)):
        array = replacement.tensors.get(f"out_{part}")
        if array is None or name is None or out is None:
            continue
        old = editor.value(name)
        shape = editor.capture.flow.shape(name)
        shaped = array.reshape(shape) if part == "bias" else out.stored(array, shape)
        store = emit_plain if part == "weight" and out.weight_axes is not None else emit_like
        emitted = store(old, shaped, f"{site.name}.out.{part}", editor.write.unique)
        last = editor.value(out.output).producer()
        _exchange(editor, old, emitted, [editor.capture.nodes[out.node], *([] if last is None else [last])])
        removed += editor.unread(old)
        worst = max(worst, emitted.error)
    return removed, worst


def _exchange(editor: Editor, old: ir.Value, emitted: Emitted, readers: Sequence[ir.Node]) -> None:
    """`readers`, of which the first comes first, read the new weight instead of `old`."""
    nodes: list[ir.Node] = []
    new = editor.hold(nodes, emitted)
    editor.graph.insert_before(readers[0], nodes)
    for reader in readers:
        for position, value in enumerate(reader.inputs):
            if value is old:
                reader.replace_input_with(position, new)


def three_axes(editor: Editor, operand: Operand) -> ir.Value:
    """What the projection reads, with an axis of tokens."""
    name = unflattened_input(editor.capture, operand)
    assert name is not None  # sites where it is lost are not installed
    return editor.value(name)
