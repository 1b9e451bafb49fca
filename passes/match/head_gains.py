"""What a norm multiplies each head's features by, where heads differ in that: found, and divided out of what is traced.

A norm over the features of all heads has a number for each of them, and so do some norms over each head's features.
The numbers stand behind the norm, written out, or among the inputs of an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import Array, Flow, Node, Value
from passes.forms import Source
from passes.match.verdicts import NotUnderstood
from passes.operator_kinds import NORMS, PASS_THROUGH
from passes.site import HeadGains


@dataclass(frozen=True)
class FoundGains:
    """A norm's numbers.

    Attributes:
        output: what the norm is behind them.
        index: which number (counted flat) each element of the norm is multiplied by, flat.
        inside: whether the norm is one operator, so that what is traced knows nothing of the numbers.
        factor: what all of the norm is multiplied by before.
    """

    output: Value
    gain: Value
    shift: Value | None
    reader: int
    index: Array
    inside: bool
    factor: float = 1.0

    def divided_out(
        self, flow: Flow, source: Source, ids: Sequence[Array], coefficients: Sequence[Array]
    ) -> list[Array]:
        """Coefficients of elements of the norm `source`, as coefficients of what is behind the numbers.

        Raises NotUnderstood if one of the numbers is zero.
        """
        if self.inside:
            return list(coefficients)
        numbers = np.asarray(flow.value(self.gain), dtype=np.float64).reshape(-1)
        if (numbers == 0).any():
            raise NotUnderstood("its norm multiplies some features by zero, so how they are rotated is not seen")
        factors = numbers[self.index] * self.factor
        found = []
        for own, coefficient in zip(ids, coefficients, strict=True):
            here = source.holds(own)
            found.append(np.where(here, coefficient / factors[np.where(here, own - source.base, 0)], coefficient))
        return found

    def of(self, to_columns: Array, columns: Array) -> HeadGains:
        """The numbers of heads whose features are these `columns` [heads, dim] of the projection; `to_columns` has the
        column of each element of the norm, flat."""
        place = np.full(int(to_columns.max()) + 1, -1)
        place[to_columns] = self.index
        return HeadGains(self.gain, self.shift, place[columns], self.reader)


def find_gains(flow: Flow, source: Source, dim: int) -> FoundGains | None:
    """The numbers behind a norm, if there are more than the features of one head."""
    if source.kind != "norm" or source.norm == "clip":
        return None
    node = flow.producer(source.value)
    if node is not None and node.op in NORMS:
        gain, shift, *_ = (*(v for v in node.inputs[1:3] if v), None, None)
        return None if gain is None else _found(flow, source, node, gain, shift, dim)
    name, factor = source.value, 1.0
    while len(readers := flow.live_readers(name)) == 1:
        reader = readers[0]
        others = [v for v in reader.inputs if v != name]
        constant = len(others) == 1 and not flow.data_dependent(others[0]) and not flow.is_fed(others[0])
        scales = constant and (reader.op == "Mul" or (reader.op == "Div" and reader.inputs[0] == name))
        if scales and flow.value(others[0]).size == 1 < dim:  # the square root of the features, before their gains
            number = float(flow.value(others[0]).reshape(()))
            factor *= number if reader.op == "Mul" else 1.0 / number
            name = reader.outputs[0]
            continue
        if reader.op == "Mul":
            found = _found(flow, source, reader, others[0], None, dim) if constant else None
            return None if found is None else replace(found, factor=factor)
        if reader.op not in PASS_THROUGH:
            return None
        name = reader.outputs[0]
    return None


def _found(flow: Flow, source: Source, reader: Node, gain: Value, shift: Value | None, dim: int) -> FoundGains | None:
    output, shape = reader.outputs[0], flow.shape(gain)
    size = int(np.prod(shape, dtype=np.int64))
    if alike_along_others(flow, gain, source.shape[-1]) and source.shape[-1] <= dim:
        return None
    if size <= dim or flow.shape(output) != source.shape or (shift is not None and flow.shape(shift) != shape):
        return None
    index = np.broadcast_to(np.arange(size).reshape(shape), source.shape).reshape(-1)
    return FoundGains(output, gain, shift, reader.index, index, output == source.value)


def alike_along_others(flow: Flow, gain: Value, features: int) -> bool:
    """Whether numbers that were spread over more axes than the last are the same along these."""
    shape = flow.shape(gain)
    if len(shape) < 2 or shape[-1] != features:
        return False
    rows = np.asarray(flow.value(gain)).reshape(-1, features)
    return bool((rows == rows[0]).all())


def require_mergeable(gains: HeadGains | None, kind: str, spans: bool, features: int, heads: int, dim: int) -> None:
    """Heads behind a norm must be such that fewer of them can be normalised alike; raises NotUnderstood.

    `spans`: the norm is over all `features` at once.
    """
    if spans and features != heads * dim:
        raise NotUnderstood("its norm spans the features of all heads and others besides")
    if spans and kind not in {"rms", "layer"}:
        raise NotUnderstood(
            "its norm divides by the length of all heads' features, so fewer heads would be longer; a root mean square "
            "in its place would not change with their number"
        )
    if gains is None:
        return
    first = np.sort(gains.places[0])
    if not np.array_equal(first, np.arange(dim)) or (np.diff(gains.places, axis=0) != dim).any():
        raise NotUnderstood("what its norm multiplies the heads by is not stored head after head")
