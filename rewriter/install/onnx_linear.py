"""Linear attention in a file: one call of a model-local function takes the place of the contractions and the softmax.

Projections, rotations, norms and caches stay as they are; feature maps and gains are new initializers. Masks are read
for which keys they hide from the last query, which is what they hide from all (`passes/hidden_keys.py`).
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.ops.linear_attention.onnx_body import attributes, function, stored
from passes.hidden_keys import HIDES, masks_of, more_than_hidden_keys
from passes.site import AttentionSite, Modifier
from passes.targets.replacement import Replacement
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.install.onnx_editor import Editor


def linear_obstacle(capture: OnnxCapture, replacement: Replacement) -> str | None:
    """Why a site whose operands can be laid out anew cannot become linear, None if it can."""
    site = replacement.site
    written = capture.written_out.get(site.owner)
    if written is not None and written.node.op_type == "GroupQueryAttention":
        return "its GroupQueryAttention operator takes a length for each sequence, so that positions differ by row"
    flows = [capture.flow, *([capture.other.flow] if capture.other is not None else [])]
    return next((reason for flow in flows if (reason := more_than_hidden_keys(flow, site)) is not None), None)


def linear_call(
    editor: Editor, nodes: list[ir.Node], replacement: Replacement, operands: list[ir.Value], dtype: ir.DataType
) -> ir.Value:
    """[B, H, S, E] in `dtype`, of q, k and v laid out as [B, heads, tokens, features]."""
    site, spec = replacement.site, replacement.linear
    assert spec is not None
    shown = _shown(editor, nodes, site)
    body = function(spec, editor.opset, shown is not None)
    held = [
        editor.write.constant(array, f"{site.name}.{role}")
        for role, array in stored(spec, replacement.tensors, dtype).items()
    ]
    inputs = [*operands, *held, *([] if shown is None else [shown])]
    described = attributes(spec, dtype, site.q.gain, site.k.gain)
    return editor.call_at(nodes, site.name, "attention", [body], inputs, described)


def _shown(editor: Editor, nodes: list[ir.Node], site: AttentionSite) -> ir.Value | None:
    """Boolean, broadcasts to [B, T]: what the last query sees; None where there is no mask."""
    total: ir.Value | None = None
    for number, modifier in enumerate(m for m in site.modifiers if m.value in masks_of(site)):
        name = f"{site.name}.shown{number or ''}"
        part = _kept(editor, nodes, modifier, _last_row(editor, nodes, site, modifier, name), name)
        both = f"{site.name}.shown_by_both"
        total = part if total is None else editor.write.op(nodes, "And", [total, part], both)
    return total


def _last_row(editor: Editor, nodes: list[ir.Node], site: AttentionSite, modifier: Modifier, name: str) -> ir.Value:
    """[B or 1, T or 1] of a mask [.., S, T], of which each axis but the last may be 1 or missing."""
    assert modifier.value is not None
    value, write, shape = editor.value(modifier.value), editor.write, editor.capture.flow.shape(modifier.value)

    def take(number: int, axis: int) -> ir.Value:
        index = write.scalar(number, ir.DataType.INT64, f"{name}.index")
        return write.op(nodes, "Gather", [value, index], f"{name}.part", axis=axis)

    if len(shape) > 1:
        value = take(-1, len(shape) - 2)
    leading = len(shape) - 2
    if len(shape) == 3 and shape[0] not in (1, site.heads):  # heads lie along the axis of the batch
        bounds = [write.ints([n], f"{name}.bound") for n in (0, 2**31, 0, site.heads)]
        return write.op(nodes, "Slice", [value, *bounds], f"{name}.of_first_head")
    by_batch = len(shape) == (5 if modifier.apart is not None else 4)
    for _ in range(leading - by_batch):  # heads, of which all see the same
        value = take(0, int(by_batch))
    if by_batch:
        return value
    return write.op(nodes, "Reshape", [value, write.ints([1, -1], f"{name}.flat")], f"{name}.by_key")


def _kept(editor: Editor, nodes: list[ir.Node], modifier: Modifier, row: ir.Value, name: str) -> ir.Value:
    """Boolean: which keys a row of a mask keeps."""
    write = editor.write
    assert modifier.value is not None
    if modifier.kind != "bias":
        row = editor.as_boolean(nodes, modifier.value, row, f"{name}.boolean")
        return row if modifier.kind == "mask" else write.op(nodes, "Not", [row], name)
    assert modifier.number is not None
    dtype = editor.capture.element_type(modifier.value) or row.dtype or ir.DataType.FLOAT
    if modifier.number != 1.0:
        row = write.op(nodes, "Mul", [row, write.scalar(modifier.number, dtype, f"{name}.factor")], f"{name}.scaled")
    return write.op(nodes, "Greater", [row, write.scalar(HIDES, dtype, f"{name}.least")], name)
