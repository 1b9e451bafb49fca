"""Grouped-query attention as a model-local ONNX function over standard operators.

The function works at any opset from 12 on. The query group is folded into rows, so keys and values are never
repeated. Its name says which optional parts its body has; numbers are attributes, so that a registered kernel
of the same name can read them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from codegen.ops.function_body import FunctionBody
from codegen.ops.grouped_query_attention.onnx_sight import sparse_attributes, sparse_words, visible
from codegen.spec import GroupedQueryAttention

DOMAIN = "rewriter.ops"

ANY_OPSET = 12
"""The oldest that the body is valid at; its nodes are the same at all later ones."""

# shapes: B batch, H query heads, N key/value heads, G = H / N, S queries, T keys, D features, E value features


def function_name(spec: GroupedQueryAttention) -> str:
    """ "GroupedQueryAttention", then one word for each optional part of the body."""
    parts = {
        "Causal": spec.causal,
        "Bias": spec.bias,
        "Softcap": spec.softcap is not None,
        "Sinks": spec.sinks,
        "ZeroMaskedRows": spec.masked_rows_are_zero,
        "Sparse": bool(spec.pattern),
    }
    words = [name for name, present in parts.items() if present]
    return "".join(["GroupedQueryAttention", *words, *sparse_words(spec.pattern)])


def attributes(spec: GroupedQueryAttention, dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: head counts, scale, softcap and the ONNX number of the dtype it computes in."""
    found = [
        ir.AttrInt64("num_heads", spec.heads),
        ir.AttrInt64("kv_num_heads", spec.kv_heads),
        ir.AttrFloat32("scale", spec.scale),
        ir.AttrInt64("dtype", int(dtype)),
    ]
    found += [] if spec.softcap is None else [ir.AttrFloat32("softcap", spec.softcap)]
    return found + sparse_attributes(spec.pattern)


def function(spec: GroupedQueryAttention, opset: int) -> ir.Function:
    """The portable body: inputs q [B, H, S, D], k [B, N, T, D], v [B, N, T, E], bias and sinks if any.

    The output is [B, H, S, E].
    """
    body = Body()
    q, k, v = (ir.Value(name=n) for n in ("q_BHSD", "k_BNTD", "v_BNTE"))
    bias = ir.Value(name="bias") if spec.bias else None
    sinks = ir.Value(name="sinks") if spec.sinks else None
    q_shape, k_shape, v_shape = (body.op("Shape", [x], f"{x.name}_shape") for x in (q, k, v))
    scaled = body.op("Mul", [q, body.number("scale")], "scaled_BHSD")
    rows = body.concat(
        [body.ints([0]), body.take(k_shape, [1]), body.ints([-1]), body.take(q_shape, [3])], "folded_shape"
    )
    folded = body.op("Reshape", [scaled, rows], "q_BNRD")
    turned = body.op("Transpose", [k], "k_BNDT", [ir.AttrInt64s("perm", [0, 1, 3, 2])])
    folded_scores = body.op("MatMul", [folded, turned], "scores_BNRT")
    wide = body.concat([body.take(q_shape, [0, 1, 2]), body.take(k_shape, [2])], "scores_shape")
    scores = body.op("Reshape", [folded_scores, wide], "scores_BHST")
    scores = _modify(body, spec, scores, bias, q_shape, k_shape)
    if sinks is not None:
        scores = body.op("Concat", [scores, sinks], "scores_and_sinks", [ir.AttrInt64("axis", -1)])
    weights = body.op("Softmax", [scores], "weights_BHST", [ir.AttrInt64("axis", -1)])
    if sinks is not None:
        ends = [body.ints([0]), body.take(k_shape, [2]), body.ints([3])]
        weights = body.op("Slice", [weights, *ends], "key_weights_BHST")
    if spec.masked_rows_are_zero:
        empty = body.op("IsNaN", [weights], "empty")
        weights = body.op("Where", [empty, body.literal(0.0), weights], "finite_weights_BHST")
    folded_weights = body.op("Reshape", [weights, body.op("Shape", [folded_scores], "rows")], "weights_BNRT")
    mixed = body.op("MatMul", [folded_weights, v], "mixed_BNRE")
    final = body.concat([body.take(q_shape, [0, 1, 2]), body.take(v_shape, [3])], "output_shape")
    output = body.op("Reshape", [mixed, final], "output_BHSE")
    inputs = [q, k, v, *(x for x in (bias, sinks) if x is not None)]
    graph = ir.Graph(inputs, [output], nodes=body.nodes, opset_imports={"": opset})
    declared = [
        ir.Attr("num_heads", ir.AttributeType.INT, None),
        ir.Attr("kv_num_heads", ir.AttributeType.INT, None),
        ir.Attr("scale", ir.AttributeType.FLOAT, None),
        ir.Attr("dtype", ir.AttributeType.INT, None),
    ]
    if spec.softcap is not None:
        declared.append(ir.Attr("softcap", ir.AttributeType.FLOAT, None))
    declared += [ir.Attr(a.name, ir.AttributeType.INTS, None) for a in sparse_attributes(spec.pattern)]
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared)


def _modify(
    body: Body,
    spec: GroupedQueryAttention,
    scores: ir.Value,
    bias: ir.Value | None,
    q_shape: ir.Value,
    k_shape: ir.Value,
) -> ir.Value:
    if spec.softcap is not None:
        cap = body.number("softcap")
        scores = body.op("Mul", [body.op("Tanh", [body.op("Div", [scores, cap], "s")], "t"), cap], "capped_BHST")
    if bias is not None:
        scores = body.op("Add", [scores, bias], "biased_BHST")
    if spec.causal:
        scores = body.op("Where", [_causal(body, q_shape, k_shape), scores, body.literal(-np.inf)], "causal_BHST")
    if spec.pattern:
        shown = visible(body, spec.pattern, q_shape, k_shape)
        scores = body.op("Where", [shown, scores, body.literal(-np.inf)], "sparse_BHST")
    return scores


def _causal(body: Body, q_shape: ir.Value, k_shape: ir.Value) -> ir.Value:
    """[S, T], True where key j <= query i + (T - S)."""
    queries = body.op("Gather", [q_shape, body.scalar(2)], "S")
    keys = body.op("Gather", [k_shape, body.scalar(2)], "T")
    row = body.op("Range", [body.scalar(0), queries, body.scalar(1)], "i")
    column = body.op("Range", [body.scalar(0), keys, body.scalar(1)], "j")
    last = body.op("Add", [row, body.op("Sub", [keys, queries], "offset")], "last")
    rows = body.op("Reshape", [last, body.ints([-1, 1])], "last_S1")
    return body.op("Not", [body.op("Less", [rows, column], "later")], "keep_ST")


class Body(FunctionBody):
    """With numbers in the dtype that the function computes in."""

    def number(self, attribute: str) -> ir.Value:
        """A float attribute of the function, in the dtype it computes in."""
        raw = self.op("Constant", [], attribute, [ir.RefAttr("value_float", attribute, ir.AttributeType.FLOAT)])
        return self.cast(raw, "dtype", f"{raw.name}_cast")

    def literal(self, number: float) -> ir.Value:
        tensor = ir.tensor(np.array(number, np.float32))
        raw = self.op("Constant", [], "number", [ir.AttrTensor("value", tensor)])
        return self.cast(raw, "dtype", f"{raw.name}_cast")
