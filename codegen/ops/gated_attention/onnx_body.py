"""A gated attention unit as a model-local ONNX function over standard operators, valid at any opset from 12 on.

The function's name says which parts its body has, its attributes hold all numbers. Projections are computed in the
file's dtype, everything between them in float32 at least, since squares of small scores vanish in half precision. Keys
that a causal unit hides are dropped after the square.

Shape legend: B batch, S tokens, E hidden, F expanded, N base, H = N / 2, R rows of queries, T keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from codegen.ops.activation.onnx_body import activate
from codegen.ops.function_body import FunctionBody, computed_in
from codegen.ops.gated_attention.reference import ROTARY_BASE
from codegen.spec import Activation, GatedAttention, MixedChunkAttention, PositionBias

DOMAIN = "rewriter.ops"
Gated = GatedAttention | MixedChunkAttention

TRANSPOSED = ("expand_weight", "out_weight")
"""Operands that a call takes as [in, out], and `spec.shapes` has as [out, in]."""

WORDS = {PositionBias.NONE: "", PositionBias.TOEPLITZ: "Distances", PositionBias.ROTARY: "RotaryBias"}


def function_name(spec: GatedAttention) -> str:
    """ "GatedAttentionUnit", then one word for each optional part of the body."""
    return "GatedAttentionUnit" + "OwnLength" * (spec.length is None) + words(spec)


def words(spec: Gated) -> str:
    """What differs in a body: order, bias, rotation, and activations other than SiLU."""
    kinds = zip(("Gate", "Value", "Base"), (spec.gate, spec.value, spec.latent), strict=True)
    told = "".join(
        part + ("Plain" if kind is None else kind.value.title().replace("_", ""))
        for part, kind in kinds
        if kind is not Activation.SILU
    )
    return "Causal" * spec.causal + WORDS[spec.bias] + "Unrotated" * (not spec.rotary) + told


def attributes(spec: GatedAttention, dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: sizes, divisor, the ONNX numbers of x's dtype and of that between the projections."""
    length = [ir.AttrInt64("length", spec.length)] if spec.length is not None else []
    return [*length, *unit_attributes(spec, dtype)]


def unit_attributes(spec: Gated, dtype: ir.DataType) -> list[ir.Attr]:
    sizes = {"hidden_size": spec.hidden, "expanded_size": spec.expanded, "base_size": spec.base}
    if spec.bias is PositionBias.TOEPLITZ:
        sizes["span"] = spec.span
    return [ir.AttrInt64(n, v) for n, v in (sizes | {"dtype": int(dtype), "compute": int(computed_in(dtype))}).items()]


def roles(spec: Gated) -> list[str]:
    """Operands behind x, in order; `TRANSPOSED` ones as [in, out], projections in x's dtype, others `computed_in`."""
    return list(spec.shapes)


def stored(spec: Gated, weights: Mapping[str, NDArray[Any]], dtype: ir.DataType) -> dict[str, NDArray[Any]]:
    """The operands as a call takes them, in order, from those of the spec's `shapes`; dtype is x's."""
    found = {}
    for role in roles(spec):
        kind = dtype if role.startswith(("expand_", "out_")) else computed_in(dtype)
        array = weights[role].T if role in TRANSPOSED else weights[role]
        found[role] = np.ascontiguousarray(array.astype(kind.numpy()))
    return found


def function(spec: GatedAttention, opset: int) -> ir.Function:
    """Inputs x [B, S, E] and `roles`; output [B, S, E] in x's dtype."""
    body = UnitBody()
    x, operands = body.inputs(spec)
    gate, value, latent = body.expanded(spec, x, operands)
    tokens = body.take(body.op("Shape", [x], "x_shape"), [1])
    positions = body.count(tokens)
    query, key = body.heads(spec, latent, operands, positions)
    divisor = tokens if spec.length is None else body.attribute("length")
    bias = body.score_bias(spec, operands, positions)
    mixed = body.quadratic(spec, query, key, value, bias, positions, divisor, [0, 2, 1])
    output = body.gated(gate, mixed, operands)
    graph = ir.Graph([x, *operands.values()], [output], nodes=body.nodes, opset_imports={"": opset})
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared(attributes(spec, COMPUTE)))


COMPUTE = ir.DataType.FLOAT


def declared(given: Sequence[ir.Attr]) -> list[ir.Attr]:
    """The same attributes as a function declares them: without values."""
    return [ir.Attr(a.name, ir.AttributeType.INT, None) for a in given]


