"""Fourier mixing as model-local ONNX functions over standard operators, valid at any opset from 12 on.

There is no DFT operator in them, which runtimes lack or compute slowly and imprecisely. Both transforms are split in
two (Cooley and Tukey): with S = P Q, P the largest divisor up to the root of S, a token s = Q p + q and a frequency
k = i + P j,

    exp(-2 pi i k s / S) = exp(-2 pi i i p / P) · exp(-2 pi i q (i / S + j / Q)),

so that a product with a matrix of P rows is followed by one with a matrix of Q rows for each i. A prime length has
P = 1 and one full matrix. Over features D = F G likewise, the first index f of F and the second g of G, on half of the
spectrum: features above the middle are those below it at the opposite token frequency.

The matrices over features are inputs. A second function computes those over tokens from the length, by Range, Cos and
Sin; layers of equal length share one call of it. Where a file fixes all sizes, runtimes fold it into constants.

Shape legend: B batch, S = P Q tokens, D = F G features, J second indices that cover half of the spectrum, H = J F
features computed; c: a part that came from cosines (0) or sines (1).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from codegen.ops.function_body import FunctionBody, computed_in
from codegen.spec import FourierMixing

DOMAIN = "rewriter.ops"


def function_name(spec: FourierMixing) -> str:
    """ "FourierMixing" or "HartleyMixing", then one word for each optional input."""
    return _transform(spec) + "Mixing" + "Gain" * spec.gain + "Bias" * spec.bias


def tables_name(spec: FourierMixing) -> str:
    """ "FourierTables" or "HartleyTables"."""
    return _transform(spec) + "Tables"


def _transform(spec: FourierMixing) -> str:
    return "Hartley" if spec.hartley else "Fourier"


def attributes(spec: FourierMixing, dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: the number of features, and the ONNX numbers of x's dtype and of that it computes in."""
    return [
        ir.AttrInt64("hidden_size", spec.hidden),
        ir.AttrInt64("dtype", int(dtype)),
        ir.AttrInt64("compute", int(computed_in(dtype))),
    ]


def tables_attributes(dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call of `tables_function` for x of this dtype."""
    return [ir.AttrInt64("compute", int(computed_in(dtype)))]


def feature_tables(spec: FourierMixing, dtype: ir.DataType) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The matrices over features, [2 F, F] and [F, 2 G, 2 J]: the second and third input of a call."""
    first = max(n for n in range(1, math.isqrt(spec.hidden) + 1) if spec.hidden % n == 0)
    second = spec.hidden // first
    f, g = np.arange(first), np.arange(second)
    covering = (spec.half - 1) // first + 1
    angles = 2 * np.pi / first * (f[:, None] * f % first)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).reshape(2 * first, first)
    frequency = f[:, None] + first * np.arange(covering)  # [F, J]
    angles = 2 * np.pi / spec.hidden * (g[:, None] * frequency[:, None] % spec.hidden)  # [F, G, J]
    cos, sin = np.cos(angles), np.sin(angles)
    # of a - i b, a from cosines and b from sines: cosine parts cos a - sin b, sine parts sin a + cos b
    columns = np.concatenate([np.concatenate([cos, sin], axis=2), np.concatenate([-sin, cos], axis=2)], axis=1)
    wanted = computed_in(dtype).numpy()
    return rows.astype(wanted), columns.astype(wanted)


def tables_count(spec: FourierMixing) -> int:
    """How many outputs `tables_function` has; all of them are inputs of `function`."""
    return 4 if spec.hartley else 3


# ------------------------------------------------------------ mixing


def function(spec: FourierMixing, opset: int) -> ir.Function:
    """Inputs x [B, S, D], `feature_tables`, the outputs of `tables_function`, then gain [D] and bias [D] if any.

    The output is [B, S, D] in x's dtype.
    """
    body = FunctionBody()
    x, table, columns, first, opposite, second, mirrored = (
        ir.Value(name=n)
        for n in ("x_BSD", "features_first", "features_second", "first", "opposite_S", "second", "mirrored")
    )
    gain = ir.Value(name="gain_D") if spec.gain else None
    bias = ir.Value(name="bias_D") if spec.bias else None
    count = body.take(body.op("Shape", [first], "first_shape"), [1])  # P
    parts, width = _over_features(body, body.cast(x, "compute", "wide_BSD"), table, columns)
    given = body.op("Reshape", [parts, body.concat([body.ints([0]), count, body.ints([-1])])], "parts_BPN")
    half = body.op("MatMul", [first, given], "half_BPN")
    half = body.op("Reshape", [half, body.concat([body.ints([0]), count, body.ints([-1]), width])], "half_BPRH")
    left = _second_product(body, second, half, width)
    source = _second_product(body, mirrored, half, width) if spec.hartley else left
    features = body.take(body.op("Shape", [x], "x_shape"), [2])  # D
    mixed = _with_mirror(body, left, source, opposite, body.op("Sub", [features, width], "rest"))
    if gain is not None:
        mixed = body.op("Mul", [mixed, gain], "scaled_BSD")
    if bias is not None:
        mixed = body.op("Add", [mixed, bias], "shifted_BSD")
    output = body.cast(mixed, "dtype", "output_BSD")
    tables = [first, opposite, second, mirrored][: tables_count(spec)]
    inputs = [x, table, columns, *tables, *(v for v in (gain, bias) if v is not None)]
    graph = ir.Graph(inputs, [output], nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("hidden_size", "dtype", "compute")]
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared)


