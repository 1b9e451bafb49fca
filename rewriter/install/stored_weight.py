"""Which stored parameter a projection's matrix or bias is made from, and where each of its columns lies there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Value, Weight
from passes.operator_kinds import PASS_THROUGH, data_operands


@dataclass(frozen=True)
class Location:
    """Columns of a value in a stored parameter.

    Attributes:
        key: the parameter's state-dict key.
        axes: its axes along which the columns lie, joined in this order: one of a matrix, those for heads and features
            of a stack of matrices.
        features: how many there are along them; more than the value's where it is packed with others.
        positions: the place along them of each of the value's columns, or of those that were asked for, in their shape.
    """

    key: str
    axes: tuple[int, ...]
    features: int
    positions: Array


def parameter_of(flow: Flow, value: Value) -> Weight | None:
    """The stored parameter that `value` is, up to a cast; None if it is another."""
    while value not in flow.weights:
        node = flow.producer(value)
        if node is None or node.op not in PASS_THROUGH:
            return None
        value = node.inputs[0]
    return flow.weights[value]


def locate(flow: Flow, value: Value, axes: Sequence[int], columns: Array | None = None) -> Location | None:
    """Where the columns of `value`, which run along its `axes`, are stored; None if they are not, each in one place.

    Without axes each element is a column; of a value that is joined from several parameters (a bias of a parameter,
    zeros and another parameter) only some `columns` may be asked for. Slices, transposes, reshapes and joins between
    the two are run on element numbers.
    """
    stored = _Stored(flow)
    numbers = stored.numbers(value)
    along = tuple(range(numbers.ndim)) if not axes else tuple(axis % numbers.ndim for axis in axes)
    features = int(np.prod([numbers.shape[axis] for axis in along], dtype=np.int64))
    lines = np.moveaxis(numbers, along, range(len(along))).reshape(features, -1)
    wanted = np.arange(len(lines)) if columns is None else columns
    lines = lines[wanted.reshape(-1)]
    for name, start in stored.starts.items():
        shape = flow.weights[name].shape
        if (lines >= start).all() and (lines < start + int(np.prod(shape))).all():
            return _located(flow.weights[name].name, shape, lines - start, wanted.shape)
    return None


@dataclass
class _Stored:
    """Numbers every element of the stored parameters that are met, from 0 on; -1 is an element of none."""

    flow: Flow
    starts: dict[Value, int] = field(default_factory=dict)
    total: int = 0

    def numbers(self, value: Value) -> Array:
        weight, node = self.flow.weights.get(value), self.flow.producer(value)
        if weight is not None and weight.name:
            if value not in self.starts:
                self.starts[value] = self.total
                self.total += int(np.prod(weight.shape))
            return self.starts[value] + np.arange(int(np.prod(weight.shape))).reshape(weight.shape)
        if node is None or node.op not in LAYOUT | PASS_THROUGH:
            return np.full(self.flow.shape(value), -1)
        if node.op in PASS_THROUGH:
            return self.numbers(node.inputs[0])
        data = data_operands(node)
        inputs = [
            None if not v else self.numbers(v) if i in data else self.flow.value(v) for i, v in enumerate(node.inputs)
        ]
        return np.asarray(node.evaluate(inputs)[node.outputs.index(value)])


def _located(key: str, shape: tuple[int, ...], numbers: Array, wanted: tuple[int, ...]) -> Location | None:
    """From the numbers [columns, rest] of elements that a value takes from a parameter of this shape."""
    # one axis at a time: numpy 2.4 takes columns of more than 8192 numbers for others
    places = [place.reshape(numbers.shape) for place in np.unravel_index(numbers.reshape(-1), shape)]
    fixed = tuple(axis for axis, place in enumerate(places) if (place == place[:, :1]).all())
    if not (np.diff(numbers, axis=1) > 0).all():  # what is written back is in the stored order
        return None
    for axes in (*((axis,) for axis in fixed), fixed):
        sizes = [shape[axis] for axis in axes]
        features = int(np.prod(sizes, dtype=np.int64))
        if not axes or numbers.shape[1] * features != int(np.prod(shape)):
            continue
        where = np.ravel_multi_index([places[axis][:, 0] for axis in axes], sizes)
        if len(np.unique(where)) == len(where):
            return Location(key, axes, features, where.reshape(wanted))
    return None
