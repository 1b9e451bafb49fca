"""Downwards from the softmax to the product with values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.dataflow import CONTRACTIONS, Flow, Node, Value
from passes.match.contractions import moves_batch, require_projected
from passes.match.operand_view import OperandView
from passes.match.score_layout import flattens_rows, keeps_last_two, relaid_by, swaps_last_two
from passes.match.verdicts import INTEGER_SCORES
from passes.projections import einsum_terms
from passes.provenance import PASS_THROUGH

_EXPRESSION = 6
"""Operators one on top of the other that two masks are compared by."""


@dataclass(frozen=True)
class Mix:
    v: OperandView
    output: OperandView
    nodes: tuple[int, ...]
    zero_nan: bool


def values_weighted_by(flow: Flow, value: Value, turned: bool) -> Mix | str | None:
    """Follow the attention weights to their contraction with values; a string says why that failed.

    `turned`: they are [keys, queries].
    """
    nodes: list[int] = []
    zero_nan = False
    while True:
        if value in flow.outputs:
            return "the attention weights are an output of the model"
        readers = flow.live_readers(value)
        tests = [n for n in readers if n.op == "IsNaN"]
        rest = [n for n in readers if n not in tests]
        if len(rest) != 1:
            return _read_apart(rest) if rest else None
        node = rest[0]
        nodes += [n.index for n in tests]
        nodes.append(node.index)
        if node.op in CONTRACTIONS:
            return _value_operand(flow, node, value, turned, tuple(nodes), zero_nan)
        kept = node.op in PASS_THROUGH or (node.op == "Reshape" and keeps_last_two(flow, node))
        kept = kept or flattens_rows(flow, node)
        kept = kept or (node.op == "Expand" and flow.shape(node.inputs[0]) == flow.shape(node.outputs[0]))
        if kept or (node.op == "Slice" and _drops_columns(flow, node)):
            value = node.outputs[0]
        elif len(relaid := relaid_by(flow, node, down=True)) > 1:
            nodes += [n.index for n in relaid[1:]]
            value = relaid[-1].outputs[0]
        elif node.op == "Transpose" and swaps_last_two(flow, node):
            turned, value = not turned, node.outputs[0]
        elif node.op in {"Where", "MaskedFill"} and _replaces_nan(flow, node) and (tests or _hides_again(flow, node)):
            zero_nan, value = True, node.outputs[0]
        elif node.op in {"Where", "MaskedFill"}:
            return f"some of them are replaced (by {node.op}), and not just where the same mask hid their scores"
        elif node.op in {"Add", "Sub", "Mul", "Div"}:
            return f"they are combined with other numbers first ({node.op}; a gate, or other weights added to them)"
        else:
            return f"operator {node.op} reads them"


def _read_apart(readers: list[Node]) -> str:
    """Where weights go that more than one operator reads."""
    operators = {n.op for n in readers}
    if operators & {"Max", "ArgMax", "TopK"} or any("argmax" in op for op in operators):
        return "only the largest of each token's count (a hard assignment), so no softmax weighs values"
    if operators & CONTRACTIONS and all(n.op in CONTRACTIONS | {"Transpose", "ReduceSum"} for n in readers):
        return "they enter several products (as where their inverse is approximated, in Nyström attention)"
    if operators <= {"Gather", "Slice", "Split"}:
        return (
            "parts of them are read apart and combined (as in differential attention, where one head's weights are "
            "subtracted from another's); leave this attention as it is (layers= selects others)"
        )
    if operators <= {"Div", "ReduceSum"}:
        return "they are normalised once more (divided by a sum of theirs); what replaces them is a softmax alone"
    return f"{len(readers)} readers: {', '.join(sorted(operators))}"


def reaches_contraction(flow: Flow, softmax: Node) -> bool:
    """Whether the weights flow, through operators of any kind, into a contraction with other data.

    An operator that is not understood must not turn an attention into "not attention".
    """
    todo, seen = [softmax.outputs[0]], set[int]()
    while todo:
        for node in flow.readers(todo.pop()):
            if node.index in seen or flow.projection_operands(node) is not None:
                continue
            seen.add(node.index)
            if node.op in CONTRACTIONS:
                return True
            if node.op not in {"Add", "Sub", "Softmax", "TopK", "ArgMax"}:
                todo.extend(v for v in node.outputs if v)
    return False


def _drops_columns(flow: Flow, node: Node) -> bool:
    """Whether the last columns, those of sinks, are cut off."""
    before, after = flow.value(node.inputs[0]), flow.value(node.outputs[0])
    width = after.shape[-1]
    return before.shape[:-1] == after.shape[:-1] and bool(np.array_equal(before[..., :width], after))


def _replaces_nan(flow: Flow, node: Node) -> bool:
    fill = node.inputs[1] if node.op == "Where" else node.inputs[2]
    return not flow.data_dependent(fill) and not np.any(flow.value(fill))


def _hides_again(flow: Flow, node: Node) -> bool:
    """Whether a mask of fed data zeroes weights that are zero already, save in rows where all keys are masked."""
    condition, before = (node.inputs[0], node.inputs[2]) if node.op == "Where" else (node.inputs[1], node.inputs[0])
    if flow.data_dependent(condition) or not flow.data_dependent(before):
        return False
    if _masked_alike(flow, condition, before):
        return True
    weights, after = flow.value(before), flow.value(node.outputs[0])
    zeroed = np.broadcast_to(flow.value(condition).astype(bool), weights.shape)
    if zeroed.shape != after.shape or not zeroed.any() or zeroed.all(-1).all():
        return False
    alive = zeroed & ~zeroed.all(-1, keepdims=True)
    return not (weights[alive] != 0).any() and bool(np.array_equal(after[~zeroed], weights[~zeroed]))


def _masked_alike(flow: Flow, condition: Value, weights: Value) -> bool:
    """Whether the softmax that gives `weights` had its scores replaced by minus infinity under the same condition.

    Told from how both are computed, since an example may hide nothing.
    """
    node = _above_casts(flow, weights)
    if node is None or node.op != "Softmax" or (mask := _above_casts(flow, node.inputs[0])) is None:
        return False
    if mask.op == "MaskedFill":
        hides, fill = mask.inputs[1:3]
    elif mask.op == "Where" and flow.data_dependent(mask.inputs[2]):
        hides, fill = mask.inputs[:2]
    else:
        return False
    lowest = not flow.data_dependent(fill) and bool(np.isneginf(flow.value(fill)).all())
    return lowest and _computed_alike(flow, condition, hides, _EXPRESSION)


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


def _value_operand(
    flow: Flow, node: Node, weights: Value, turned: bool, nodes: tuple[int, ...], zero_nan: bool
) -> Mix | str:
    """The contraction of attention weights with values; `turned`: weights are [keys, queries] there."""
    if node.op == "QLinearMatMul":
        return INTEGER_SCORES
    a, b = node.inputs[:2]
    other = b if a == weights else a
    if not flow.data_dependent(other):
        require_projected(flow, other)
        return "they are multiplied by a constant matrix"
    plain = node.op == "MatMul" or (
        node.op == "FusedMatMul"
        and not moves_batch(node)
        and not any(node.attrs.get(n, 0) for n in ("transA", "transB"))
        and node.attrs.get("alpha", 1.0) == 1.0
    )
    if plain and a == weights and not turned:
        return Mix(OperandView(b, -2, -1), OperandView(node.outputs[0], -2, -1), nodes, zero_nan)
    if plain and b == weights and turned:  # features by tokens: values times weights
        return Mix(OperandView(a, -1, -2), OperandView(node.outputs[0], -1, -2), nodes, zero_nan)
    if node.op == "Einsum":
        try:
            first, second, result = einsum_terms(flow, node)
        except ValueError as error:
            return str(error)
        mine, theirs = (first, second) if a == weights else (second, first)
        query, key = (mine[-1], mine[-2]) if turned else (mine[-2], mine[-1])
        features = [c for c in theirs if c not in mine]
        if key in theirs and key not in result and len(features) == 1 and query in result:
            view = OperandView(other, theirs.index(key), theirs.index(features[0]))
            out = OperandView(node.outputs[0], result.index(query), result.index(features[0]))
            return Mix(view, out, nodes, zero_nan)
    return f"a {node.op} whose axes are not understood reads them"