def _over_features(body: FunctionBody, x: ir.Value, first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine parts [B, S, c, J, F] of each token's features, J F of them in order, and H [1] = J F."""
    outer = body.take(body.op("Shape", [first], "features_shape"), [1])  # F
    sizes = body.op("Div", [body.op("Shape", [second], "columns_shape"), body.ints([1, 2, 2])], "F_G_J")
    inner, covering = body.take(sizes, [1]), body.take(sizes, [2])
    zero, rest, two = body.ints([0]), body.ints([-1]), body.ints([2])

    def reshaped(value: ir.Value, sizes: list[ir.Value], name: str) -> ir.Value:
        return body.op("Reshape", [value, body.concat(sizes)], name)

    def turned(value: ir.Value, perm: list[int], name: str) -> ir.Value:
        return body.op("Transpose", [value], name, [ir.AttrInt64s("perm", perm)])

    x = turned(reshaped(x, [zero, zero, outer, inner], "x_BSFG"), [0, 2, 1, 3], "x_BFSG")
    x = body.op("MatMul", [first, reshaped(x, [zero, outer, rest], "x_BFN")], "outer_BFcN")
    x = turned(reshaped(x, [zero, outer, two, rest, inner], "outer_BFcSG"), [0, 1, 3, 2, 4], "outer_BFScG")
    both = body.op("Mul", [inner, two], "2G")
    x = body.op("MatMul", [reshaped(x, [zero, outer, rest, both], "outer_BFSN"), second], "parts_BFScJ")
    x = turned(reshaped(x, [zero, outer, rest, two, covering], "parts_BFS2J"), [0, 2, 3, 4, 1], "parts_BScJF")
    return x, body.op("Mul", [covering, outer], "H")


def _second_product(body: FunctionBody, matrix: ir.Value, half: ir.Value, width: ir.Value) -> ir.Value:
    """[B, S, H]: frequencies in order."""
    mixed = body.op("MatMul", [matrix, half], "mixed_BPQH")
    ordered = body.op("Transpose", [mixed], "mixed_BQPH", [ir.AttrInt64s("perm", [0, 2, 1, 3])])
    return body.op("Reshape", [ordered, body.concat([body.ints([0, -1]), width])], "mixed_BSH")


def _with_mirror(body: FunctionBody, left: ir.Value, source: ir.Value, opposite: ir.Value, rest: ir.Value) -> ir.Value:
    """[B, S, D]: the `rest`, features above the middle, are those of `source` below it, at the opposite frequency."""
    rows = body.op("Gather", [source, opposite], "opposite_BSH", [ir.AttrInt64("axis", 1)])
    ends = [rest, body.ints([0]), body.ints([2]), body.ints([-1])]
    right = body.op("Slice", [rows, *ends], "right")
    return body.op("Concat", [left, right], "mixed_BSD", [ir.AttrInt64("axis", 2)])


# ------------------------------------------------------------ what the length decides


def tables_function(spec: FourierMixing, opset: int) -> ir.Function:
    """Input x [B, S, ...]; outputs: the matrix over p [2 P, P], the opposite of each token frequency [S], the matrices
    over q [P, Q, 4 Q], and for the Hartley transform those of the mirrored features."""
    body = _Body()
    x = ir.Value(name="x_BS")
    tokens = body.take(body.op("Shape", [x], "shape"), [1])
    count, rest = _divisors(body, tokens)
    cos, sin = _second_angles(body, tokens, count, rest)
    outputs = [_first_matrix(body, count), _opposite(body, tokens)]
    if spec.hartley:
        minus_sin = body.op("Neg", [sin], "minus_sin")
        sums = body.op("Add", [cos, sin], "sums"), body.op("Sub", [cos, sin], "differences")
        outputs.append(_second_matrix(body, *sums, count, rest))
        outputs.append(_second_matrix(body, sums[1], body.op("Sub", [minus_sin, cos], "minus_sums"), count, rest))
    else:
        outputs.append(_second_matrix(body, cos, body.op("Neg", [sin], "minus_sin"), count, rest))
    graph = ir.Graph([x], outputs, nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr("compute", ir.AttributeType.INT, None)]
    return ir.Function(DOMAIN, tables_name(spec), graph=graph, attributes=declared)


class _Body(FunctionBody):
    """With whole numbers counted up, and angles made of them."""

    def as_float(self, value: ir.Value) -> ir.Value:
        """Sizes and whole turns: exact in float32 up to 2^24."""
        return self.op("Cast", [value], f"{value.name}_float", [ir.AttrInt64("to", int(ir.DataType.FLOAT))])

    def angles(self, turns: ir.Value, size: ir.Value) -> ir.Value:
        """2 pi turns / size, for turns < size."""
        number = ir.AttrTensor("value", ir.tensor(np.array([2 * math.pi], np.float32)))
        step = self.op("Div", [self.op("Constant", [], "full_turn", [number]), self.as_float(size)], "step")
        return self.op("Mul", [self.as_float(turns), step], "angles")

    def count(self, size: ir.Value) -> ir.Value:
        """0, 1, ... size - 1, for a size of shape [1]."""
        return self.op("Range", [self.scalar(0), self.op("Squeeze", [size], "limit"), self.scalar(1)], "numbers")


def _divisors(body: _Body, tokens: ir.Value) -> tuple[ir.Value, ir.Value]:
    """P [1], the largest divisor of S up to its root, and Q [1] = S / P."""
    root = body.op("Sqrt", [body.as_float(tokens)], "root")
    whole = body.op("Cast", [root], "whole_root", [ir.AttrInt64("to", int(ir.DataType.INT64))])
    candidates = body.op("Add", [body.count(whole), body.ints([1])], "candidates")
    divides = body.op("Equal", [body.op("Mod", [tokens, candidates], "rest"), body.ints([0])], "divides")
    divisors = body.op("Where", [divides, candidates, body.ints([1])], "divisors")
    first = body.op("ReduceMax", [divisors], "P", [ir.AttrInt64("keepdims", 1)])
    return first, body.op("Div", [tokens, first], "Q")


def _opposite(body: _Body, tokens: ir.Value) -> ir.Value:
    """[S]: -k modulo S."""
    return body.op("Mod", [body.op("Sub", [tokens, body.count(tokens)], "back"), tokens], "opposite_S")


def _first_matrix(body: _Body, first: ir.Value) -> ir.Value:
    """[2 P, P]: for each i the cosines, then the sines, of 2 pi i p / P."""
    numbers = body.count(first)
    rows = body.op("Reshape", [numbers, body.ints([-1, 1])], "i_P1")
    turns = body.op("Mod", [body.op("Mul", [rows, numbers], "ip"), first], "turns_PP")
    angles = body.angles(turns, first)
    row = body.concat([first, body.ints([1, -1])])
    stacked = [body.op("Reshape", [body.op(kind, [angles], kind.lower()), row], "row_P1P") for kind in ("Cos", "Sin")]
    matrix = body.op("Concat", stacked, "matrix_PcP", [ir.AttrInt64("axis", 1)])
    flat = body.op("Reshape", [matrix, body.concat([body.ints([-1]), first])], "flat_first")
    return body.cast(flat, "compute", "first")


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


def _second_matrix(body: _Body, on_a: ir.Value, on_b: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
    """[P, Q, 4 Q]: what of a - i b, [P, Q] each, is wanted after the turn by the second angles.

    a and b are sums of the parts (c of the first matrix, q, c of the table): a = (0, 0) - (1, 1), b = (0, 1) + (1, 0).
    """
    column = body.concat([first, second, body.ints([1]), second, body.ints([1])])
    a, b, minus_a = (
        body.op("Reshape", [v, column], "column_PQ1Q1") for v in (on_a, on_b, body.op("Neg", [on_a], "minus_a"))
    )
    last, middle = ir.AttrInt64("axis", 4), ir.AttrInt64("axis", 2)
    pairs = [body.op("Concat", pair, "pair_PQ1Qc", [last]) for pair in ([a, b], [b, minus_a])]
    matrix = body.op("Concat", pairs, "matrix_PQcQc", [middle])
    flat = body.op("Reshape", [matrix, body.concat([first, second, body.ints([-1])])], "flat_second")
    return body.cast(flat, "compute", "second")
