"""Downwards from the softmax to the product with values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.dataflow import CONTRACTIONS, Flow, Node, Value
from passes.match.contractions import moves_batch, require_projected
from passes.match.masked_weights import Blanked, blanked, hides_again, normalised
from passes.match.operand_view import OperandView
from passes.match.score_layout import flattens_rows, keeps_last_two, relaid_by, swaps_last_two
from passes.match.verdicts import INTEGER_SCORES
from passes.operator_kinds import PASS_THROUGH
from passes.projections import einsum_terms
from passes.site import Modifier

_FORKS = 8
"""Places with several readers that weights are followed through."""


@dataclass(frozen=True)
class Mix:
    """The product of weights with values.

    Attributes:
        zero_nan: whether rows whose keys are all masked give zeros.
        masks: what hides keys from the weights, as masks of their scores, and the shape of the weights that each meets.
        read: whether the weights are read by something else, too, or are an output of the program.
    """

    v: OperandView
    output: OperandView
    nodes: tuple[int, ...]
    zero_nan: bool
    masks: tuple[tuple[Modifier, tuple[int, ...]], ...] = ()
    read: bool = False


@dataclass(frozen=True)
class _Met:
    """What weights have met on their way; see `Mix`.

    Attributes:
        waiting: masks behind which weights have not been normalised again yet.
        forks: how often there were several readers.
    """

    nodes: tuple[int, ...] = ()
    zero_nan: bool = False
    masks: tuple[tuple[Modifier, tuple[int, ...]], ...] = ()
    waiting: tuple[tuple[Blanked, Node], ...] = ()
    read: bool = False
    forks: int = 0


def values_weighted_by(flow: Flow, value: Value, turned: bool) -> Mix | str | None:
    """Follow the attention weights to their contraction with values; a string says why that failed.

    `turned`: they are [keys, queries].
    """
    return _followed(flow, value, turned, _Met(), None)


def _followed(flow: Flow, value: Value, turned: bool, met: _Met, first: Node | None) -> Mix | str | None:
    """`first` is the reader that is followed, where there are several."""
    nodes, masks, waiting = list(met.nodes), list(met.masks), list(met.waiting)
    zero_nan, read = met.zero_nan, met.read
    while True:
        read |= value in flow.outputs
        again = normalised(flow, value, turned) if first is None else None
        if isinstance(again, str):
            return again
        if again is not None:
            nodes, zero_nan, value = [*nodes, *again.nodes], zero_nan or again.zero_rows, again.result
            masks += [(mask.modifier, flow.shape(mask.result)) for mask, _ in waiting]
            waiting = []
            if masks and turned:
                return "they are masked behind the softmax where they are [keys, queries]"
            continue
        readers = flow.live_readers(value)
        tests = [n for n in readers if n.op == "IsNaN"]
        rest = [n for n in readers if n not in tests]
        if not rest:
            return None
        if first is None:
            nodes += [n.index for n in tests]
        if first is None and len(rest) > 1:
            if met.forks > _FORKS:
                return _read_apart(rest)
            here = _Met(tuple(nodes), zero_nan, tuple(masks), tuple(waiting), True, met.forks + 1)
            return _only_mix(flow, value, rest, [_followed(flow, value, turned, here, n) for n in rest])
        node, first = first or rest[0], None
        nodes.append(node.index)
        if node.op in CONTRACTIONS:
            if waiting:
                return _not_normalised(waiting[0][1])
            mix = _value_operand(flow, node, value, turned, tuple(nodes), zero_nan)
            return replace(mix, masks=tuple(masks), read=read) if isinstance(mix, Mix) else mix
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
        elif tests and node.op in {"Where", "MaskedFill"} and _replaces_nan(flow, node):
            zero_nan, value = True, node.outputs[0]
        elif (zeroed := blanked(flow, node, value)) is not None:
            if hides_again(flow, zeroed, value):
                zero_nan = True
            else:
                waiting.append((zeroed, node))
            value = zeroed.result
        elif node.op in {"Where", "MaskedFill"}:
            return f"some of them are replaced (by {node.op}) with other numbers than zero, or by what data decides"
        elif node.op == "Mul" and any(flow.is_fed(v) and not flow.data_dependent(v) for v in node.inputs):
            return (
                "they are multiplied by what the program is fed, which may be other than zero and one (a mask that is "
                "an input of floats); compare it with zero first (mask != 0), which is read"
            )
        elif node.op in {"Add", "Sub", "Mul", "Div"}:
            return f"they are combined with other numbers first ({node.op}; a gate, or other weights added to them)"
        else:
            return f"operator {node.op} reads them"


def _not_normalised(node: Node) -> str:
    """What to say of weights that are masked and go on as they are left."""
    return (
        f"some of them are set to zero (by {node.op}) where their scores were not hidden by the same mask, and they "
        "are not normalised again, so they add up to less than one; mask the scores, or leave this attention as it is "
        "(layers= selects others)"
    )


def _replaces_nan(flow: Flow, node: Node) -> bool:
    fill = node.inputs[1] if node.op == "Where" else node.inputs[2]
    return not flow.data_dependent(fill) and not np.any(flow.value(fill))


def _only_mix(flow: Flow, weights: Value, readers: list[Node], ends: Sequence[Mix | str | None]) -> Mix | str:
    """What the one of several readers leads to that mixes values; a string says why there is none."""
    mixes = [end for end in ends if isinstance(end, Mix)]
    others = [n for n, end in zip(readers, ends, strict=True) if not isinstance(end, Mix)]
    if len(mixes) == 1 and not any(_multiplies(flow, n) for n in others):
        return mixes[0]
    if len(mixes) > 1 and not any(_made_of(flow, mix.v.value, weights) for mix in mixes):
        return (
            f"the same weights mix {len(mixes)} sets of values (as where layers after one another share one "
            "attention's weights), whose heads cannot be shared as one's; leave this attention as it is (layers= "
            "selects others)"
        )
    return _read_apart(readers)


def _multiplies(flow: Flow, node: Node) -> bool:
    """Whether a reader of weights multiplies them by other data, turned round perhaps."""
    if node.op == "Transpose":
        return any(_multiplies(flow, n) for n in flow.live_readers(node.outputs[0]) if n.op in CONTRACTIONS)
    return node.op in CONTRACTIONS and all(flow.data_dependent(v) for v in node.inputs[:2])


def _made_of(flow: Flow, value: Value, weights: Value) -> bool:
    """Whether a value is computed from attention weights without a projection between."""
    above = flow.ancestors(value, stop=lambda n: weights in n.outputs or flow.projection_operands(n) is not None)
    return any(weights in n.outputs for n in above)


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


def _value_operand(
    flow: Flow, node: Node, weights: Value, turned: bool, nodes: tuple[int, ...], zero_nan: bool
) -> Mix | str:
    """The contraction of attention weights with values; `turned`: weights are [keys, queries] there."""
    if node.op == "QLinearMatMul":
        return INTEGER_SCORES
    if len(node.inputs) > 2 and node.op == "Einsum":
        try:
            einsum_terms(flow, node)
        except ValueError as error:
            return str(error)
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
