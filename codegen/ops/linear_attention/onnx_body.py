"""Linear attention as a model-local ONNX function over standard operators, valid at any opset from 12 on.

The last chunk is padded inside the function; sums over the chunks before (and behind) the near ones are exclusive
CumSums of chunks padded by one. The query heads of a group are folded into rows. Between operands and result all is
computed in float32 at least. The function's name says which parts its body has, its attributes hold all numbers.

Shape legend: B batch, N key/value heads, R query heads of each, H = N R, S queries, T keys, D features of keys, E of
values, F of a feature map; C tokens of a chunk, P chunks of keys, G chunks that queries lie in, W near keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from codegen.ops.function_body import FunctionBody, computed_in
from codegen.spec import FeatureMap, LinearAttention

DOMAIN = "rewriter.ops"

WORDS = {FeatureMap.LEARNED: "Learned", FeatureMap.ELU1: "Elu1", FeatureMap.FAVOR: "Favor"}

AXES_ARE_AN_INPUT = 18
"""Opset from which on ReduceMax and ReduceSumSquare take their axes as an input."""

LOWEST = -1e30
"""Stands for the greatest of no scores: less than any, and finite."""


def function_name(spec: LinearAttention, shown: bool) -> str:
    """ "LinearAttention", its features, then one word for each optional part of the body."""
    return "LinearAttention" + WORDS[spec.features] + "Causal" * spec.attention.causal + "Shown" * shown


def attributes(
    spec: LinearAttention, dtype: ir.DataType, query_gain: float = 1.0, key_gain: float = 1.0
) -> list[ir.Attr]:
    """Attributes of a call, whose operands have been multiplied by these gains already; dtype is theirs."""
    plain = spec.attention
    own = 1.0 if spec.features is FeatureMap.FAVOR else plain.head_dim**0.25
    reach = plain.scale**0.5 * own
    return [
        ir.AttrInt64("chunk", spec.chunk),
        ir.AttrInt64("dtype", int(dtype)),
        ir.AttrInt64("compute", int(computed_in(dtype))),
        ir.AttrFloat32("scale", plain.scale / (query_gain * key_gain)),
        ir.AttrFloat32("query_scale", reach / query_gain),
        ir.AttrFloat32("key_scale", reach / key_gain),
    ]


def roles(spec: LinearAttention) -> list[str]:
    """Operands behind q, k and v, in order, in the dtype that is `computed_in`."""
    return list(spec.shapes)


def stored(
    spec: LinearAttention, parameters: Mapping[str, NDArray[Any]], dtype: ir.DataType
) -> dict[str, NDArray[Any]]:
    """The operands as a call takes them, in order, from those of the spec's `shapes`; dtype is that of q, k and v.

    Matrices are [heads, in, out], the gain [heads, 1, 1], with FAVOR+ divided by the number of directions.
    """
    found = {}
    for role in roles(spec):
        array = np.asarray(parameters[role], np.float64)
        if role == "log_gain":
            array = array - (np.log(spec.directions) if spec.features is FeatureMap.FAVOR else 0.0)
            array = array.reshape(-1, 1, 1)
        else:
            array = array.swapaxes(-1, -2)
        found[role] = np.ascontiguousarray(array.astype(computed_in(dtype).numpy()))
    return found


def function(spec: LinearAttention, opset: int, shown: bool) -> ir.Function:
    """Inputs q [B, H, S, D], k [B, N, T, D], v [B, N, T, E], `roles`, and if asked which keys are `shown`.

    That is boolean and broadcasts to [B, T]. The output is [B, H, S, E] in q's dtype.
    """
    body = _Body(spec, opset)
    q, k, v = (ir.Value(name=n) for n in ("q_BHSD", "k_BNTD", "v_BNTE"))
    operands = {role: ir.Value(name=role) for role in roles(spec)}
    visible = ir.Value(name="shown") if shown else None
    sizes = _Sizes(body, q, k)
    values = body.by_chunk(body.weighed(v, visible, sizes), sizes)
    keys = body.by_chunk(body.as_number(k), sizes)
    near_values = body.near(values, sizes)
    scores = body.op("MatMul", [body.folded(body.as_number(q), sizes), body.turned(body.near(keys, sizes))], "scores")
    scores = body.op("Mul", [scores, body.number("scale")], "scaled_BNGRW")
    scores = body.op("Where", [body.sees(near_values, sizes), scores, body.literal(-np.inf)], "seen_BNGRW")
    greatest = body.op("Max", [body.reduce("ReduceMax", scores), body.literal(LOWEST)], "greatest_BNGR1")
    features = body.folded(body.query_features(q, operands, sizes), sizes)
    if spec.features is FeatureMap.FAVOR:  # exponents still
        greatest = body.op("Max", [greatest, body.reduce("ReduceMax", features)], "greatest_BNGR1")
        features = body.op("Exp", [body.op("Sub", [features, greatest], "exponents")], "features_BNGRF")
    weights = body.op("Exp", [body.op("Sub", [scores, greatest], "exponents")], "weights_BNGRW")
    near = body.op("MatMul", [weights, near_values], "near")
    each = body.turned(body.by_chunk(body.key_features(k, operands), sizes))
    beyond = body.beyond(body.op("MatMul", [each, values], "each_BNPFE"), sizes)
    total = body.op("Add", [near, body.op("MatMul", [features, beyond], "far")], "total")
    output = body.by_token(body.divided(total), sizes)
    inputs = [q, k, v, *operands.values(), *([] if visible is None else [visible])]
    graph = ir.Graph(inputs, [output], nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr(a.name, a.type, None) for a in attributes(spec, ir.DataType.FLOAT)]
    return ir.Function(DOMAIN, function_name(spec, shown), graph=graph, attributes=declared)


class _Sizes:
    """Sizes that the nodes share, int64 [1] each.

    Attributes:
        lead: places of the first query's chunk that come before it.
        start: the number of that chunk; end: that of the last, plus one.
        behind_keys, behind_queries: what is missing to whole chunks.
    """

    def __init__(self, body: _Body, q: ir.Value, k: ir.Value) -> None:
        q_shape, k_shape = body.op("Shape", [q], "q_shape"), body.op("Shape", [k], "k_shape")
        self.batch, self.heads, self.queries = (body.take(q_shape, [n]) for n in (0, 1, 2))
        self.groups, self.keys = (body.take(k_shape, [n]) for n in (1, 2))
        self.chunk = body.attribute("chunk")
        self.shared = body.op("Div", [self.heads, self.groups], "R")
        first = body.op("Sub", [self.keys, self.queries], "first")
        self.lead = body.op("Mod", [first, self.chunk], "lead")
        self.start = body.op("Div", [first, self.chunk], "start")
        self.behind_keys = body.op("Mod", [body.op("Neg", [self.keys], "minus_T"), self.chunk], "behind_keys")
        self.last = body.op("Add", [self.lead, self.queries], "last")
        self.behind_queries = body.op("Mod", [body.op("Neg", [self.last], "minus"), self.chunk], "behind_queries")
        whole = body.op("Add", [self.keys, self.behind_keys], "whole")
        self.end = body.op("Div", [whole, self.chunk], "end")
        self.rows = body.op("Mul", [self.shared, self.chunk], "rows")


class _Body(FunctionBody):
    """The parts of the computation, as nodes."""

    def __init__(self, spec: LinearAttention, opset: int) -> None:
        super().__init__()
        self.spec, self.opset = spec, opset

    # ------------------------------------------------------------ small pieces

    def attribute(self, name: str) -> ir.Value:
        """A whole number of the call, as int64 [1]."""
        raw = self.op("Constant", [], name, [ir.RefAttr("value_int", name, ir.AttributeType.INT)])
        return self.op("Reshape", [raw, self.ints([1])], f"{name}_1")

    def number(self, name: str) -> ir.Value:
        """A float attribute, in the dtype that is computed in."""
        raw = self.op("Constant", [], name, [ir.RefAttr("value_float", name, ir.AttributeType.FLOAT)])
        return self.as_number(raw)

    def literal(self, number: float) -> ir.Value:
        tensor = ir.tensor(np.array(number, np.float32))
        return self.as_number(self.op("Constant", [], "number", [ir.AttrTensor("value", tensor)]))

    def as_number(self, value: ir.Value) -> ir.Value:
        return self.cast(value, "compute", f"{value.name}_number")

    def count(self, size: ir.Value) -> ir.Value:
        """0, 1, ... size - 1, for a size of shape [1]."""
        limit = self.op("Squeeze", [size], "limit")
        return self.op("Range", [self.scalar(0), limit, self.scalar(1)], "count")

    def turned(self, value: ir.Value) -> ir.Value:
        """The last two of five axes change places."""
        return self.op("Transpose", [value], f"{value.name}_turned", [ir.AttrInt64s("perm", [0, 1, 2, 4, 3])])

    def reduce(self, kind: str, value: ir.Value) -> ir.Value:
        """Over the last axis, which stays."""
        keep = ir.AttrInt64("keepdims", 1)
        if self.opset >= AXES_ARE_AN_INPUT:
            return self.op(kind, [value, self.ints([-1])], f"{value.name}_reduced", [keep])
        return self.op(kind, [value], f"{value.name}_reduced", [ir.AttrInt64s("axes", [-1]), keep])

    def part(self, value: ir.Value, start: ir.Value, end: ir.Value, axis: int, name: str) -> ir.Value:
        return self.op("Slice", [value, start, end, self.ints([axis])], name)

    def padded(self, value: ir.Value, before: Sequence[ir.Value], behind: Sequence[ir.Value]) -> ir.Value:
        """With zeros before and behind each axis."""
        return self.op("Pad", [value, self.concat([*before, *behind], "ends"), self.literal(0.0)], "padded")

    def apart(self, value: ir.Value, axis: int, places: int) -> ir.Value:
        """[B, N, P, ...] with one chunk of zeros more, at the beginning (places = 0) or at the end."""
        zeros, one = [self.ints([0])] * 5, self.ints([1])
        more = [*zeros[:axis], one, *zeros[axis + 1 :]]
        return self.padded(value, *((more, zeros) if places == 0 else (zeros, more)))

    # ------------------------------------------------------------ layout

    def by_chunk(self, x: ir.Value, sizes: _Sizes) -> ir.Value:
        """[B, N, P, C, ...] of [B, N, T, ...], zeros behind the last token."""
        padded = self.padded(x, [self.ints([0, 0, 0, 0])], [self.ints([0, 0]), sizes.behind_keys, self.ints([0])])
        width = self.take(self.op("Shape", [x], "shape"), [3])
        shape = self.concat([self.ints([0, 0, -1]), sizes.chunk, width])
        return self.op("Reshape", [padded, shape], f"{x.name}_chunks")

    def folded(self, x: ir.Value, sizes: _Sizes) -> ir.Value:
        """[B, N, G, R C, ...] of [B, H, S, ...], zeros around the queries."""
        before = [self.ints([0, 0]), sizes.lead, self.ints([0])]
        padded = self.padded(x, before, [self.ints([0, 0]), sizes.behind_queries, self.ints([0])])
        width = self.take(self.op("Shape", [x], "shape"), [3])
        apart = self.concat([self.ints([0]), sizes.groups, sizes.shared, self.ints([-1]), sizes.chunk, width])
        chunks = self.op("Reshape", [padded, apart], "apart_BNRGCD")
        turned = self.op("Transpose", [chunks], "turned_BNGRCD", [ir.AttrInt64s("perm", [0, 1, 3, 2, 4, 5])])
        shape = self.concat([self.ints([0, 0, 0]), sizes.rows, width])
        return self.op("Reshape", [turned, shape], f"{x.name}_folded")

    def by_token(self, x: ir.Value, sizes: _Sizes) -> ir.Value:
        """[B, H, S, E] of [B, N, G, R C, E]."""
        width = self.take(self.op("Shape", [x], "shape"), [4])
        apart = self.concat([self.ints([0, 0, 0]), sizes.shared, sizes.chunk, width])
        rows = self.op("Reshape", [x, apart], "apart_BNGRCE")
        turned = self.op("Transpose", [rows], "turned_BNRGCE", [ir.AttrInt64s("perm", [0, 1, 3, 2, 4, 5])])
        whole = self.op(
            "Reshape", [turned, self.concat([self.ints([0]), sizes.heads, self.ints([-1]), width])], "whole"
        )
        return self.cast(self.part(whole, sizes.lead, sizes.last, 2, "own_BHSE"), "dtype", "output_BHSE")

    # ------------------------------------------------------------ near keys

    def weighed(self, v: ir.Value, shown: ir.Value | None, sizes: _Sizes) -> ir.Value:
        """[B, N, T, E + 1]: values and a one behind them, zeros where keys are hidden."""
        v = self.as_number(v)
        shape = self.concat([sizes.batch, sizes.groups, sizes.keys, self.ints([1])], "ones_shape")
        ones = self.op("Expand", [self.op("Reshape", [self.literal(1.0), self.ints([1])], "one"), shape], "ones_BNT1")
        if shown is not None:
            whole = self.op("Expand", [self.as_number(shown), self.concat([sizes.batch, sizes.keys])], "shown_BT")
            tokens = self.op("Reshape", [whole, self.concat([sizes.batch, self.ints([1]), sizes.keys, self.ints([1])])],
                             "shown_B1T1")  # fmt: skip
            v, ones = self.op("Mul", [v, tokens], "visible_BNTE"), self.op("Mul", [ones, tokens], "visible_BNT1")
        return self.op("Concat", [v, ones], "values_BNTE", [ir.AttrInt64("axis", -1)])

    def near(self, x: ir.Value, sizes: _Sizes) -> ir.Value:
        """[B, N, G, W, ...] of [B, N, P, C, ...]: each chunk of queries with its neighbours, zeros where none is."""
        one = self.ints([1])
        padded = self.apart(x, 2, 0)
        padded = padded if self.spec.attention.causal else self.apart(padded, 2, 1)
        start, end, parts = sizes.start, sizes.end, []
        for place in range(2 if self.spec.attention.causal else 3):
            parts.append(self.part(padded, start, end, 2, f"near{place}"))
            start, end = self.op("Add", [start, one], "start"), self.op("Add", [end, one], "end")
        return self.op("Concat", parts, f"{x.name}_near", [ir.AttrInt64("axis", 3)])

    def sees(self, near_values: ir.Value, sizes: _Sizes) -> ir.Value:
        """[B, N, G, R C or 1, W]: whether a near key is there, not hidden, and not later than the query."""
        last = self.part(near_values, self.ints([-1]), self.ints([2**31]), -1, "there_BNGW1")
        there = self.op("Greater", [self.turned(last), self.literal(0.5)], "there_BNG1W")
        if not self.spec.attention.causal:
            return there
        rows = self.op("Mod", [self.count(sizes.rows), sizes.chunk], "places")
        rows = self.op("Reshape", [self.op("Add", [rows, sizes.chunk], "i"), self.ints([-1, 1])], "i_R1")
        columns = self.count(self.op("Add", [sizes.chunk, sizes.chunk], "W"))
        order = self.op("Not", [self.op("Less", [rows, columns], "later")], "order_RW")
        return self.op("And", [there, order], "sees_BNGRW")

    # ------------------------------------------------------------ far keys

    def query_features(self, q: ir.Value, operands: Mapping[str, ir.Value], sizes: _Sizes) -> ir.Value:
        """[B, H, S, F], times the gain; of FAVOR+ the exponents."""
        x = self.op("Mul", [self.as_number(q), self.number("query_scale")], "query")
        if self.spec.features is not FeatureMap.FAVOR:
            features = self._features(x, operands.get("query_map"))
            return self.op("Mul", [features, self.op("Exp", [operands["log_gain"]], "gain")], "query_features")
        width = self.take(self.op("Shape", [x], "shape"), [3])
        rows = self.concat([self.ints([0]), sizes.groups, self.ints([-1]), width])
        grouped = self.op("Reshape", [x, rows], "grouped")
        exponents = self._exponents(grouped, operands["directions"])
        shape = self.concat([self.ints([0]), sizes.heads, sizes.queries, self.ints([-1])])
        return self.op("Add", [self.op("Reshape", [exponents, shape], "by_head"), operands["log_gain"]], "exponents")

    def key_features(self, k: ir.Value, operands: Mapping[str, ir.Value]) -> ir.Value:
        """[B, N, T, F]"""
        x = self.op("Mul", [self.as_number(k), self.number("key_scale")], "key")
        if self.spec.features is FeatureMap.FAVOR:
            return self.op("Exp", [self._exponents(x, operands["directions"])], "key_features")
        return self._features(x, operands.get("key_map"))

    def _features(self, x: ir.Value, matrix: ir.Value | None) -> ir.Value:
        last = ir.AttrInt64("axis", -1)
        if matrix is None:  # elu(x) + 1
            zero = self.literal(0.0)
            below = self.op("Exp", [self.op("Min", [x, zero], "negative")], "below")
            return self.op("Add", [below, self.op("Max", [x, zero], "above")], "features")
        turned = self.op("MatMul", [x, matrix], "turned")
        ends = [self.op("Softmax", [t], "end", [last]) for t in (turned, self.op("Neg", [turned], "minus"))]
        return self.op("Concat", ends, "features", [last])

    def _exponents(self, x: ir.Value, directions: ir.Value) -> ir.Value:
        squares = self.op("Mul", [self.reduce("ReduceSumSquare", x), self.literal(0.5)], "half_square")
        return self.op("Sub", [self.op("MatMul", [x, directions], "products"), squares], "exponents")

    def beyond(self, each: ir.Value, sizes: _Sizes) -> ir.Value:
        """[B, N, G, F, E + 1]: what the chunks beyond the near ones of each chunk of queries add up to."""
        axis, exclusive = self.scalar(2), ir.AttrInt64("exclusive", 1)
        before = self.op("CumSum", [self.apart(each, 2, 0), axis], "before", [exclusive])
        before = self.part(before, sizes.start, sizes.end, 2, "before_BNGFE")
        if self.spec.attention.causal:
            return before
        reverse = [exclusive, ir.AttrInt64("reverse", 1)]
        behind = self.op("CumSum", [self.apart(each, 2, 1), axis], "behind", reverse)
        one = self.ints([1])
        start, end = (self.op("Add", [size, one], "next") for size in (sizes.start, sizes.end))
        return self.op("Add", [before, self.part(behind, start, end, 2, "behind_BNGFE")], "beyond_BNGFE")

    def divided(self, total: ir.Value) -> ir.Value:
        """[B, N, G, R C, E]: by the sum of the weights, zeros where that is zero."""
        last = self.ints([-1])
        output = self.part(total, self.ints([0]), last, -1, "sum")
        divisor = self.part(total, last, self.ints([2**31]), -1, "divisor")
        some = self.op("Greater", [divisor, self.literal(0.0)], "some")
        return self.op("Div", [output, self.op("Where", [some, divisor, self.literal(1.0)], "safe")], "mean")
