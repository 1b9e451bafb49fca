"""Which stored parameter a projection's matrix or bias is made from, and where each of its columns lies there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Node, Value
from passes.provenance import PASS_THROUGH


@dataclass(frozen=True)
class Location:
    """Columns of a value in a stored parameter.

    Attributes:
        key: the parameter's state-dict key.
        axis: its axis along which the columns lie.
        features: how many there are along it; more than the value's where it is packed with others.
        positions: the place along it of each of the value's columns.
    """

    key: str
    axis: int
    features: int
    positions: Array


def locate(flow: Flow, value: Value, axis: int | None) -> Location | None:
    """Where the columns of `value`, which run along its `axis`, are stored; None if they are not, each in one place.

    Without an axis each element is a column. Slices, transposes and reshapes between the two are run on element
    numbers.
    """
    steps: list[tuple[Node, Value]] = []
    name = value
    while name not in flow.weights or not flow.weights[name].name:
        node = flow.producer(name)
        if node is None or node.op not in LAYOUT | PASS_THROUGH:
            return None
        steps.append((node, name))
        name = node.inputs[0]
    shape = flow.weights[name].shape
    numbers: Array = np.arange(int(np.prod(shape))).reshape(shape)
    for node, output in reversed(steps):
        if node.op in PASS_THROUGH:
            continue
        inputs = [numbers, *(flow.value(v) if v else None for v in node.inputs[1:])]
        numbers = np.asarray(node.evaluate(inputs)[node.outputs.index(output)])
    lines = numbers.reshape(-1, 1) if axis is None else np.moveaxis(numbers, axis, 0).reshape(numbers.shape[axis], -1)
    return _located(flow.weights[name].name, shape, lines)


def _located(key: str, shape: tuple[int, ...], numbers: Array) -> Location | None:
    """From the numbers [columns, rest] of elements that a value takes from a parameter of this shape."""
    for axis, place in enumerate(np.unravel_index(numbers, shape)):
        whole = numbers.shape[1] * shape[axis] == int(np.prod(shape))
        if whole and (place == place[:, :1]).all() and len(np.unique(place[:, 0])) == len(place):
            return Location(key, axis, shape[axis], place[:, 0])
    return None
