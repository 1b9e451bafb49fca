"""Fake quantisation on the way: QuantizeLinear and DequantizeLinear, executed again where replay recomputes values.

Within its range a quantiser moves a value by half a step; beyond it the value saturates, and only re-execution tells
what the program saw.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Node, Value
from passes.operator_kinds import PASS_THROUGH, data_operands


@dataclass(frozen=True)
class Rounding:
    """One quantiser followed by its inverse.

    Attributes:
        quantize: the QuantizeLinear.
        factor: constant by which values are multiplied further on.
        after: how many of the steps that replay takes come before it.
    """

    quantize: Node
    factor: float
    after: int


def quantizer_of(flow: Flow, node: Node) -> Node | None:
    """The QuantizeLinear that this DequantizeLinear undoes, with one scale for the whole tensor; None otherwise."""
    before = flow.producer(node.inputs[0]) if node.op == "DequantizeLinear" else None
    if before is None or before.op != "QuantizeLinear" or flow.value(before.inputs[1]).size != 1:
        return None
    return before


def executed(flow: Flow, roundings: Iterable[Rounding], values: Array) -> Array:
    """`values`, float64, after these roundings."""
    for rounding in roundings:
        node = rounding.quantize
        scale = float(flow.value(node.inputs[1]).reshape(()))
        given = flow.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros((), np.uint8)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            steps = _steps(values / rounding.factor / scale, given)
        values = steps * scale * rounding.factor
    return values


def _steps(values: Array, point: Array) -> Array:
    """Values in units of the scale, rounded to what is stored beside a zero point like this one."""
    if point.dtype.name.startswith("float"):  # floats of eight bits, whose zero point is zero
        highest = float(ml_dtypes.finfo(point.dtype).max)  # type: ignore[no-untyped-call]
        return np.asarray(np.clip(values, -highest, highest).astype(point.dtype), dtype=np.float64)
    limits = ml_dtypes.iinfo(point.dtype)  # type: ignore[no-untyped-call]
    zero = int(point.reshape(-1)[0])
    return np.asarray(np.clip(np.rint(values) + zero, int(limits.min), int(limits.max)) - zero)


def operand_roundings(flow: Flow, matrix: Value, output: Value, end: Value) -> tuple[tuple[Rounding, ...], ...]:
    """(before the bias, after it): roundings between a projection's product `matrix` and the operand at the anchor.

    `output` is the projection's result, bias included. Where two branches meet (a rotation written out), none are
    found; what the operand would be without them says `unrounded`.
    """
    after, last = _walk(flow, end, output)
    if last != output:
        return (), ()
    node = flow.producer(output)
    addends = [v for v in node.inputs if flow.data_dependent(v)] if node is not None and node.op == "Add" else []
    before, _ = _walk(flow, addends[0], matrix) if len(addends) == 1 else ((), output)
    return before, after


def rounded_in_branches(flow: Flow, output: Value, end: Value) -> bool:
    """Whether quantisers stand in branches between a value and the operand made of it, or behind them."""
    found, last = _walk(flow, end, output)
    if last == output:
        return False
    between = flow.ancestors(last, stop=lambda node: output in node.outputs)
    return bool(found) or any(quantizer_of(flow, node) is not None for node in between)


def unrounded(flow: Flow, value: Value, starts: Collection[Value]) -> Array:
    """What a value would be if nothing were quantised between the recorded `starts` and it.

    Raises NotImplementedError where a node does not run by itself.
    """
    known: dict[Value, Array] = {}

    def computed(name: Value) -> Array:
        node = flow.producer(name)
        if node is None or name in starts or not flow.data_dependent(name):
            return flow.value(name)
        if name not in known:
            quantize = quantizer_of(flow, node)
            if quantize is not None:
                known[name] = computed(quantize.inputs[0])
            else:
                made = node.evaluate([computed(v) if v else None for v in node.inputs])
                known.update(zip(node.outputs, made, strict=True))
        return known[name]

    return computed(value)


def _walk(flow: Flow, value: Value, start: Value) -> tuple[tuple[Rounding, ...], Value]:
    """Roundings from `start` down to `value`, and where the way up ended."""
    found: list[Rounding] = []
    factor = 1.0
    while value != start and (node := flow.producer(value)) is not None:
        quantize = quantizer_of(flow, node)
        if quantize is not None:
            found.append(Rounding(quantize, factor, 0))
            value = quantize.inputs[0]
        elif node.op in PASS_THROUGH or (node.op in LAYOUT and len(data_operands(node)) == 1):
            value = node.inputs[0]
        elif (scaled := _scaled(flow, node)) is not None:
            value, number = scaled
            factor *= number
        else:
            break
    return tuple(reversed(found)), value


def _scaled(flow: Flow, node: Node) -> tuple[Value, float] | None:
    """(operand, number) of a product with or a quotient by one constant number."""
    if node.op not in {"Mul", "Div"}:
        return None
    data = [v for v in node.inputs[:2] if flow.data_dependent(v)]
    other = [v for v in node.inputs[:2] if not flow.data_dependent(v)]
    if len(data) != 1 or (node.op == "Div" and node.inputs[0] != data[0]) or flow.value(other[0]).size != 1:
        return None
    number = float(flow.value(other[0]).reshape(()))
    return (data[0], number if node.op == "Mul" else 1.0 / number) if number else None
