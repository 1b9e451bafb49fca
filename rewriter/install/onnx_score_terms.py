"""What a file adds to scores or multiplies them by, as the inputs of one attention node: masks, biases, sinks."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from passes.dataflow import Value
from passes.site import AttentionSite, Modifier
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_layout import heads_behind, lead


def tempered(
    editor: Editor, nodes: list[ir.Node], site: AttentionSite, query: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """Queries [B, H, S, D] times what each head's scores are multiplied by."""
    if site.temperature is None:
        return query
    assert site.temperature.value is not None
    factor, name = editor.value(site.temperature.value), f"{site.name}.tempered"
    if factor.dtype not in (None, dtype):
        factor = editor.write.op(nodes, "Cast", [factor], f"{name}.factor", to=int(dtype))
    step = "Mul" if site.temperature.number == 1.0 else "Div"
    return editor.write.op(nodes, step, [query, factor], name)


def summed_bias(
    editor: Editor, nodes: list[ir.Node], site: AttentionSite, dtype: ir.DataType, query: ir.Value
) -> ir.Value | None:
    """All masks and biases added up as one tensor in the scores' dtype; `query` is [B, H, S, D]."""
    total: ir.Value | None = None
    for number, modifier in enumerate(m for m in site.modifiers if m.kind in {"bias", "mask", "unmask"}):
        part = _additive(editor, nodes, modifier, f"{site.name}.bias{number or ''}", dtype, site.heads)
        if modifier.windows is not None:
            part = _by_batch(editor, nodes, part, modifier, query, f"{site.name}.bias{number or ''}")
        total = part if total is None else editor.write.op(nodes, "Add", [total, part], f"{site.name}.bias_sum{number}")
    return total


def _additive(
    editor: Editor, nodes: list[ir.Node], modifier: Modifier, name: str, dtype: ir.DataType, heads: int
) -> ir.Value:
    assert modifier.value is not None and modifier.number is not None
    value = editor.value(modifier.value)
    if modifier.kind == "bias":
        if modifier.number != 1.0:
            value = editor.write.op(
                nodes, "Mul", [value, editor.write.scalar(modifier.number, dtype, f"{name}.factor")], name
            )
    else:
        zero = editor.write.scalar(0.0, dtype, f"{name}.zero")
        low = float(np.finfo(dtype.numpy()).min) if dtype.numpy() in (np.float32, np.float16) else -np.inf
        masked = modifier.number if np.isinf(modifier.number) else max(modifier.number, low)
        fill = editor.write.scalar(masked, dtype, f"{name}.masked")
        pair = [zero, fill] if modifier.kind == "mask" else [fill, zero]
        value = editor.as_boolean(nodes, modifier.value, value, f"{name}.kept")
        value = editor.write.op(nodes, "Where", [value, *pair], name)
    if modifier.apart is not None:
        return _joined(editor, nodes, value, editor.capture.flow.shape(modifier.value), modifier.apart, name)
    if modifier.windows is not None:
        return value
    if modifier.heads_first:
        return heads_behind(editor.write, nodes, value, heads, f"{name}.by_head")
    if len(editor.capture.flow.shape(modifier.value)) == 3 and editor.capture.flow.shape(modifier.value)[0] != 1:
        value = lead(editor.write, nodes, value, [-1, heads], [1, 2], f"{name}.by_head")
    return value


def _by_batch(
    editor: Editor, nodes: list[ir.Node], value: ir.Value, modifier: Modifier, query: ir.Value, name: str
) -> ir.Value:
    """What broadcasts to [B / W, W, H, S, T], as what broadcasts to [B, H, S, T]."""
    assert modifier.windows is not None and modifier.value is not None
    shape = editor.capture.flow.shape(modifier.value)
    counted = editor.write.op(nodes, "Shape", [query], f"{name}.query")
    batch = editor.write.op(nodes, "Gather", [counted, editor.write.ints([0], f"{name}.first")], f"{name}.batch")
    images = editor.write.op(
        nodes, "Div", [batch, editor.write.ints([modifier.windows], f"{name}.per")], f"{name}.images"
    )
    ones = editor.write.ints([modifier.windows, 1, 1, 1], f"{name}.windows")
    wide = editor.write.op(nodes, "Concat", [images, ones], f"{name}.wide_shape", axis=0)
    value = editor.write.op(nodes, "Expand", [value, wide], f"{name}.wide")
    heads = (1, 1, 1, *shape)[-3]
    return lead(editor.write, nodes, value, [-1, heads], [3, 4], f"{name}.by_batch")


