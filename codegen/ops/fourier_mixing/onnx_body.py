"""Fourier mixing as a model-local ONNX function over standard operators.

The function works at any opset from 12 on, at any batch and length; there is no DFT operator in it, which runtimes lack
or compute slowly and imprecisely. The transform over features is one product with a table of cosines and sines, an
input, on half of the spectrum; features above the middle are those below it at the opposite token frequency. The
transform over tokens is split in two (Cooley and Tukey): with S = P Q, P the largest divisor up to the root of S, a
token s = Q p + q and a frequency k = i + P j,

    exp(-2 pi i k s / S) = exp(-2 pi i i p / P) · exp(-2 pi i q (i / S + j / Q)),

so that a product with a matrix of P rows is followed by one with a matrix of Q rows for each i. Both are computed from
the length in the graph, by Range, Cos and Sin; where a file fixes the length, runtimes fold them into constants. A
prime length has P = 1 and one full matrix.

Shape legend: B batch, S = P Q tokens, D features, H = D // 2 + 1; c: a part that came from cosines (0) or sines (1).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from codegen.ops.function_body import FunctionBody
from codegen.spec import FourierMixing

DOMAIN = "rewriter.ops"


def function_name(spec: FourierMixing) -> str:
    """ "FourierMixing" or "HartleyMixing", then one word for each optional input."""
    base = "HartleyMixing" if spec.hartley else "FourierMixing"
    return base + "Gain" * spec.gain + "Bias" * spec.bias


def attributes(spec: FourierMixing, dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: the number of features, and the ONNX numbers of x's dtype and of that it computes in."""
    return [
        ir.AttrInt64("hidden_size", spec.hidden),
        ir.AttrInt64("dtype", int(dtype)),
        ir.AttrInt64("compute", int(computed_in(dtype))),
    ]


def computed_in(dtype: ir.DataType) -> ir.DataType:
    """The dtype of `feature_table`, gain and bias: sums over a whole sequence want more than half precision."""
    return ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def feature_table(spec: FourierMixing, dtype: ir.DataType) -> NDArray[np.floating]:
    """[D, 2 H], cosines before sines: the second input of a call."""
    turns = np.arange(spec.hidden)[:, None] * np.arange(spec.half) % spec.hidden
    angles = turns * (2 * np.pi / spec.hidden)
    table: NDArray[np.floating] = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return table.astype(computed_in(dtype).numpy())


def function(spec: FourierMixing, opset: int) -> ir.Function:
    """The portable body: inputs x [B, S, D], table [D, 2 H], then gain [D] and bias [D] if the spec has them.

    The output is [B, S, D] in x's dtype.
    """
    body = _Body()
    x, table = ir.Value(name="x_BSD"), ir.Value(name="table")
    gain = ir.Value(name="gain_D") if spec.gain else None
    bias = ir.Value(name="bias_D") if spec.bias else None
    wide = body.cast(x, "compute", "wide_BSD")
    parts = body.op("MatMul", [wide, table], "parts_BScH")
    tokens = body.length(x, opset)
    first, second = _divisors(body, tokens)
    half = _over_first(body, parts, first, spec)
    signs = (1.0, 1.0) if spec.hartley else (1.0, 0.0)
    left = _over_second(body, half, tokens, first, second, spec, signs)
    source = left
    if spec.hartley:
        source = _over_second(body, half, tokens, first, second, spec, (1.0, -1.0))
    mixed = _with_mirror(body, left, source, tokens, spec)
    if gain is not None:
        mixed = body.op("Mul", [mixed, gain], "scaled_BSD")
    if bias is not None:
        mixed = body.op("Add", [mixed, bias], "shifted_BSD")
    output = body.cast(mixed, "dtype", "output_BSD")
    inputs = [x, table, *(v for v in (gain, bias) if v is not None)]
    graph = ir.Graph(inputs, [output], nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("hidden_size", "dtype", "compute")]
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared)


def _divisors(body: _Body, tokens: ir.Value) -> tuple[ir.Value, ir.Value]:
    """P [1], the largest divisor of S up to its root, and Q [1] = S / P."""
    root = body.op("Sqrt", [body.as_float(tokens)], "root")
    whole = body.op("Cast", [root], "whole_root", [ir.AttrInt64("to", int(ir.DataType.INT64))])
    candidates = body.op("Add", [body.count(whole), body.ints([1])], "candidates")
    rest = body.op("Mod", [tokens, candidates], "rest")
    divides = body.op("Equal", [rest, body.ints([0])], "divides")
    divisors = body.op("Where", [divides, candidates, body.ints([1])], "divisors")
    first = body.op("ReduceMax", [divisors], "P", [ir.AttrInt64("keepdims", 1)])
    return first, body.op("Div", [tokens, first], "Q")


def _over_first(body: _Body, parts: ir.Value, first: ir.Value, spec: FourierMixing) -> ir.Value:
    """[B, P, c Q c H]: for each i the products with cosines and with sines of 2 pi i p / P."""
    numbers = body.count(first)
    rows = body.op("Reshape", [numbers, body.ints([-1, 1])], "i_P1")
    turns = body.op("Mod", [body.op("Mul", [rows, numbers], "ip"), first], "turns_PP")
    angles = body.angles(turns, first)
    stacked = [
        body.op(
            "Reshape", [body.op(kind, [angles], f"{kind.lower()}_PP"), body.concat([first, body.ints([1, -1])])], "p"
        )
        for kind in ("Cos", "Sin")
    ]
    matrix = body.op("Concat", stacked, "matrix_PcP", [ir.AttrInt64("axis", 1)])
    flat = body.op("Reshape", [matrix, body.concat([body.ints([-1]), first])], "matrix_first")
    given = body.op("Reshape", [parts, body.concat([body.ints([0]), first, body.ints([-1])])], "parts_BPN")
    mixed = body.op("MatMul", [body.cast(flat, "compute", "first"), given], "half_mixed")
    return body.op("Reshape", [mixed, body.concat([body.ints([0]), first, body.ints([-1, spec.half])])], "half_BPRH")


