"""Conditional attention as a model-local ONNX function over standard operators, valid at any opset from 12 on.

Light heads go block by block, as in the torch body, in blocks of radius + 1 tokens at any length; heavy ones work on
gathered tokens. Routing is that of inference: routed keys have weight 1, and those that are padding are hidden.

Shape legend: B batch, S tokens = G blocks of C, M routed queries, N routed keys, H heads, D features of a head,
E hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_attention.reference import bucket
from codegen.ops.conditional_routing.onnx_body import DOMAIN, ConditionalBody, Routed, added, routed
from codegen.render import identifier

END = np.iinfo(np.int64).max
"""Behind the last of any axis."""

Held = dict[str, ir.Value]


def function_name(spec: ConditionalAttention, *, masked: bool) -> str:
    """Heads, whether there is padding, and a hash of the spec, whose numbers stand in the body."""
    words = [f"l{spec.light_heads}", f"h{spec.heavy_heads}", *(["masked"] if masked else [])]
    return str(identifier("conditional_attention", words, spec))


def function(spec: ConditionalAttention, opset: int, *, masked: bool) -> ir.Function:
    """Inputs x [B, S, hidden], with `masked` bool [B or 1, S] that is False for padding, and the parameters of
    `ConditionalAttention.shapes` in order; the output is like x."""
    x, mask = ir.Value(name="x_BSE"), ir.Value(name="mask_BS")
    held = {name: ir.Value(name=name) for name in spec.shapes}
    body = ConditionalBody(x, spec.hidden)
    shown = body.filled([body.batch, body.tokens], True, "all_BS")
    shown = body.op("And", [shown, mask], "shown_BS") if masked else shown
    seen = shown if masked else None
    queries = routed(body, spec.queries, held["query_router"], seen, "query")
    keys = routed(body, spec.keys, held["key_router"], seen, "key")
    heavy = _heavy(body, spec, shown, queries, keys, held)
    output = added(body, _light(body, spec, x, shown, held), heavy, queries, spec.hidden)
    if spec.output_bias:
        output = body.op("Add", [output, held["output_bias"]], "output_BSE")
    inputs = [x, *([mask] if masked else []), *held.values()]
    graph = ir.Graph(inputs, [output], nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("dtype", "compute")]
    return ir.Function(DOMAIN, function_name(spec, masked=masked), graph=graph, attributes=declared)


def _light(body: ConditionalBody, spec: ConditionalAttention, x: ir.Value, shown: ir.Value, held: Held) -> ir.Value:
    """[B, S, E]"""
    block, heads = spec.radius + 1, spec.light_heads
    rest = body.op("Mod", [body.tokens, body.ints([block])], "rest")
    missing = body.op("Mod", [body.op("Sub", [body.ints([block]), rest], "lacking"), body.ints([block])], "missing")

    def blocks(role: str, perm: Sequence[int]) -> ir.Value:
        projected = body.product(x, held, f"light_{role}")
        behind = body.filled([body.batch, missing, heads * spec.head_dim], 0.0, "behind")
        whole = body.joined([projected, behind], 1, f"{role}_padded")
        apart = body.reshaped(whole, [body.batch, -1, block, heads, spec.head_dim], f"{role}_BGCHD")
        return body.turned(apart, list(perm), f"{role}_blocks")

    query, value = blocks("query", (0, 1, 3, 2, 4)), blocks("value", (0, 1, 3, 2, 4))
    key = blocks("key", (0, 1, 3, 4, 2))  # B G H D C
    none_value = body.filled([body.batch, 1, heads, block, spec.head_dim], 0.0, "none")
    none_key = body.filled([body.batch, 1, heads, spec.head_dim, block], 0.0, "none")
    behind = body.filled([body.batch, missing], False, "hidden")
    seen = body.reshaped(body.joined([shown, behind], 1, "shown_padded"), [body.batch, -1, block], "shown_BGC")
    seen = _beside(body, seen, body.filled([body.batch, 1, block], False, "hidden"), 2)
    at = np.arange(block)
    distance = np.arange(3 * block)[None, :] - block - at[:, None]
    near = body.array(np.abs(distance) <= spec.radius, "near_CT")
    seen = body.reshaped(seen, [body.batch, -1, 1, 1, 3 * block], "shown_BG11T")
    visible = body.op("And", [seen, near], "visible_BG1CT")
    bias = None
    if spec.buckets:
        places = body.array(bucket(spec, distance), "buckets_CT")
        numbers = body.op("Gather", [body.cut(held["distances"], 1, 0, heads, "light_distances"), places], "bias_CTH")
        bias = body.turned(numbers, [2, 0, 1], "bias_HCT")
    near_keys, near_values = _beside(body, key, none_key, 4), _beside(body, value, none_value, 3)
    attended = _attended(body, spec, query, near_keys, near_values, visible, bias)
    merged = body.turned(attended, [0, 1, 3, 2, 4], "light_BGCHD")
    merged = body.reshaped(merged, [body.batch, -1, heads * spec.head_dim], "light_merged")
    return body.product(body.cut(merged, 1, 0, body.tokens, "light_BSF"), held, "light_output")


def _beside(body: ConditionalBody, blocks: ir.Value, none: ir.Value, axis: int) -> ir.Value:
    """Of [B, G, ...] each block between the two beside it, joined along an axis."""
    around = body.joined([none, blocks, none], 1, "around")
    before, after = body.cut(around, 1, 0, -2, "before"), body.cut(around, 1, 2, END, "after")
    return body.joined([before, blocks, after], axis, "beside")


def _heavy(
    body: ConditionalBody, spec: ConditionalAttention, shown: ir.Value, queries: Routed, keys: Routed, held: Held
) -> ir.Value:
    """[B, M, E]"""

    def heads(role: str, rows: ir.Value, perm: Sequence[int]) -> ir.Value:
        projected = body.product(body.op("Gather", [body.flat, rows], f"{role}_given"), held, f"heavy_{role}")
        apart = body.reshaped(projected, [body.batch, -1, spec.heavy_heads, spec.head_dim], f"{role}_apart")
        return body.turned(apart, list(perm), f"heavy_{role}_heads")

    query = heads("query", queries.rows, (0, 2, 1, 3))
    key, value = heads("key", keys.rows, (0, 2, 3, 1)), heads("value", keys.rows, (0, 2, 1, 3))
    seen = body.op("Gather", [body.reshaped(shown, [-1], "shown_N"), keys.rows], "keys_shown_BN")
    visible = body.reshaped(seen, [body.batch, 1, 1, -1], "visible_B11N")
    bias = None
    if spec.buckets:
        there = body.reshaped(keys.index, [body.batch, 1, -1], "keys_B1N")
        here = body.reshaped(queries.index, [body.batch, -1, 1], "queries_BM1")
        reach = np.arange(-spec.farthest, spec.farthest + 1)
        distance = body.op("Sub", [there, here], "distance_BMN")
        distance = body.op("Max", [distance, body.ints([-spec.farthest])], "not_before")
        distance = body.op("Min", [distance, body.ints([spec.farthest])], "not_behind")
        place = body.op("Add", [distance, body.ints([spec.farthest])], "place_BMN")
        number = body.op("Gather", [body.array(bucket(spec, reach), "buckets"), place], "buckets_BMN")
        own = body.cut(held["distances"], 1, spec.light_heads, END, "heavy_distances")
        bias = body.turned(body.op("Gather", [own, number], "bias_BMNH"), [0, 3, 1, 2], "bias_BHMN")
    attended = _attended(body, spec, query, key, value, visible, bias)
    merged = body.turned(attended, [0, 2, 1, 3], "heavy_BMHD")
    merged = body.reshaped(merged, [body.batch, -1, spec.heavy_heads * spec.head_dim], "heavy_merged")
    return body.product(merged, held, "heavy_output")


def _attended(
    body: ConditionalBody,
    spec: ConditionalAttention,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    visible: ir.Value,
    bias: ir.Value | None,
) -> ir.Value:
    """[..., S, D] of keys [..., D, T]; a query that sees nothing gets zeros."""
    scores = body.cast(body.op("MatMul", [query, key], "products"), "compute", "scores")
    scale = body.cast(body.array(np.array(spec.scale, np.float32), "number"), "compute", "scale")
    scores = body.op("Mul", [scores, scale], "scaled")
    if bias is not None:
        scores = body.op("Add", [scores, body.cast(bias, "compute", "bias")], "biased")
    kept = body.op("Where", [visible, scores, body.least()], "kept")
    weights = body.op("Softmax", [kept], "weights", [ir.AttrInt64("axis", -1)])
    weights = body.op("Mul", [weights, body.cast(visible, "compute", "seen")], "seen_weights")
    return body.op("MatMul", [body.cast(weights, "dtype", "weights"), value], "attended")
