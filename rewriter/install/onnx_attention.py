"""One grouped attention node in the place of two contractions and the softmax between them.

It is the standard Attention operator where the file's opset has it (23, 24), else a call of a model-local function.
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.ops.grouped_query_attention.onnx_body import attributes, function
from codegen.ops.grouped_query_attention.onnx_tiles import functions
from passes.site import AttentionSite
from passes.targets.replacement import Replacement
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_kept_operator import keep_operator, kept_operator, put_back
from rewriter.install.onnx_layout import canonical, from_canonical
from rewriter.install.onnx_linear import linear_call
from rewriter.install.onnx_obstacles import window_size
from rewriter.install.onnx_score_terms import bias_has_queries, rows_of_bias, sinks, summed_bias, tempered


def attend(editor: Editor, replacement: Replacement) -> None:
    """Readers of the site's output read the new attention, which reads what stands at the site's seams."""
    site, spec = replacement.site, replacement.grouped
    kept = kept_operator(editor, site)
    stays = not spec.pattern and replacement.linear is None
    if kept is not None and (stays or kept.node.op_type == "GroupQueryAttention"):
        put_back(editor, kept, spec.kv_heads, window_size(spec.pattern))
        return
    q, k, v = (editor.seams.get(o.seam, (editor.value(o.seam), o.seam_axes)) for o in (site.q, site.k, site.v))
    if (
        stays
        and editor.capture.flow.nodes[site.anchor].op == "Attention"
        and keep_operator(editor, site, spec.kv_heads, k, v, editor.seams.get(site.q.seam))
    ):
        return
    output = editor.value(site.output)
    after = output.producer()
    assert after is not None
    nodes: list[ir.Node] = []
    operands = [
        canonical(editor.write, nodes, value, axes, heads, f"{site.name}.{role}")
        for role, (value, axes), heads in (("q", q, spec.heads), ("k", k, spec.kv_heads), ("v", v, spec.kv_heads))
    ]
    dtype = editor.capture.element_type(site.output) or output.dtype or ir.DataType.FLOAT
    operands[0] = tempered(editor, nodes, site, operands[0], dtype)
    bias = None if replacement.linear is not None else summed_bias(editor, nodes, site, dtype, operands[0])
    plain = spec.softcap is None and not spec.masked_rows_are_zero and not spec.sinks and not spec.pattern
    if replacement.linear is not None:
        attended = linear_call(editor, nodes, replacement, operands, dtype)
    elif editor.opset in (23, 24) and plain and bias_has_queries(editor, site):
        attended = _standard(editor, nodes, site, spec.causal, operands, bias)
    else:
        attended = _function(editor, nodes, replacement, operands, bias, dtype)
    attended = from_canonical(editor.write, nodes, attended, site.output_axes, f"{site.name}.output")
    attended.type, attended.shape = output.type, output.shape
    editor.graph.insert_after(after, nodes)
    output.replace_all_uses_with(attended, replace_graph_outputs=True)


def _standard(
    editor: Editor, nodes: list[ir.Node], site: AttentionSite, causal: bool, operands: list[ir.Value],
    bias: ir.Value | None,
) -> ir.Value:  # fmt: skip
    inputs = operands if bias is None else [*operands, bias]
    return editor.write.op(nodes, "Attention", inputs, site.name, is_causal=int(causal), scale=site.scale)


def _function(
    editor: Editor, nodes: list[ir.Node], replacement: Replacement, operands: list[ir.Value], bias: ir.Value | None,
    dtype: ir.DataType,
) -> ir.Value:  # fmt: skip
    spec, site = replacement.grouped, replacement.site
    rows = rows_of_bias(editor, site)
    bodies = (
        [function(spec, editor.opset)] if rows is None else functions(spec, editor.opset, bias_by_key=rows == "one")
    )
    inputs = [*operands, *([] if bias is None else [bias]), *sinks(editor, nodes, site, operands[0])]
    return editor.call_at(nodes, site.name, "attention", bodies, inputs, attributes(spec, dtype))