def _over_second(
    body: _Body,
    half: ir.Value,
    tokens: ir.Value,
    first: ir.Value,
    second: ir.Value,
    spec: FourierMixing,
    signs: tuple[float, float],
) -> ir.Value:
    """[B, S, H]: ``signs[0] · Re - signs[1] · Im`` of the frequencies below the middle."""
    cos, sin = _second_angles(body, tokens, first, second)
    # the transform is (cos - i sin)(a - i b): a, b sum up the parts (c, c) that the first product and the table gave
    on_a, on_b = cos, body.op("Neg", [sin], "minus_sin")
    if signs[1]:
        less = signs[1] < 0
        on_a = body.op("Sub" if less else "Add", [cos, sin], "on_a")
        on_b = body.op("Sub", [body.op("Neg", [sin], "minus_sin") if less else cos, cos if less else sin], "on_b")
    column = body.concat([first, second, body.ints([1]), second, body.ints([1])])
    a, b, minus_a = (
        body.op("Reshape", [v, column], "column_PQ1Q1") for v in (on_a, on_b, body.op("Neg", [on_a], "minus_a"))
    )
    last, middle = ir.AttrInt64("axis", 4), ir.AttrInt64("axis", 2)
    pairs = [body.op("Concat", pair, "pair_PQ1Qc", [last]) for pair in ([a, b], [b, minus_a])]
    matrix = body.op("Concat", pairs, "matrix_PQcQc", [middle])
    flat = body.op("Reshape", [matrix, body.concat([first, second, body.ints([-1])])], "matrix_second")
    mixed = body.op("MatMul", [body.cast(flat, "compute", "second"), half], "mixed_BPQH")
    ordered = body.op("Transpose", [mixed], "mixed_BQPH", [ir.AttrInt64s("perm", [0, 2, 1, 3])])
    return body.op("Reshape", [ordered, body.ints([0, -1, spec.half])], "mixed_BSH")


def _second_angles(body: _Body, tokens: ir.Value, first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value]:
    """cos and sin of 2 pi q (i / S + j / Q), [P, Q, Q] over (i, j, q), from those of both terms."""
    q = body.count(second)
    i = body.op("Reshape", [body.count(first), body.ints([-1, 1, 1])], "i_P11")
    j = body.op("Reshape", [q, body.ints([-1, 1])], "j_Q1")
    twist = body.angles(body.op("Mul", [i, q], "iq_P1Q"), tokens)
    plain = body.angles(body.op("Mod", [body.op("Mul", [j, q], "jq_QQ"), second], "turns_QQ"), second)
    (cos_t, sin_t), (cos_p, sin_p) = (
        (body.op("Cos", [v], f"cos_{n}"), body.op("Sin", [v], f"sin_{n}")) for n, v in (("twist", twist), ("j", plain))
    )

    def product(kind: str, a: ir.Value, b: ir.Value, c: ir.Value, d: ir.Value) -> ir.Value:
        return body.op(kind, [body.op("Mul", [a, b], "term"), body.op("Mul", [c, d], "term")], "sum_PQQ")

    return product("Sub", cos_t, cos_p, sin_t, sin_p), product("Add", sin_t, cos_p, cos_t, sin_p)


def _with_mirror(body: _Body, left: ir.Value, source: ir.Value, tokens: ir.Value, spec: FourierMixing) -> ir.Value:
    """[B, S, D]: features above the middle are those of `source` below it, at the opposite token frequency."""
    rest = spec.hidden - spec.half
    if not rest:
        return left
    opposite = body.op("Mod", [body.op("Sub", [tokens, body.count(tokens)], "back"), tokens], "opposite_S")
    rows = body.op("Gather", [source, opposite], "opposite_BSH", [ir.AttrInt64("axis", 1)])
    ends = [body.ints([rest]), body.ints([0]), body.ints([2]), body.ints([-1])]
    right = body.op("Slice", [rows, *ends], "right")
    return body.op("Concat", [left, right], "mixed_BSD", [ir.AttrInt64("axis", 2)])


class _Body(FunctionBody):
    """With whole numbers counted up, and angles made of them."""

    def length(self, x: ir.Value, opset: int) -> ir.Value:
        """S [1]; from opset 15 on without the other sizes, so that a fixed S is a constant whatever the batch is."""
        if opset < 15:
            return self.op("Gather", [self.op("Shape", [x], "shape"), self.ints([1])], "S")
        return self.op("Shape", [x], "S", [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])

    def as_float(self, value: ir.Value) -> ir.Value:
        """Sizes and whole turns: exact in float32 up to 2^24."""
        return self.op("Cast", [value], f"{value.name}_float", [ir.AttrInt64("to", int(ir.DataType.FLOAT))])

    def angles(self, turns: ir.Value, size: ir.Value) -> ir.Value:
        """2 pi turns / size, for turns < size."""
        full = ir.tensor(np.array([2 * math.pi], np.float32))
        step = self.op(
            "Div", [self.op("Constant", [], "full_turn", [ir.AttrTensor("value", full)]), self.as_float(size)], "step"
        )
        return self.op("Mul", [self.as_float(turns), step], "angles")

    def count(self, size: ir.Value) -> ir.Value:
        """0, 1, ... size - 1, for a size of shape [1]."""
        return self.op("Range", [self.scalar(0), self.op("Squeeze", [size], "limit"), self.scalar(1)], "numbers")
