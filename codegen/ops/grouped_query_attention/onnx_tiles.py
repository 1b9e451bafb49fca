"""Sparse attention in standard ONNX operators without all scores: queries in tiles, each with the keys near to it.

Positions are cut into tiles of equal size. The keys that any query of a tile may see nearby lie in one span, so all
tiles are one batched product; the keys that all queries see are a second one, and one softmax goes over both. Where the
pattern is symmetric, queries that see all keys are computed apart and put in their places. Short sequences, for which
that takes more than a mask over all scores, go to the function with the mask: the graph chooses by its sizes.

Shape legend: B batch, H query heads, N key/value heads, G = H / N, S queries, T keys, D features, E value features;
M tiles of R queries, W keys of a span, C keys that all see. A tiled tensor is [B, N, M, G, R, *].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from codegen.ops.grouped_query_attention import onnx_body
from codegen.ops.grouped_query_attention.onnx_sight import relation, seen_by_all, sight_number, sparse_words
from codegen.ops.grouped_query_attention.tiles import LEAST, MOST
from codegen.sight import Pattern
from codegen.sight import seen_by_all as seen_by_all_at
from codegen.spec import GroupedQueryAttention

TILED, TILED_BY_KEY = "Tiled", "TiledByKey"
"""Ends of names: functions that choose, for a bias with a row for each query (or none), and with one row for all."""

_BY_TILE = [0, 1, 3, 2, 4, 5]
"""[B, N, G, M, R, *] and [B, N, M, G, R, *] from each other."""


def masked_name(name: str) -> str:
    """The name of the function with the mask that stands behind one that chooses; any other name as it is."""
    return name.removesuffix(TILED_BY_KEY).removesuffix(TILED)


def function_names(spec: GroupedQueryAttention) -> list[str]:
    """Every name under which a file may call this."""
    name = onnx_body.function_name(spec)
    if not _choosing(spec):
        return [name]
    return [name, name + TILED, *[name + TILED_BY_KEY] * spec.bias]


def functions(spec: GroupedQueryAttention, opset: int, *, bias_by_key: bool = False) -> list[ir.Function]:
    """What a model has to hold so that the first of these can be called; inputs and output as `onnx_body.function`.

    `bias_by_key`: the bias has one row for all queries.
    """
    masked = onnx_body.function(spec, opset)
    if not _choosing(spec):
        return [masked]
    whole = [] if spec.pattern[0].ordered else [onnx_body.function(_seeing_all(spec), opset)]
    name = masked.name + (TILED_BY_KEY if spec.bias and bias_by_key else TILED)
    writer = _Writer(spec, bias_by_key=bias_by_key)
    graph = writer.graph(masked, opset)
    attributes = [ir.Attr(a.name, a.type, None) for a in masked.attributes.values()]
    return [ir.Function(onnx_body.DOMAIN, name, graph=graph, attributes=attributes), masked, *whole]


def _choosing(spec: GroupedQueryAttention) -> bool:
    """Whether there is a function that chooses between tiles and the mask."""
    return tileable(spec.pattern) and (spec.pattern[0].ordered or not spec.causal)


def tileable(pattern: Pattern) -> bool:
    """Whether the keys that queries see near to them lie in spans: not strides, nor sights that differ by head."""
    return len(pattern) == 1 and not pattern[0].strided


def computed_scores(pattern: Pattern, heads: int, queries: int, keys: int) -> int:
    """Scores of all heads that the function computes at these sizes."""
    every = heads * queries * keys
    if not tileable(pattern):
        return every
    sight = pattern[0]
    size = sight.block if sight.block > 1 else min(max(sight.reach, LEAST), MOST)
    tiles = math.ceil(keys / size) - (keys - queries) // size
    span = size + (sight.reach - 1) * (1 if sight.ordered else 2)
    everywhere = int(seen_by_all_at(sight, np.arange(keys)).sum())
    held = tiles * size * (span + everywhere) + (0 if sight.ordered else everywhere * keys)
    return min(heads * held, every)


def _seeing_all(spec: GroupedQueryAttention) -> GroupedQueryAttention:
    return replace(spec, pattern=(), causal=False)


@dataclass(frozen=True)
class _Cut:
    """Sizes as scalars of the graph, and positions.

    Attributes:
        queries, keys, size, tiles, span: S, T, R, M and W.
        before: rows of the first tile that lie before the first query.
        i, j: positions of queries [M, R, 1], and of what lies near them [M, 1, W], not all of which are keys.
        low: [M, 1, 1], where spans begin.
        everywhere: positions [C] that all see; None where the pattern has none.
    """

    queries: ir.Value
    keys: ir.Value
    size: ir.Value
    tiles: ir.Value
    span: ir.Value
    before: ir.Value
    i: ir.Value
    j: ir.Value
    low: ir.Value
    everywhere: ir.Value | None


class _Writer(onnx_body.Body):
    """Writes the function that chooses."""

    def __init__(self, spec: GroupedQueryAttention, *, bias_by_key: bool) -> None:
        super().__init__()
        self.spec, self.bias_by_key = spec, bias_by_key
        self.words = sparse_words(spec.pattern)
        self.ordered = spec.pattern[0].ordered
        self.q, self.k, self.v = (ir.Value(name=n) for n in ("q_BHSD", "k_BNTD", "v_BNTE"))
        self.bias = ir.Value(name="bias") if spec.bias else None
        self.sinks = ir.Value(name="sinks") if spec.sinks else None

    def graph(self, masked: ir.Function, opset: int) -> ir.Graph:
        inputs = [x for x in (self.q, self.k, self.v, self.bias, self.sinks) if x is not None]
        self.q_shape, self.k_shape, self.v_shape = (
            self.op("Shape", [x], f"{x.name}_shape") for x in (self.q, self.k, self.v)
        )
        self.scale, self.minus, self.zero = self.number("scale"), self.literal(-np.inf), self.literal(0.0)
        self.cap = self.number("softcap") if self.spec.softcap is not None else None
        cut = self._cut()
        pays = self._pays(cut)
        tiled = self._branch(lambda: self._attended(cut), "tiles")
        other = self._branch(lambda: self._call(masked, inputs), "mask")
        branches = [ir.AttrGraph("then_branch", tiled), ir.AttrGraph("else_branch", other)]
        output = self.op("If", [pays], "output_BHSE", branches)
        return ir.Graph(inputs, [output], nodes=self.nodes, opset_imports={"": opset, onnx_body.DOMAIN: 1})

    def _branch(self, write: Callable[[], ir.Value], name: str) -> ir.Graph:
        outer, self.nodes = self.nodes, []
        output = write()
        inner, self.nodes = self.nodes, outer
        return ir.Graph([], [output], nodes=inner, name=name)

    def _call(self, function: ir.Function, inputs: list[ir.Value]) -> ir.Value:
        """A call with this function's own attributes."""
        passed = [ir.RefAttr(a.name, a.name, a.type) for a in function.attributes.values()]
        node = ir.Node(onnx_body.DOMAIN, function.name, inputs, passed, num_outputs=1)
        node.outputs[0].name = self.unique("attended")
        self.nodes.append(node)
        return node.outputs[0]

    # ------------------------------------------------------------ sizes and positions

    def _cut(self) -> _Cut:
        queries, keys = self.size(self.q_shape, 2), self.size(self.k_shape, 2)
        reach = self._number("reach")
        blocks = "Block" in self.words
        size = self._number("block") if blocks else self.op("Min", [self.op("Max", [reach, self.scalar(LEAST)], "r"),
                                                                    self.scalar(MOST)], "R")  # fmt: skip
        back = self.op("Sub", [reach, self.scalar(1)], "back")
        offset = self.op("Sub", [keys, queries], "offset")
        first = self.op("Div", [offset, size], "first")
        rounded = self.op("Sub", [self.op("Add", [keys, size], "up"), self.scalar(1)], "rounded")
        tiles = self.op("Sub", [self.op("Div", [rounded, size], "last"), first], "M")
        start = self.op("Mul", [first, size], "start")
        span = self.op("Add", [size, back], "span")
        span = span if self.ordered else self.op("Add", [span, back], "span")
        steps = self.op("Mul", [self._range(tiles), size], "steps")
        starts = self.op("Reshape", [self.op("Add", [steps, start], "starts"), self.ints([-1, 1, 1])], "starts_M11")
        i = self.op("Add", [starts, self.op("Reshape", [self._range(size), self.ints([1, -1, 1])], "r")], "i_MR1")
        low = self.op("Sub", [starts, back], "low_M11")
        j = self.op("Add", [low, self.op("Reshape", [self._range(span), self.ints([1, 1, -1])], "w")], "j_M1W")
        before = self.op("Sub", [offset, start], "before")
        return _Cut(queries, keys, size, tiles, span, before, i, j, low, self._everywhere(self._range(keys)))

    def _everywhere(self, positions: ir.Value) -> ir.Value | None:
        """Indices into some positions, of those that all see."""
        wide = self.op("Reshape", [positions, self.ints([1, 1, -1])], "p_11P")
        seen = seen_by_all(self, self.words, wide)
        if seen is None:
            return None
        flat = self.op("Reshape", [seen, self.ints([-1])], "seen_P")
        return self.op("Reshape", [self.op("NonZero", [flat], "found"), self.ints([-1])], "everywhere_C")

    def _pays(self, cut: _Cut) -> ir.Value:
        """Whether tiles hold no more scores than there are: a mask over all takes longer than they do."""
        width, rest = cut.span, self.scalar(0)
        if cut.everywhere is not None:
            count = self.size(self.op("Shape", [cut.everywhere], "count"), 0)
            width = self.op("Add", [width, count], "width")
            rest = rest if self.ordered else self.op("Mul", [count, cut.keys], "whole_rows")
        rows = self.op("Mul", [cut.tiles, cut.size], "MR")
        held = self.op("Add", [self.op("Mul", [rows, width], "in_tiles"), rest], "held")
        every = self.op("Mul", [cut.queries, cut.keys], "every")
        return self.op("Not", [self.op("Less", [every, held], "few")], "pays")

    # ------------------------------------------------------------ tiles

    def _attended(self, cut: _Cut) -> ir.Value:
        """[B, H, S, E]"""
        q = self._merged(self._by_tile(self.op("Mul", [self.q, self.scale], "scaled"), cut))
        edge = self.op("Sub", [cut.keys, self.scalar(1)], "edge")
        inside = self.op("Max", [self.op("Min", [cut.j, edge], "low"), self.scalar(0)], "inside_M1W")
        near = self.op("Reshape", [inside, self.ints([0, -1])], "near_MW")
        keys, values = (self._taken(x, near, 2) for x in (self.k, self.v))
        scores = [self._hidden(self._scores(q, keys, cut), self._near_bias(near, cut), self._near_shown(cut), cut)]
        mixes = [values]
        if cut.everywhere is not None:
            keys, values = (self._seen_by_tiles(x, cut.everywhere) for x in (self.k, self.v))
            bias = self._far_bias(cut.everywhere, cut)
            scores.append(self._hidden(self._scores(q, keys, cut), bias, self._far_shown(cut), cut))
            mixes.append(values)
        mixed = self._mixed(self._merged(self._softmax(scores, cut)), mixes, cut)
        output = self._in_order(mixed, cut)
        return output if self.ordered or cut.everywhere is None else self._with_whole_rows(output, cut)

    def _by_tile(self, x: ir.Value, cut: _Cut) -> ir.Value:
        """[B, H, S, *] -> [B, N, M, G, R, *]; rows before and behind the queries are zeros."""
        rows = self.op("Mul", [cut.tiles, cut.size], "MR")
        after = self.op("Sub", [self.op("Sub", [rows, cut.before], "left"), cut.queries], "after")
        pads = self.sizes(0, 0, cut.before, 0, 0, 0, after, 0)
        padded = self.op("Pad", [x, pads], "padded")
        heads = self._groups(x)
        last = self.size(self.op("Shape", [x], "shape"), 3)
        apart = self.op("Reshape", [padded, self.sizes(0, heads, -1, cut.tiles, cut.size, last)], "apart")
        return self.op("Transpose", [apart], "tiled", [ir.AttrInt64s("perm", _BY_TILE)])

    def _groups(self, x: ir.Value) -> ir.Value:
        """N, or 1 where x has one head for all."""
        heads = self.size(self.op("Shape", [x], "shape"), 1)
        return self.op("Min", [heads, self.size(self.k_shape, 1)], "N")

    def _merged(self, x: ir.Value) -> ir.Value:
        """[B, N, M, G, R, *] -> [B, N, M, G * R, *]"""
        last = self.size(self.op("Shape", [x], "shape"), 5)
        return self.op("Reshape", [x, self.sizes(0, 0, 0, -1, last)], "merged")

    def _taken(self, x: ir.Value, positions: ir.Value, axis: int) -> ir.Value:
        return self.op("Gather", [x, positions], "taken", [ir.AttrInt64("axis", axis)])

    def _seen_by_tiles(self, x: ir.Value, positions: ir.Value) -> ir.Value:
        """[B, N, 1, C, *]: the same for every tile."""
        last = self.size(self.op("Shape", [x], "shape"), 3)
        return self.op("Reshape", [self._taken(x, positions, 2), self.sizes(0, 0, 1, -1, last)], "seen")

    def _scores(self, q: ir.Value, keys: ir.Value, cut: _Cut) -> ir.Value:
        turned = self.op("Transpose", [keys], "turned", [ir.AttrInt64s("perm", [0, 1, 2, 4, 3])])
        flat = self.op("MatMul", [q, turned], "flat_scores")
        last = self.size(self.op("Shape", [flat], "shape"), 4)
        scores = self.op("Reshape", [flat, self.sizes(0, 0, 0, -1, cut.size, last)], "scores")
        if self.cap is None:
            return scores
        bent = self.op("Tanh", [self.op("Div", [scores, self.cap], "s")], "t")
        return self.op("Mul", [bent, self.cap], "capped")

    def _hidden(self, scores: ir.Value, bias: ir.Value | None, shown: ir.Value, cut: _Cut) -> ir.Value:
        """With the bias, and minus infinity where `shown` [M, R, *] is False."""
        if bias is not None:
            scores = self.op("Add", [scores, bias], "biased")
        last = self.size(self.op("Shape", [shown], "shape"), 2)
        wide = self.op("Reshape", [shown, self.sizes(1, 1, cut.tiles, 1, cut.size, last)], "shown_MRX")
        return self.op("Where", [wide, scores, self.minus], "hidden")

    def _near_shown(self, cut: _Cut) -> ir.Value:
        early = self.op("Less", [cut.j, self.scalar(0)], "early")
        inside = self.op("And", [self.op("Not", [early], "there"), self.op("Less", [cut.j, cut.keys], "in")], "key")
        return self.op("And", [relation(self, self.words, cut.i, cut.j), inside], "near_MRW")

    def _far_shown(self, cut: _Cut) -> ir.Value:
        """Keys that all see, unless they are in the span already."""
        assert cut.everywhere is not None
        far = self.op("Reshape", [cut.everywhere, self.ints([1, 1, -1])], "far_11C")
        end = self.op("Add", [cut.low, cut.span], "end_M11")
        behind = self.op("Not", [self.op("Less", [far, end], "not_behind")], "behind")
        outside = self.op("Or", [self.op("Less", [far, cut.low], "ahead"), behind], "outside_M1C")
        known = self.op("Less", [cut.i, far], "later")
        order = self.op("Not", [known], "past") if self.ordered else self.op("Or", [known, self.op("Not", [known],
                        "past")], "any")  # fmt: skip
        return self.op("And", [outside, order], "far_MRC")

    def _near_bias(self, near: ir.Value, cut: _Cut) -> ir.Value | None:
        if self.bias is None:
            return None
        groups = self._groups(self.bias)
        if self.bias_by_key:
            taken = self._taken(self.bias, near, 3)  # [B, H, 1, M, W]
            apart = self.op("Reshape", [taken, self.sizes(0, groups, -1, cut.tiles, 1, cut.span)], "apart")
            return self.op("Transpose", [apart], "near_bias", [ir.AttrInt64s("perm", _BY_TILE)])
        rows = self._by_tile(self.bias, cut)
        places = self.op("Reshape", [near, self.sizes(1, 1, cut.tiles, 1, 1, cut.span)], "places")
        lead = self.take(self.op("Shape", [rows], "shape"), [0, 1, 2, 3, 4])
        wide = self.op("Expand", [places, self.concat([lead, self.sizes(cut.span)])], "wide_places")
        return self.op("GatherElements", [rows, wide], "near_bias", [ir.AttrInt64("axis", 5)])

    def _far_bias(self, everywhere: ir.Value, cut: _Cut) -> ir.Value | None:
        if self.bias is None:
            return None
        taken = self._taken(self.bias, everywhere, 3)
        if not self.bias_by_key:
            return self._by_tile(taken, cut)
        last = self.size(self.op("Shape", [taken], "shape"), 3)
        return self.op("Reshape", [taken, self.sizes(0, self._groups(self.bias), 1, -1, 1, last)], "far_bias")

    def _softmax(self, scores: list[ir.Value], cut: _Cut) -> ir.Value:
        axis = [ir.AttrInt64("axis", -1)]
        real = scores[0] if len(scores) == 1 else self.op("Concat", scores, "all_scores", axis)
        if self.sinks is None:
            weights = self.op("Softmax", [real], "weights", axis)
        else:
            both = self.op("Concat", [real, self._by_tile(self._every_row(self.sinks), cut)], "with_sinks", axis)
            weights = self.op("Softmax", [both], "all_weights", axis)
            end = self.take(self.op("Shape", [real], "shape"), [5])
            weights = self.op("Slice", [weights, self.ints([0]), end, self.ints([5])], "weights")
        if not self.spec.masked_rows_are_zero:
            return weights
        return self.op("Where", [self.op("IsNaN", [weights], "empty"), self.zero, weights], "finite_weights")

    def _every_row(self, sinks: ir.Value) -> ir.Value:
        """[B, H, S, n]"""
        return self.op("Expand", [sinks, self.concat([self.take(self.q_shape, [0, 1, 2]), self.ints([1])])], "sinks_S")

    def _mixed(self, weights: ir.Value, values: list[ir.Value], cut: _Cut) -> ir.Value:
        if len(values) == 1:
            return self.op("MatMul", [weights, values[0]], "mixed")
        ends = self.sizes(cut.span), self.take(self.op("Shape", [weights], "shape"), [4])
        near = self.op("Slice", [weights, self.ints([0]), ends[0], self.ints([4])], "near_weights")
        far = self.op("Slice", [weights, ends[0], ends[1], self.ints([4])], "far_weights")
        parts = [self.op("MatMul", [w, v], "part") for w, v in zip((near, far), values, strict=True)]
        return self.op("Add", parts, "mixed")

    def _in_order(self, mixed: ir.Value, cut: _Cut) -> ir.Value:
        """[B, N, M, G * R, E] -> [B, H, S, E]"""
        last = self.size(self.v_shape, 3)
        apart = self.op("Reshape", [mixed, self.sizes(0, 0, 0, -1, cut.size, last)], "apart")
        turned = self.op("Transpose", [apart], "by_head", [ir.AttrInt64s("perm", _BY_TILE)])
        rows = self.op("Reshape", [turned, self.sizes(0, self.size(self.q_shape, 1), -1, last)], "rows")
        end = self.op("Add", [cut.before, cut.queries], "end")
        return self.op("Slice", [rows, self.sizes(cut.before), self.sizes(end), self.ints([2])], "tiled_BHSE")

    def _with_whole_rows(self, output: ir.Value, cut: _Cut) -> ir.Value:
        """Queries at positions that all see, see all."""
        first = self.op("Sub", [cut.keys, cut.queries], "first_query")
        rows = self._everywhere(self.op("Add", [self._range(cut.queries), first], "positions"))
        assert rows is not None
        bias = self.bias if self.bias is None or self.bias_by_key else self._taken(self.bias, rows, 2)
        sinks = None if self.sinks is None else self._taken(self._every_row(self.sinks), rows, 2)
        inputs = [self._taken(self.q, rows, 2), self.k, self.v, *(x for x in (bias, sinks) if x is not None)]
        function = onnx_body.function(_seeing_all(self.spec), onnx_body.ANY_OPSET)
        whole = self._call(function, inputs)
        there = [self.op("Transpose", [x], "by_row", [ir.AttrInt64s("perm", [2, 0, 1, 3])]) for x in (output, whole)]
        places = self.op("Reshape", [rows, self.ints([-1, 1])], "places")
        put = self.op("ScatterND", [there[0], places, there[1]], "put")
        return self.op("Transpose", [put], "with_whole_rows", [ir.AttrInt64s("perm", [1, 2, 0, 3])])

    # ------------------------------------------------------------ pieces

    def _number(self, name: str) -> ir.Value:
        """One of the sight's numbers, a scalar."""
        return self.op("Reshape", [sight_number(self, name), self.empty()], name)

    def _range(self, count: ir.Value) -> ir.Value:
        return self.op("Range", [self.scalar(0), count, self.scalar(1)], "range")

    def empty(self) -> ir.Value:
        """The shape of a scalar."""
        return self.op("Constant", [], "scalar", [ir.AttrTensor("value", ir.tensor(np.empty(0, np.int64)))])

    def size(self, shape: ir.Value, axis: int) -> ir.Value:
        return self.op("Gather", [shape, self.scalar(axis)], "size")

    def sizes(self, *parts: ir.Value | int) -> ir.Value:
        """A shape out of numbers and scalars of the graph."""
        ends = [self.ints([p]) if isinstance(p, int) else self.op("Reshape", [p, self.ints([1])], "p") for p in parts]
        return self.concat(ends)
