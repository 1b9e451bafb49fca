"""Where a file's attention cannot be written anew: its K/V projections shrink, and repeat to the old layout.

Whatever follows the projections stays as it is; it works on repeated heads, which is what sharing heads means. Queries
and the output projection, where they follow a merge, get new numbers and keep their shapes. The same for graphs of
torch is `rewriter/install/fx_repeat.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array, Flow, Value
from passes.projections import layout_of
from passes.refused_readers import read_elsewhere
from passes.site import AttentionSite, Operand, Projection
from passes.targets.replacement import Replacement
from passes.token_blocks import parted_behind
from passes.weights.repetition import Part, Repetition, repetition
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_obstacles import too_old, unflattened_input
from rewriter.install.onnx_quantised import emit_product
from rewriter.install.onnx_weights import Emitted, emit_like, emit_plain


def repeatable(capture: OnnxCapture, replacement: Replacement, others: Sequence[Replacement]) -> bool:
    """Whether a site that is not written anew for the way its tokens lie, what else reads its weights or the age of the
    file can repeat its heads behind the projections.

    `others` are all replacements of the file: a projection that two of them read is left alone, and so is one that an
    attention reads that stays as it is.
    """
    site = replacement.site
    otherwise = any(_parted(capture, o) or unflattened_input(capture, o) is None for o in (site.k, site.v))
    if not (site.by_blocks or otherwise or site.stays or too_old(capture)):
        return False
    special = (replacement.mixing, replacement.linear, replacement.decoupled)
    if any(spec is not None for spec in special) or replacement.pattern:
        return False
    if not stays_possible(capture, site):
        return False
    if "q_weight" in replacement.tensors and not _plain(capture, site.q.projection):
        return False
    outputs = {o.projection.output for _, o in _changed(replacement)}
    elsewhere = (o.projection.output for r in others if r is not replacement for o in r.site.operands)
    if outputs & set(elsewhere):
        return False
    try:
        for output in outputs:
            _laid(replacement, output)
    except ValueError:
        return False
    return True


def stays_possible(capture: OnnxCapture, site: AttentionSite) -> bool:
    """Whether, as far as a site alone tells, what follows its projections can go on with heads that they repeat."""
    if (site.joined and not site.whole) or site.cached or site.k.presents or site.v.presents:
        return False
    if site.owner in capture.written_out:
        return False
    plain = all(_plain(capture, o.projection) for _, o in site.shared)
    return plain and not read_elsewhere(capture.flow, site)


def _parted(capture: OnnxCapture, operand: Operand) -> bool:
    flow, given = capture.flow, operand.projection.input
    return len(flow.shape(given)) == 3 and parted_behind(flow, operand, given)


def _plain(capture: OnnxCapture, projection: Projection) -> bool:
    """Whether a projection is one product with a stored matrix, of floats or integers, and one bias at most.

    The matrix may be stored by heads, and heads and features lie on axes of their own behind the product.
    """
    if projection.weight_axes is not None:
        layout = layout_of(capture.flow, capture.flow.nodes[projection.node])
        if isinstance(layout, str) or not layout.features_last or layout.summed > 1:
            return False
    return projection.factor == 1.0 and _biased(capture.flow, projection) is not None


def _biased(flow: Flow, projection: Projection) -> Value | None:
    """The projection's result with its bias, also where heads and features have axes of their own as it is added."""
    if projection.bias_index is None:
        return projection.output
    readers = flow.live_readers(projection.output)
    in_order = np.array_equal(projection.bias_index, np.arange(projection.features))
    if len(readers) != 1 or readers[0].op != "Add" or projection.bias not in readers[0].inputs or not in_order:
        return None
    return readers[0].outputs[0]


def _changed(replacement: Replacement) -> list[tuple[str, Operand]]:
    """Operands that are projected anew, by role: keys and values, and queries that follow them."""
    queries = [("q", replacement.site.q)] if "q_weight" in replacement.tensors else []
    return [*replacement.site.shared, *queries]


def _laid(replacement: Replacement, output: Value) -> Repetition:
    """Raises ValueError where heads of keys and values, or others, read the same columns."""
    spec = replacement.grouped
    read = [(role, o) for role, o in _changed(replacement) if o.projection.output == output]
    parts = [Part(o.columns, spec.heads if role == "q" else spec.kv_heads) for role, o in read]
    return repetition(read[0][1].projection.features, parts)


