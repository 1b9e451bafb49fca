"""Hard routing in standard ONNX operators, valid at any opset from 12 on: part of the functions of both branches' ops.

TopK breaks ties by the lower index, by its definition. Routed rows are distinct, so that results are added to what
stands there and written back.

Shape legend: B batch, S tokens, M routed tokens, E features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from codegen.conditional import Router
from codegen.ops.function_body import FunctionBody, computed_in

DOMAIN = "rewriter.ops"

LEAST = -1e30
"""Stands for minus infinity, without making differences undefined."""


def attributes(dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: the ONNX numbers of x's dtype and of what routers and softmaxes compute in."""
    return [ir.AttrInt64("dtype", int(dtype)), ir.AttrInt64("compute", int(computed_in(dtype)))]


def stored_as(name: str, dtype: ir.DataType) -> ir.DataType:
    """The dtype in which a parameter is an input, for x of `dtype`: routers stay wide."""
    return computed_in(dtype) if "router" in name else dtype


class ConditionalBody(FunctionBody):
    """A body on x [B, S, E].

    Attributes:
        batch, tokens: B and S, of shape [1].
        flat: x as [B S, E].
    """

    def __init__(self, x: ir.Value, hidden: int) -> None:
        super().__init__()
        shape = self.op("Shape", [x], "shape")
        self.batch, self.tokens = self.take(shape, [0]), self.take(shape, [1])
        self.wide = self.cast(x, "compute", "wide_BSE")
        self.flat = self.reshaped(x, [-1, hidden], "flat_NE")

    def reshaped(self, value: ir.Value, sizes: list[int | ir.Value], name: str) -> ir.Value:
        return self.op("Reshape", [value, self.sizes(sizes)], name)

    def sizes(self, sizes: list[int | ir.Value]) -> ir.Value:
        return self.concat([s if isinstance(s, ir.Value) else self.ints([s]) for s in sizes])

    def turned(self, value: ir.Value, perm: list[int], name: str) -> ir.Value:
        return self.op("Transpose", [value], name, [ir.AttrInt64s("perm", perm)])

    def joined(self, parts: list[ir.Value], axis: int, name: str) -> ir.Value:
        return self.op("Concat", parts, name, [ir.AttrInt64("axis", axis)])

    def cut(self, value: ir.Value, axis: int, start: int, end: int | ir.Value, name: str) -> ir.Value:
        stop = end if isinstance(end, ir.Value) else self.ints([end])
        return self.op("Slice", [value, self.ints([start]), stop, self.ints([axis])], name)

    def filled(self, sizes: list[int | ir.Value], number: float | bool, name: str) -> ir.Value:
        """Of one number: booleans, or what a cast to `dtype` makes of it."""
        if isinstance(number, bool):
            value = ir.AttrTensor("value", ir.tensor(np.array([number])))
            return self.op("ConstantOfShape", [self.sizes(sizes)], name, [value])
        value = ir.AttrTensor("value", ir.tensor(np.array([number], np.float32)))
        return self.cast(self.op("ConstantOfShape", [self.sizes(sizes)], name, [value]), "dtype", name)

    def array(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], name: str) -> ir.Value:
        return self.op("Constant", [], name, [ir.AttrTensor("value", ir.tensor(array))])

    def least(self) -> ir.Value:
        return self.cast(self.array(np.array(LEAST, np.float32), "number"), "compute", "least")

    def product(self, x: ir.Value, held: dict[str, ir.Value], name: str) -> ir.Value:
        """x times the parameter `name`_weight, and `name`_bias where there is one."""
        found = self.op("MatMul", [x, held[f"{name}_weight"]], f"{name}_products")
        bias = held.get(f"{name}_bias")
        return found if bias is None else self.op("Add", [found, bias], name)


@dataclass(frozen=True)
class Routed:
    """Attributes:
    index: [B, M] tokens of each sequence. rows: [B, M], the same among all B S.
    weight: [B, M, 1], 0 for padding; None where there is none.
    """

    index: ir.Value
    rows: ir.Value
    weight: ir.Value | None


def routed(body: ConditionalBody, router: Router, u: ir.Value, shown: ir.Value | None, name: str) -> Routed:
    """By the scores of x's tokens; `shown` is bool [B, S]."""
    scores = body.op("MatMul", [body.wide, u], f"{name}_scores_BS")
    if shown is not None:
        scores = body.op("Where", [shown, scores, body.least()], f"{name}_ranked_BS")
    node = ir.Node("", "TopK", [scores, _budget(body, router)], [ir.AttrInt64("axis", 1)], num_outputs=2)
    for output, kind in zip(node.outputs, ("values", "index"), strict=True):
        output.name = body.unique(f"{name}_{kind}_BM")
    body.nodes.append(node)
    index = node.outputs[1]
    limit = body.op("Squeeze", [body.batch], "limit")
    number = body.op("Range", [body.scalar(0), limit, body.scalar(1)], "numbers")
    start = body.op("Mul", [body.reshaped(number, [-1, 1], "column"), body.tokens], "start_B1")
    rows = body.op("Add", [index, start], f"{name}_rows_BM")
    if shown is None:
        return Routed(index, rows, None)
    seen = body.op("Gather", [body.reshaped(shown, [-1], "shown_N"), rows], f"{name}_shown_BM")
    weight = body.cast(body.reshaped(seen, [body.batch, -1, 1], "column"), "dtype", f"{name}_weight_BM1")
    return Routed(index, rows, weight)


def added(body: ConditionalBody, light: ir.Value, found: ir.Value, to: Routed, hidden: int) -> ir.Value:
    """[B, S, E]: light [B, S, E], and found [B, M, E] where it belongs."""
    weighted = found if to.weight is None else body.op("Mul", [found, to.weight], "weighted_BME")
    flat = body.reshaped(light, [-1, hidden], "light_NE")
    there = body.op("Add", [body.op("Gather", [flat, to.rows], "there_BME"), weighted], "both_BME")
    places = body.reshaped(to.rows, [body.batch, -1, 1], "places_BM1")
    whole = body.op("ScatterND", [flat, places, there], "whole_NE")
    return body.reshaped(whole, [body.batch, -1, hidden], "mixed_BSE")


def _budget(body: ConditionalBody, router: Router) -> ir.Value:
    """k, of shape [1]; rounded half to even, as Python rounds."""
    double = body.op("Cast", [body.tokens], "tokens_double", [ir.AttrInt64("to", int(ir.DataType.DOUBLE))])
    share = body.op("Mul", [double, body.array(np.array([router.fraction], np.float64), "fraction")], "share")
    whole = body.op("Cast", [body.op("Round", [share], "rounded")], "k", [ir.AttrInt64("to", int(ir.DataType.INT64))])
    return body.op("Min", [body.op("Max", [whole, body.ints([1])], "at_least_one"), body.tokens], "k")
