"""What attention weights meet behind the softmax that a mask of the scores says as well.

Weights set to zero by a mask, and divided by what is left of their sum, are a softmax of scores that the mask hides.
Where the scores were hidden by the same mask already, zeros are written over zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.dataflow import LAYOUT, Flow, Node, Value
from passes.match.score_terms import HIDDEN
from passes.operator_kinds import PASS_THROUGH, data_operands
from passes.site import Modifier

_EXPRESSION = 6
"""Operators one on top of the other that two masks are compared by."""

SUMS = frozenset({"ReduceSum", "ReduceL1"})
NOTHING = 1e-6
"""What may be added to a sum to keep it from being zero."""
OF_SUMS = frozenset({"Add", "Max", "Clip", "Greater", "GreaterOrEqual", "Equal", "Less", "Not"})
"""What sums of weights meet before they are divided by."""
MEET = SUMS | {"IsNaN", "Mul", "Div", "Where", "MaskedFill"}
"""What weights meet that is read here."""


@dataclass(frozen=True)
class Blanked:
    """Weights that a mask of fed data sets to zero; `keeps`: where it is not True."""

    mask: Value
    keeps: bool
    result: Value

    @property
    def modifier(self) -> Modifier:
        return Modifier("mask" if self.keeps else "unmask", self.mask, -np.inf)


@dataclass(frozen=True)
class Normalised:
    """Weights divided by their sum over keys.

    Attributes:
        nodes: the division, and what makes the sum a divisor.
        zero_rows: whether rows without any weight give zeros, not NaN.
    """

    result: Value
    nodes: tuple[int, ...]
    zero_rows: bool


def blanked(flow: Flow, node: Node, weights: Value) -> Blanked | None:
    """Read a node that may set weights to zero by a mask."""
    if node.op == "Mul":
        other = node.inputs[0] if node.inputs[1] == weights else node.inputs[1]
        if flow.data_dependent(other) or not _of_zeros_and_ones(flow, other):
            return None
        return Blanked(_boolean(flow, other), True, node.outputs[0])
    if node.op == "MaskedFill":
        condition, fill, keeps = node.inputs[1], node.inputs[2], False
    elif node.op == "Where":
        condition, keeps = node.inputs[0], node.inputs[1] == weights
        fill = node.inputs[2] if keeps else node.inputs[1]
    else:
        return None
    if weights == condition or any(flow.data_dependent(v) for v in (condition, fill)) or np.any(flow.value(fill)):
        return None
    return Blanked(condition, keeps, node.outputs[0])


def hides_again(flow: Flow, zeroed: Blanked, weights: Value) -> bool:
    """Whether weights are zero already where a mask zeroes them, save in rows where all keys are masked."""
    if _masked_alike(flow, zeroed, weights):
        return True
    before, after = flow.value(weights), flow.value(zeroed.result)
    hidden = np.broadcast_to(flow.value(zeroed.mask).astype(bool) != zeroed.keeps, before.shape)
    alive = hidden & ~hidden.all(-1, keepdims=True)
    if hidden.shape != after.shape or not alive.any():
        return False
    return not (before[alive] != 0).any() and bool(np.array_equal(after[~hidden], before[~hidden]))


def normalised(flow: Flow, weights: Value, turned: bool) -> Normalised | str | None:
    """Read the division of weights by their sum over keys, which may be kept from being zero.

    `turned`: weights are [keys, queries]. A string says why a division by sums is no such thing.
    """
    divisions = [n for n in flow.live_readers(weights) if n.op == "Div" and n.inputs[0] == weights]
    if len(divisions) != 1 or divisions[0].inputs[1] == weights:
        return None
    division = divisions[0]
    made = _made_of_sums(flow, division.inputs[1], weights)
    sums = [n for n in made or () if n.op in SUMS and n.inputs[0] == weights]
    if not made or len(sums) != 1:
        return None
    if not _over_keys(flow, weights, sums[0], -2 if turned else -1):
        return (
            "they are normalised once more, not over the keys of each query (as where slots compete for tokens); what "
            "replaces them is a softmax alone"
        )
    if any(_added(flow, n) > NOTHING for n in made):
        return (
            f"they are normalised once more, by a sum that more than {NOTHING:g} is added to, so they add up to less "
            "than one; what replaces them is a softmax alone"
        )
    result, nodes = division.outputs[0], [*(n.index for n in made), division.index]
    zero_rows = any(n.op in {"Add", "Max", "Clip", "Where"} for n in made)
    while len(readers := flow.live_readers(result)) == 1 and readers[0].op == "Where":
        condition, kept, other = readers[0].inputs
        tests = _made_of_sums(flow, condition, weights) if flow.data_dependent(condition) else None
        if not tests or kept != result or flow.data_dependent(other) or np.any(flow.value(other)):
            break
        result, zero_rows = readers[0].outputs[0], True
        nodes += [*(n.index for n in tests), readers[0].index]
    if any(n.index not in nodes for value in (weights, sums[0].outputs[0]) for n in flow.live_readers(value)):
        return None
    return Normalised(result, tuple(dict.fromkeys(nodes)), zero_rows)


def _made_of_sums(flow: Flow, value: Value, weights: Value) -> list[Node] | None:
    """Nodes by which `value` is computed from the sums of weights; None if anything else of the data enters it."""
    above = flow.ancestors(value, stop=lambda n: weights in n.outputs)
    found = [n for n in above if weights not in n.outputs and any(flow.data_dependent(v) for v in n.outputs if v)]
    return found if all(n.op in SUMS | OF_SUMS | LAYOUT | PASS_THROUGH for n in found) else None


def _added(flow: Flow, node: Node) -> float:
    """What keeps a sum from being zero: a number that is added to it, or a floor."""
    if node.op == "Clip":
        low = node.inputs[1] if len(node.inputs) > 1 else ""
        return float(flow.value(low).max()) if low else float(node.attrs.get("min", 0.0))
    numbers = [v for v in node.inputs if not flow.data_dependent(v)] if node.op in {"Add", "Max"} else []
    return max((float(flow.value(v).max()) for v in numbers), default=0.0)


def _over_keys(flow: Flow, weights: Value, total: Node, axis: int) -> bool:
    """Whether sums run over that axis, told from the numbers: where both axes are as long, shapes do not tell."""
    wished, seen = flow.value(weights).sum(axis).reshape(-1), flow.value(total.outputs[0]).reshape(-1)
    return wished.shape == seen.shape and np.allclose(wished, seen, rtol=1e-2, atol=1e-6)


def _of_zeros_and_ones(flow: Flow, value: Value) -> bool:
    """Whether no element can be anything else: made of booleans or integers that are, or a constant that is."""
    numbers = flow.value(value)
    if numbers.dtype == np.bool_:
        return True
    if not np.isin(numbers, (0, 1)).all():
        return False
    node = flow.producer(value)
    if flow.is_constant(value) or (np.issubdtype(numbers.dtype, np.integer) and node is None):
        return True
    if node is None:
        return False
    if node.op == "Sub" and flow.is_constant(node.inputs[0]) and bool((flow.value(node.inputs[0]) == 1).all()):
        return _of_zeros_and_ones(flow, node.inputs[1])
    if node.op == "Mul":
        return all(_of_zeros_and_ones(flow, v) for v in node.inputs)
    if node.op in LAYOUT | PASS_THROUGH:
        return all(_of_zeros_and_ones(flow, node.inputs[i]) for i in data_operands(node))
    return False


def _boolean(flow: Flow, value: Value) -> Value:
    """What a mask was before it was made numbers to multiply by, if that is seen right above."""
    while (node := flow.producer(value)) is not None and node.op in PASS_THROUGH:
        if flow.value(node.inputs[0]).dtype == np.bool_:
            return node.inputs[0]
        value, above = node.inputs[0], value
        if not np.array_equal(flow.value(value), flow.value(above)):
            return above
    return value


def _masked_alike(flow: Flow, zeroed: Blanked, weights: Value) -> bool:
    """Whether the softmax that gives `weights` had its scores hidden under the same condition.

    Told from how both are computed, since an example may hide nothing.
    """
    node = _above_casts(flow, weights)
    if node is None or node.op != "Softmax" or (mask := _above_casts(flow, node.inputs[0])) is None:
        return False
    if mask.op == "MaskedFill":
        condition, fill, keeps = mask.inputs[1], mask.inputs[2], False
    elif mask.op == "Where" and flow.data_dependent(mask.inputs[2]) != flow.data_dependent(mask.inputs[1]):
        keeps = flow.data_dependent(mask.inputs[1])
        condition, fill = mask.inputs[0], mask.inputs[2 if keeps else 1]
    else:
        return False
    if flow.data_dependent(fill) or not bool((flow.value(fill) <= -HIDDEN).all()):
        return False
    (a, kept), (b, shown) = _plain(flow, zeroed.mask, zeroed.keeps), _plain(flow, condition, keeps)
    return kept == shown and _computed_alike(flow, a, b, _EXPRESSION)


def _plain(flow: Flow, condition: Value, keeps: bool) -> tuple[Value, bool]:
    """A condition above its negations."""
    while (node := flow.producer(condition)) is not None and node.op in {"Not", "Identity"}:
        condition, keeps = node.inputs[0], keeps != (node.op == "Not")
    return condition, keeps


def _above_casts(flow: Flow, value: Value) -> Node | None:
    node = flow.producer(value)
    while node is not None and node.op in PASS_THROUGH:
        node = flow.producer(node.inputs[0])
    return node


def _computed_alike(flow: Flow, a: Value, b: Value, depth: int) -> bool:
    """Whether two values are the same operators on the same values, or on equal constants, up to some depth."""
    if a == b:
        return True
    if flow.is_constant(a) and flow.is_constant(b):
        return np.array_equal(flow.value(a), flow.value(b))
    first, second = flow.producer(a), flow.producer(b)
    if depth == 0 or first is None or second is None or first.op != second.op or first.likeness() is None:
        return False
    same = first.likeness() == second.likeness() and len(first.inputs) == len(second.inputs)
    place = first.outputs.index(a) == second.outputs.index(b)
    pairs = zip(first.inputs, second.inputs, strict=False)
    return same and place and all(_computed_alike(flow, x, y, depth - 1) for x, y in pairs)
