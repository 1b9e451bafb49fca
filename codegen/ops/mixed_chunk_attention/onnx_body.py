"""Mixed chunk attention as a model-local ONNX function over standard operators, valid at any opset from 12 on.

The last chunk is padded with zeros inside the function, and preceding chunks are summed by an exclusive CumSum.
Parts, names and dtypes are those of `codegen/ops/gated_attention/onnx_body.py`.

Shape legend: B batch, S tokens = G chunks of C, E hidden, F expanded, N base.
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.ops.gated_attention.onnx_body import COMPUTE, DOMAIN, UnitBody, declared, unit_attributes, words
from codegen.spec import MixedChunkAttention


def function_name(spec: MixedChunkAttention) -> str:
    """ "MixedChunkAttention", then one word for each optional part of the body."""
    return "MixedChunkAttention" + "Summed" * (spec.causal and not spec.averaged) + words(spec)


def attributes(spec: MixedChunkAttention, dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: sizes, and the ONNX numbers of x's dtype and of that between the projections."""
    return [ir.AttrInt64("chunk", spec.chunk), *unit_attributes(spec, dtype)]


def function(spec: MixedChunkAttention, opset: int) -> ir.Function:
    """Inputs x [B, S, E] and the operands of `roles`; output [B, S, E] in x's dtype."""
    body = _Body()
    x, operands = body.inputs(spec)
    gate, value, latent = body.expanded(spec, x, operands)
    tokens = body.take(body.op("Shape", [x], "x_shape"), [1])
    quad_query, lin_query, quad_key, lin_key = body.heads(spec, latent, operands, body.count(tokens))
    base, expanded, chunk = (body.attribute(n) for n in ("base_size", "expanded_size", "chunk"))
    padding = body.op("Mod", [body.op("Neg", [tokens], "minus_S"), chunk], "padding")
    query, key = (body.by_chunk(v, padding, chunk, base) for v in (quad_query, quad_key))
    chunks = body.by_chunk(value, padding, chunk, expanded)
    mixed = body.quadratic(spec, query, key, chunks, operands, body.count(chunk), chunk, [0, 1, 3, 2])
    if spec.causal:
        queries, keys = (body.by_chunk(v, padding, chunk, base) for v in (lin_query, lin_key))
        between = body.op("MatMul", [queries, body.preceding(spec, keys, chunks, chunk)], "between")
        mixed = body.by_token(body.op("Add", [mixed, between], "both"), tokens, expanded)
    else:
        total = body.op("MatMul", [body.turned(lin_key, [0, 2, 1]), value], "total_BNF")
        divided = body.op("Div", [lin_query, body.as_number(tokens)], "divided")
        between = body.op("MatMul", [divided, total], "between")
        mixed = body.op("Add", [body.by_token(mixed, tokens, expanded), between], "both")
    output = body.gated(gate, mixed, operands)
    graph = ir.Graph([x, *operands.values()], [output], nodes=body.nodes, opset_imports={"": opset})
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared(attributes(spec, COMPUTE)))


class _Body(UnitBody):
    """With chunks."""

    def by_chunk(self, x: ir.Value, padding: ir.Value, chunk: ir.Value, size: ir.Value) -> ir.Value:
        """[B, G, C, size] of [B, S, size], zeros behind the last token."""
        ends = self.concat([self.ints([0, 0, 0, 0]), padding, self.ints([0])], "ends")
        padded = self.op("Pad", [x, ends, self.literal(0.0)], f"{x.name}_padded")
        return self.op("Reshape", [padded, self.concat([self.ints([0, -1]), chunk, size])], f"{x.name}_chunks")

    def by_token(self, x: ir.Value, tokens: ir.Value, size: ir.Value) -> ir.Value:
        """[B, S, size] of [B, G, C, size]."""
        flat = self.op("Reshape", [x, self.concat([self.ints([0, -1]), size])], "flat")
        return self.op("Slice", [flat, self.ints([0]), tokens, self.ints([1])], "mixed_BSF")

    def preceding(self, spec: MixedChunkAttention, key: ir.Value, value: ir.Value, chunk: ir.Value) -> ir.Value:
        """[B, G, N, F]: the sum of kᵀ v over the chunks before each, divided."""
        each = self.op("MatMul", [self.turned(key, [0, 1, 3, 2]), value], "each_BGNF")
        axis = self.scalar(1)
        total = self.op("CumSum", [each, axis], "before_BGNF", [ir.AttrInt64("exclusive", 1)])
        divisor = chunk
        if spec.averaged:
            numbers = self.count(self.take(self.op("Shape", [each], "shape"), [1]))
            counts = self.op("Mul", [self.op("Max", [numbers, self.ints([1])], "chunks_before"), chunk], "counts")
            divisor = self.op("Reshape", [counts, self.ints([-1, 1, 1])], "counts_G11")
        return self.op("Div", [total, self.as_number(divisor)], "states_BGNF")