def _joined(
    editor: Editor, nodes: list[ir.Node], value: ir.Value, shape: tuple[int, ...], apart: tuple[int, int], name: str
) -> ir.Value:
    """What broadcasts to [B, KV, G, S, T], as what broadcasts to [B, KV * G, S, T]; `apart` is (KV, G)."""
    by_head = (1, 1, 1, *shape)[-4:-2] != (1, 1)
    groups, heads = apart if by_head else (1, 1)
    wide = editor.write.ints([1, groups, heads, 1, 1], f"{name}.apart")
    value = editor.write.op(nodes, "Expand", [value, wide], f"{name}.wide")
    return lead(editor.write, nodes, value, [-1, groups * heads], [3, 4], f"{name}.joined")


def sinks(editor: Editor, nodes: list[ir.Node], site: AttentionSite, query: ir.Value) -> list[ir.Value]:
    """What takes part in each row's softmax without a value; `query` is [B, H, S, D]."""
    found, name = list[ir.Value](), f"{site.name}.sinks"
    for m in site.modifiers:
        if m.kind != "sinks" or not m.value:
            continue
        if m.apart is None:
            found.append(_wide_sinks(editor, nodes, m.value, query, name))
        else:
            shape = editor.capture.flow.shape(m.value)
            found.append(_joined(editor, nodes, editor.value(m.value), shape, m.apart, name))
    return found


def _wide_sinks(editor: Editor, nodes: list[ir.Node], name: Value, query: ir.Value, scope: str) -> ir.Value:
    """Sinks [B, H, S, n], expanded after the queries: files may do so after the old scores, which would stay."""
    value, shape = editor.value(name), editor.capture.flow.shape(name)
    expand = value.producer()
    if expand is None or expand.op_type != "Expand" or expand.inputs[0] is None or len(shape) != 4:
        return value
    counted = editor.write.op(nodes, "Shape", [query], f"{scope}.query")
    rows = editor.write.op(nodes, "Gather", [counted, editor.write.ints([0, 1, 2], f"{scope}.axes")], f"{scope}.rows")
    size = editor.write.op(
        nodes, "Concat", [rows, editor.write.ints([shape[3]], f"{scope}.n")], f"{scope}.size", axis=0
    )
    return editor.write.op(nodes, "Expand", [expand.inputs[0], size], f"{scope}.wide")


def bias_has_queries(editor: Editor, site: AttentionSite) -> bool:
    """Whether masks and biases have a row per query, which onnxruntime's Attention insists on."""
    shape = editor.capture.flow.shape
    shapes = [shape(m.value) for m in site.modifiers if m.kind in {"bias", "mask", "unmask"} and m.value]
    queries = shape(site.q.seam)[next(i for i, a in enumerate(site.q.seam_axes) if "s" in a)]
    return not shapes or np.broadcast_shapes(*shapes, (1, 1))[-2] == queries


def rows_of_bias(editor: Editor, site: AttentionSite) -> Literal["one", "each"] | None:
    """Whether masks and biases have one row for all queries or one for each; None if that is not told, or not all
    have four axes. Without any, "each"."""
    masks = [m for m in site.modifiers if m.kind in {"bias", "mask", "unmask"} and m.value]
    found = set()
    for flow in [editor.capture.flow, *([editor.capture.other.flow] if editor.capture.other is not None else [])]:
        shapes = [flow.shape(m.value) for m in masks if m.value]
        queries, keys = (
            flow.shape(o.seam)[next(i for i, a in enumerate(o.seam_axes) if "s" in a)] for o in (site.q, site.k)
        )
        if masks and (any(m.apart for m in masks) or max(map(len, shapes)) != 4 or queries < 2):
            return None
        rows, columns = np.broadcast_shapes(*shapes)[-2:] if masks else (queries, keys)
        if columns != keys or rows not in (1, queries):
            return None
        found.add("one" if rows == 1 else "each")
    return found.pop() if len(found) == 1 else None  # type: ignore[return-value]
