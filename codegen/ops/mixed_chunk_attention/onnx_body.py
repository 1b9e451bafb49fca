"""Mixed chunk attention as two model-local ONNX functions over standard operators, valid at any opset from 12 on.

One has the projections and calls the other, which is what lies between them, and what a kernel can take the place of.
The last chunk is padded with zeros inside the function, unless it is the only one, and preceding chunks are summed by
an exclusive CumSum. Parts, names and dtypes are those of `codegen/ops/gated_attention/onnx_body.py`.

Shape legend: B batch, S tokens = G chunks of C, E hidden, F expanded, N base.
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.ops.function_body import computed_in
from codegen.ops.gated_attention.onnx_body import COMPUTE, DOMAIN, UnitBody, declared, unit_attributes, words
from codegen.spec import MixedChunkAttention, PositionBias

HEADS = ("quad_query_BSN", "lin_query_BSN", "quad_key_BSN", "lin_key_BSN")


def function_name(spec: MixedChunkAttention) -> str:
    """ "MixedChunkAttention", then one word for each optional part of the body."""
    return "MixedChunkAttention" + _summed(spec) + words(spec)


def chunks_name(spec: MixedChunkAttention) -> str:
    """ "MixedChunks", then one word for each optional part of what is between the projections."""
    biased = spec.bias is not PositionBias.NONE
    return "MixedChunks" + _summed(spec) + "Causal" * spec.causal + "Biased" * biased


def _summed(spec: MixedChunkAttention) -> str:
    return "Summed" * (spec.causal and not spec.averaged)


def attributes(spec: MixedChunkAttention, dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: sizes, and the ONNX numbers of x's dtype and of that between the projections."""
    return [ir.AttrInt64("chunk", spec.chunk), *unit_attributes(spec, dtype)]


def chunks_attributes(spec: MixedChunkAttention, dtype: ir.DataType) -> list[ir.Attr]:
    """Of a call of what is between the projections, for a unit of this dtype."""
    sizes = {"chunk": spec.chunk, "expanded_size": spec.expanded, "base_size": spec.base}
    return [ir.AttrInt64(name, number) for name, number in (sizes | {"compute": int(computed_in(dtype))}).items()]


def functions(spec: MixedChunkAttention, opset: int) -> list[ir.Function]:
    """The unit, with inputs x [B, S, E] and the operands of `roles` and output [B, S, E] in x's dtype; and the function
    that it calls, see `chunks_function`."""
    inner = chunks_function(spec, opset)
    body = _Body()
    x, operands = body.inputs(spec)
    gate, value, latent = body.expanded(spec, x, operands)
    tokens = body.take(body.op("Shape", [x], "x_shape"), [1])
    heads = body.heads(spec, latent, operands, body.count(tokens))
    bias = body.score_bias(spec, operands, body.count(body.attribute("chunk")))
    given = [body.as_number(gate), value, *heads, *([] if bias is None else [bias])]
    passed = [ir.RefAttr(name, name, ir.AttributeType.INT) for name in inner.attributes]
    call = ir.Node(DOMAIN, inner.name, given, passed, num_outputs=1)
    call.outputs[0].name = body.unique("gated_BSF")
    body.nodes.append(call)
    output = body.projected(body.cast(call.outputs[0], "dtype", "product_BSF"), operands)
    imported = {"": opset, DOMAIN: 1}
    graph = ir.Graph([x, *operands.values()], [output], nodes=body.nodes, opset_imports=imported)
    outer = ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared(attributes(spec, COMPUTE)))
    return [outer, inner]


def chunks_function(spec: MixedChunkAttention, opset: int) -> ir.Function:
    """Inputs gate and value [B, S, F], four heads [B, S, N], and [C, C] to be added to scores if the spec has a bias,
    all of the dtype `compute`; the output is [B, S, F]."""
    body = _Body()
    gate, value = ir.Value(name="gate_BSF"), ir.Value(name="value_BSF")
    heads = [ir.Value(name=name) for name in HEADS]
    bias = None if spec.bias is PositionBias.NONE else ir.Value(name="bias_CC")
    quad_query, lin_query, quad_key, lin_key = heads
    tokens = body.take(body.op("Shape", [gate], "gate_shape"), [1])
    base, expanded, chunk = (body.attribute(n) for n in ("base_size", "expanded_size", "chunk"))
    size = body.op("Max", [body.op("Min", [chunk, tokens], "at_most_S"), body.ints([1])], "rows")
    padding = body.op("Mod", [body.op("Neg", [tokens], "minus_S"), size], "padding")
    query, key = (body.by_chunk(v, padding, size, base) for v in (quad_query, quad_key))
    chunks = body.by_chunk(value, padding, size, expanded)
    bias_of_rows = None if bias is None else body.corner(bias, size)
    mixed = body.quadratic(spec, query, key, chunks, bias_of_rows, body.count(size), chunk, [0, 1, 3, 2])
    if spec.causal:
        queries, keys = (body.by_chunk(v, padding, size, base) for v in (lin_query, lin_key))
        between = body.op("MatMul", [queries, body.preceding(spec, keys, chunks, chunk)], "between")
        mixed = body.by_token(body.op("Add", [mixed, between], "both"), tokens, expanded)
    else:
        total = body.op("MatMul", [body.turned(lin_key, [0, 2, 1]), value], "total_BNF")
        divided = body.op("Div", [lin_query, body.as_number(tokens)], "divided")
        between = body.op("MatMul", [divided, total], "between")
        mixed = body.op("Add", [body.by_token(mixed, tokens, expanded), between], "both")
    output = body.op("Mul", [gate, mixed], "output_BSF")
    inputs = [gate, value, *heads, *([] if bias is None else [bias])]
    graph = ir.Graph(inputs, [output], nodes=body.nodes, opset_imports={"": opset})
    return ir.Function(DOMAIN, chunks_name(spec), graph=graph, attributes=declared(chunks_attributes(spec, COMPUTE)))


class _Body(UnitBody):
    """With chunks."""

    def by_chunk(self, x: ir.Value, padding: ir.Value, rows: ir.Value, size: ir.Value) -> ir.Value:
        """[B, G, rows, size] of [B, S, size], zeros behind the last token."""
        ends = self.concat([self.ints([0, 0, 0, 0]), padding, self.ints([0])], "ends")
        padded = self.op("Pad", [x, ends, self.literal(0.0)], f"{x.name}_padded")
        return self.op("Reshape", [padded, self.concat([self.ints([0, -1]), rows, size])], f"{x.name}_chunks")

    def by_token(self, x: ir.Value, tokens: ir.Value, size: ir.Value) -> ir.Value:
        """[B, S, size] of [B, G, C, size]."""
        flat = self.op("Reshape", [x, self.concat([self.ints([0, -1]), size])], "flat")
        return self.op("Slice", [flat, self.ints([0]), tokens, self.ints([1])], "mixed_BSF")

    def corner(self, bias: ir.Value, rows: ir.Value) -> ir.Value:
        """The first rows and columns of [C, C]."""
        ends = self.concat([rows, rows], "corner")
        return self.op("Slice", [bias, self.ints([0, 0]), ends, self.ints([0, 1])], "bias_of_rows")

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