class UnitBody(FunctionBody):
    """The parts of a unit, as nodes."""

    def inputs(self, spec: Gated) -> tuple[ir.Value, dict[str, ir.Value]]:
        return ir.Value(name="x_BSE"), {role: ir.Value(name=role) for role in roles(spec)}

    def attribute(self, name: str) -> ir.Value:
        """A number of the call, as int64 [1]."""
        raw = self.op("Constant", [], name, [ir.RefAttr("value_int", name, ir.AttributeType.INT)])
        return self.op("Reshape", [raw, self.ints([1])], f"{name}_1")

    def literal(self, number: float, like: str = "compute") -> ir.Value:
        """A constant in the dtype that an attribute of the function names."""
        tensor = ir.tensor(np.array(number, np.float64))
        return self.cast(self.op("Constant", [], "number", [ir.AttrTensor("value", tensor)]), like, "literal")

    def as_number(self, value: ir.Value) -> ir.Value:
        return self.cast(value, "compute", f"{value.name}_number")

    def count(self, size: ir.Value) -> ir.Value:
        """0, 1, ... size - 1, for a size of shape [1]."""
        limit = self.op("Squeeze", [size], "limit")
        return self.op("Range", [self.scalar(0), limit, self.scalar(1)], "positions")

    def turned(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        return self.op("Transpose", [value], f"{value.name}_turned", [ir.AttrInt64s("perm", list(perm))])

    def expanded(self, spec: Gated, x: ir.Value, operands: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Gate in x's dtype, value and base in the wider one: [B, S, F], [B, S, F], [B, S, N]."""
        product = self.op("MatMul", [x, operands["expand_weight"]], "product")
        whole = self.op("Add", [product, operands["expand_bias"]], "expanded")
        size = self.attribute("expanded_size")
        twice = self.op("Add", [size, size], "twice")
        end = self.op("Add", [twice, self.attribute("base_size")], "end")
        parts = []
        for name, kind, first, last in (
            ("gate_BSF", spec.gate, self.ints([0]), size),
            ("value_BSF", spec.value, size, twice),
            ("base_BSN", spec.latent, twice, end),
        ):
            part = self.op("Slice", [whole, first, last, self.ints([-1])], name)
            parts.append(part if kind is None else activate(self, kind, part, name))
        return parts[0], self.as_number(parts[1]), self.as_number(parts[2])

    def heads(
        self, spec: Gated, latent: ir.Value, operands: dict[str, ir.Value], positions: ir.Value
    ) -> list[ir.Value]:
        """[B, S, N] for each head."""
        found = []
        turn = self.turns(positions) if spec.rotary else None
        for head in range(spec.heads):
            scale = self.op("Gather", [operands["scale"], self.scalar(head)], "scale_N")
            offset = self.op("Gather", [operands["offset"], self.scalar(head)], "offset_N")
            scaled = self.op("Add", [self.op("Mul", [latent, scale], "scaled"), offset], f"head{head}_BSN")
            found.append(scaled if turn is None else self.rotated(scaled, *turn))
        return found

    def turns(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin [S, H] at whole positions [S]."""
        half = self.op("Div", [self.attribute("base_size"), self.ints([2])], "H")
        steps = self.op("Div", [self.as_number(self.count(half)), self.as_number(half)], "steps")
        rates = self.op("Exp", [self.op("Mul", [steps, self.literal(-math.log(ROTARY_BASE))], "logs")], "rates_H")
        column = self.op("Reshape", [self.as_number(positions), self.ints([-1, 1])], "positions_S1")
        angles = self.op("Mul", [column, rates], "angles_SH")
        return self.op("Cos", [angles], "cos_SH"), self.op("Sin", [angles], "sin_SH")

    def rotated(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        base = self.attribute("base_size")
        half = self.op("Div", [base, self.ints([2])], "H")
        left = self.op("Slice", [x, self.ints([0]), half, self.ints([-1])], "left")
        right = self.op("Slice", [x, half, base, self.ints([-1])], "right")

        def times(a: ir.Value, b: ir.Value) -> ir.Value:
            return self.op("Mul", [a, b], "turn")

        first = self.op("Sub", [times(left, cos), times(right, sin)], "first")
        second = self.op("Add", [times(right, cos), times(left, sin)], "second")
        return self.op("Concat", [first, second], f"{x.name}_rotated", [ir.AttrInt64("axis", -1)])

    def quadratic(
        self,
        spec: Gated,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        bias: ir.Value | None,
        positions: ir.Value,
        divisor: ir.Value,
        perm: Sequence[int],
    ) -> ir.Value:
        """relu(q kᵀ / divisor + bias)² v; queries and keys have the same `positions` in the last but one axis."""
        divided = self.op("Div", [query, self.as_number(divisor)], "divided")
        scores = self.op("MatMul", [divided, self.turned(key, perm)], "scores")
        scores = scores if bias is None else self.op("Add", [scores, bias], "biased")
        positive = self.op("Relu", [scores], "positive")
        squared = self.op("Mul", [positive, positive], "squared")
        if spec.causal:
            row = self.op("Reshape", [positions, self.ints([-1, 1])], "row")
            seen = self.op("Not", [self.op("Less", [row, positions], "later")], "seen")
            squared = self.op("Where", [seen, squared, self.literal(0.0)], "causal")
        return self.op("MatMul", [squared, value], "quadratic")

    def score_bias(self, spec: Gated, operands: dict[str, ir.Value], positions: ir.Value) -> ir.Value | None:
        """[R, T] among tokens at whole positions, None for none."""
        if spec.bias is PositionBias.TOEPLITZ:
            row = self.op("Reshape", [positions, self.ints([-1, 1])], "row")
            last = self.op("Sub", [self.attribute("span"), self.ints([1])], "last")
            distance = self.op("Sub", [row, positions], "distance")
            shifted = self.op("Max", [self.op("Add", [distance, last], "shifted"), self.ints([0])], "from_first")
            end = self.op("Add", [last, last], "end")
            return self.op("Gather", [operands["distances"], self.op("Min", [shifted, end], "index")], "bias_RT")
        if spec.bias is PositionBias.ROTARY:
            turn = self.turns(positions)
            left, right = (self.rotated(operands[n], *turn) for n in ("query_vector", "key_vector"))
            return self.op("MatMul", [left, self.turned(right, [1, 0])], "bias_RT")
        return None

    def gated(self, gate: ir.Value, mixed: ir.Value, operands: dict[str, ir.Value]) -> ir.Value:
        """[B, S, E] in x's dtype."""
        return self.projected(self.op("Mul", [gate, self.cast(mixed, "dtype", "mixed_BSF")], "gated_BSF"), operands)

    def projected(self, product: ir.Value, operands: dict[str, ir.Value]) -> ir.Value:
        """[B, S, E] of [B, S, F]."""
        out = self.op("MatMul", [product, operands["out_weight"]], "product")
        return self.op("Add", [out, operands["out_bias"]], "output_BSE")