def repeat_heads(editor: Editor, replacement: Replacement) -> tuple[list[ir.Node], float]:
    """Edit the projections of keys and values; returns nodes that may be unread now, and the worst relative error of
    weights that had to be quantised anew."""
    outputs = dict.fromkeys(o.projection.output for _, o in _changed(replacement))
    done = [_reproject(editor, replacement, output) for output in outputs]
    return [node for node, _ in done], max(error for _, error in done)


def _reproject(editor: Editor, replacement: Replacement, output: Value) -> tuple[ir.Node, float]:
    site, tensors, flow = replacement.site, replacement.tensors, editor.capture.flow
    shared = [(role, o) for role, o in _changed(replacement) if o.projection.output == output]
    projection, laid, name = shared[0][1].projection, _laid(replacement, output), f"{site.name}.{shared[0][0]}"
    matrix = projection.matrix(flow.value(projection.weight))
    rows = np.concatenate([
        (matrix if projection.out_first else matrix.T)[laid.kept], *(tensors[f"{role}_weight"] for role, _ in shared)
    ])  # fmt: skip
    nodes: list[ir.Node] = []
    out, error = _product(editor, nodes, projection, rows, name)
    if projection.bias is not None:
        kept = np.asarray(flow.value(projection.bias)).reshape(-1)[laid.kept]
        vector = np.concatenate([kept, *(tensors[f"{role}_bias"] for role, _ in shared)])
        store = emit_like if len(flow.shape(projection.bias)) == 1 else emit_plain
        bias, _ = _held(editor, nodes, projection.bias, vector, f"{name}.bias", store)
        out = editor.write.op(nodes, "Add", [out, bias], f"{name}.projected")
    lead, axes = len(flow.shape(projection.input)) - 1, flow.shape(output)
    if not np.array_equal(laid.index, np.arange(projection.features)):
        index = editor.write.ints(laid.index.tolist(), f"{name}.heads")
        out = editor.write.op(nodes, "Gather", [out, index], f"{name}.repeated", axis=lead)
    biased = _biased(flow, projection)
    assert biased is not None
    if len(axes) > lead + 1:
        apart = editor.write.ints([*(0 for _ in axes[:lead]), *axes[lead:]], f"{name}.apart")
        out = editor.write.op(nodes, "Reshape", [out, apart], f"{name}.by_head")
    old = editor.value(biased)
    given, wanted = (editor.capture.element_type(v) for v in (projection.input, biased))
    if wanted is not None and given is not None and wanted != given:
        out = editor.write.op(nodes, "Cast", [out], f"{name}.cast", to=int(wanted))
    producer = old.producer()
    assert producer is not None
    out.type, out.shape = old.type, old.shape
    editor.graph.insert_after(producer, nodes)
    old.replace_all_uses_with(out, replace_graph_outputs=True)
    editor.standing_in[biased] = out
    return producer, error


def _product(
    editor: Editor, nodes: list[ir.Node], projection: Projection, rows: Array, name: str
) -> tuple[ir.Value, float]:
    """What a projection reads times `rows` [out, in], stored as its own are, and the error of that."""
    x, quantised = editor.value(projection.input), editor.capture.quantised.get(projection.node)
    if quantised is not None:
        product = emit_product(quantised, x, rows.T, f"{name}.weight", editor.write.unique)
        nodes += product.nodes
        editor.register(product.initializers)
        return product.value, product.error
    laid = rows if projection.out_first else rows.T
    store = emit_like if projection.weight_axes is None else emit_plain
    weight, error = _held(editor, nodes, projection.weight, laid, f"{name}.weight", store)
    if projection.out_first:
        weight = editor.write.op(nodes, "Transpose", [weight], f"{name}.weight_t", perm=[1, 0])
    return editor.write.op(nodes, "MatMul", [x, weight], f"{name}.matmul"), error


def _held(
    editor: Editor,
    nodes: list[ir.Node],
    like: Value,
    array: Array,
    name: str,
    store: Callable[..., Emitted],
) -> tuple[ir.Value, float]:
    """Numbers stored as the program stores the old ones, and the error of that."""
    emitted = store(editor.value(like), array, name, editor.write.unique)
    return editor.hold(nodes, emitted), emitted.error
