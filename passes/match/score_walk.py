"""Upwards from the softmax to the product of queries and keys: scales, masks, biases and what else scores meet."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import numpy as np

from passes.dataflow import CONTRACTIONS, LAYOUT, Array, Flow, Node, Value
from passes.match.choosing import REASON as CHOSEN
from passes.match.choosing import content_bias, is_chosen
from passes.match.contractions import contracted_by, contracts, first_contraction, require_projected, two_terms
from passes.match.roundings import Rounding, quantizer_of
from passes.match.score_layout import flattens_rows, keeps_last_two, relaid_by, swaps_last_two
from passes.match.score_terms import HIDDEN, total_bias
from passes.match.verdicts import (
    INTEGER_SCORES,
    LEARNED_QUERY,
    TALKING_HEADS,
    TURNED,
    FreeQuery,
    NotUnderstood,
    SurelyAttention,
    Unrelated,
)
from passes.operator_kinds import PASS_THROUGH
from passes.site import Modifier
from passes.whole_projection import projection_at

_ADDITIVE = "its scores are a learned function of each query and key together (additive attention), not their product"

MOST_SUMS = 8
"""Biases of hidden states that are told from scores, one within the other."""


@dataclass
class ScoreWalk:
    """Walks from softmax up to the contraction of two data operands.

    `scale` is the product of the factors met so far: it multiplies whatever is found further up.
    """

    flow: Flow
    turned: bool = False
    """Whether scores are [keys, queries] where the walk is."""
    behind: tuple[Modifier, ...] = ()
    """Masks that are applied to the weights, behind the softmax."""
    scale: float = 1.0
    modifiers: list[Modifier] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    shifted: bool = False
    roundings: list[Rounding] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    tried: dict[tuple[Value, bool], bool] = field(default_factory=dict)
    """Whether a product of queries and keys was found above a value, by what `turned` was there."""
    depth: int = 0
    """In how many sums this walk is a trial of one term."""
    contraction: Node = field(init=False)

    def run(self, value: Value) -> ScoreWalk:
        while True:
            node = self.flow.producer(value)
            if node is None or not self.flow.data_dependent(value):
                raise Unrelated("its input does not depend on hidden states")
            router = Unrelated("it normalises a learned projection (a router, a classifier or weights for pooling)")
            if node.op == "Einsum" and len(node.inputs) > 2:
                two_terms(self.flow, node)  # says why not
            projects = self.flow.projection_operands(node) is not None
            if projects:
                self._refuse_scores(node)
            if (free := self._free_operand(node)) is not None:
                raise FreeQuery(free, self._asked_by_parameters(node, free) or router)
            if projects:
                raise router
            if self._is_contraction(node):
                self.contraction = node
                return self
            value = self._step(node)
            if self.turned and len(self.modifiers) > len(self.shapes):
                raise NotUnderstood(TURNED)
            shape = self.flow.shape(node.outputs[0])
            self.shapes += [shape] * (len(self.modifiers) - len(self.shapes))
            self.ranks += [len(shape)] * (len(self.modifiers) - len(self.ranks))
            self.nodes.append(node.index)

    def _asked_by_parameters(self, node: Node, free: Value) -> NotUnderstood | None:
        """What to say of keys that are compared with stored queries; None of a matrix that tokens are multiplied by."""
        if free != contracted_by(node)[0] or min(len(self.flow.shape(v)) for v in contracted_by(node)) < 3:
            return None
        return NotUnderstood(LEARNED_QUERY)

    def _refuse_scores(self, projection: Node) -> None:
        """Raises SurelyAttention if what is projected are scores or pairs of tokens, not tokens."""
        if self._projects_scores(projection):
            raise SurelyAttention(TALKING_HEADS)
        if self._projects_pairs(projection):
            raise SurelyAttention(_ADDITIVE)

    def _projects_pairs(self, node: Node) -> bool:
        """Whether what a projection reads is a function of sums of every query with every key."""
        operands = self.flow.projection_operands(node)
        return operands is not None and self._is_of_pairs(node.inputs[operands[0]])

    def _is_of_pairs(self, value: Value) -> bool:
        while (above := self.flow.producer(value)) is not None and self.flow.data_dependent(value):
            if _pairs(self.flow, above):
                return True
            deep = [v for v in above.inputs if v and self.flow.data_dependent(v)]
            if len(deep) != 1 or self.flow.projection_operands(above) is not None:
                return False
            value = deep[0]
        return False

    def _projects_scores(self, node: Node) -> bool:
        """Whether what a projection reads are scores: two operands contracted, then scaled, masked or laid out."""
        operands = self.flow.projection_operands(node)
        value = node.inputs[operands[0]] if operands is not None else ""
        while (above := self.flow.producer(value)) is not None and self.flow.data_dependent(value):
            if above.op in CONTRACTIONS:
                return all(self._holds_tokens(v) for v in above.inputs[:2])
            if above.op not in LAYOUT | PASS_THROUGH | {"Add", "Sub", "Mul", "Div", "MaskedFill"}:
                return False
            deep = [v for v in above.inputs if v and self.flow.data_dependent(v)]
            if len(deep) != 1:
                return False
            value = deep[0]
        return False

    def _holds_tokens(self, value: Value) -> bool:
        """Whether data reaches an operand, or it is projected from learned tokens (as of a first class attention)."""
        if self.flow.data_dependent(value):
            return True
        if first_contraction(self.flow, value) is None:
            return False
        try:
            return len(self.flow.shape(value)) > 2
        except KeyError:  # neither recorded nor the same for all inputs: it is laid out for each sequence
            return True

    def _free_operand(self, node: Node) -> Value | None:
        """The one of a contraction's operands that no fed data reaches, if the other is made of hidden states."""
        if not contracts(node) or node.op == "QLinearMatMul" or len(node.inputs) < 2:
            return None
        free = [v for v in contracted_by(node) if not self.flow.is_fed(v)]
        return free[0] if len(free) == 1 else None

    def _is_contraction(self, node: Node) -> bool:
        if node.op == "Baddbmm":
            return True
        if node.op not in CONTRACTIONS:
            return False
        if node.op == "QLinearMatMul":
            raise NotUnderstood(INTEGER_SCORES)
        for operand in node.inputs[:2]:
            require_projected(self.flow, operand)
        return len(node.inputs) >= 2 and all(self.flow.data_dependent(v) for v in node.inputs[:2])

    def _step(self, node: Node) -> Value:
        if node.op in PASS_THROUGH:
            if (quantize := quantizer_of(self.flow, node)) is not None:
                self.roundings.append(Rounding(quantize, self.scale, len(self.modifiers)))
            return node.inputs[0]
        if node.op == "Reshape" and keeps_last_two(self.flow, node):
            return node.inputs[0]
        if len(relaid := relaid_by(self.flow, node)) > 1:
            self.nodes += [n.index for n in relaid[1:]]
            return relaid[-1].inputs[0]
        if node.op == "Transpose" and swaps_last_two(self.flow, node):
            self.turned = not self.turned
            return node.inputs[0]
        if flattens_rows(self.flow, node) and not self.modifiers:
            return node.inputs[0]
        if node.op in {"Add", "Sub", "Mul", "Div"}:
            return self._arithmetic(node)
        if node.op in {"Where", "MaskedFill"}:
            return self._masked(node)
        if node.op == "Tanh":  # c * tanh(s): c is the scale met so far, and s is in units of c
            self.modifiers.append(Modifier("softcap", number=self.scale))
            return node.inputs[0]
        if node.op in {"Max", "Clip"}:
            return self._clamped(node)
        if node.op == "Concat":
            return self._sinks(node)
        if node.op == "Neg":
            self.scale = -self.scale
            return node.inputs[0]
        if node.op == "ReduceSum" and (above := self.flow.producer(node.inputs[0])) and _pairs(self.flow, above, "Mul"):
            raise SurelyAttention(
                "its scores are products of elements that are summed by hand; written as a matrix product (q @ k.mT), "
                "which is the same, they are read"
            )
        if node.op == "ReduceSum" and self._is_of_pairs(node.inputs[0]):
            raise SurelyAttention(_ADDITIVE)
        if (projection := self._relayed_projection(node)) is not None:
            self._refuse_scores(projection)
            raise Unrelated(
                "it normalises a learned projection (a router, a classifier, weights for pooling or the kernel of a "
                "convolution)"
            )
        if node.op in {"Reshape", "Transpose"}:
            raise NotUnderstood(
                "scores are laid out otherwise between the contraction and the softmax (as where positions along rows "
                "and along columns of an image are scored apart, or queries meet the keys around them in sliding "
                "chunks); leave this attention as it is (layers= selects others)"
            )
        if node.op == "ScatterND" and not self._written_over(node):
            raise NotUnderstood(
                "scores are written into a band (as of sliding chunks, where a query meets the keys around it only); "
                "write them as one matrix of all queries and keys with a mask, which is the same"
            )
        if node.op in {"ScatterND", "SliceScatter", "SelectScatter", "aten.copy_"}:
            raise NotUnderstood(
                "part of its scores is written over in place (a bias for some tokens only, say); where the bias "
                "depends on positions alone, add one for all scores, zero elsewhere, which is the same and read; else "
                "leave this attention as it is (layers= selects others)"
            )
        raise NotUnderstood(f"operator {node.op} between score and softmax is not understood")

    def _written_over(self, node: Node | None) -> bool:
        """Whether what is written in place goes into scores, not into an empty band."""
        value = ""
        while node is not None and node.op == "ScatterND":
            value, node = node.inputs[0], self.flow.producer(node.inputs[0])
        return self.flow.data_dependent(value)

    def _relayed_projection(self, node: Node) -> Node | None:
        """The projection from which nothing but layout separates this layout operator."""
        while node.op in LAYOUT | PASS_THROUGH:
            value = node.inputs[0]
            found = projection_at(self.flow, value)
            if found is not None:
                return found[0]
            above = self.flow.producer(value)
            if above is None:
                return None
            node = above
        return None

    def _arithmetic(self, node: Node) -> Value:
        if (shifted := self._row_shift(node)) is not None:
            return shifted
        score, other = self._scored(node) if self._sums_hidden(node) else _split_operands(self.flow, node)
        number = self.flow.value(other)
        if node.op == "Mul" and number.size > 1 and self._zeroes_hidden(score, number):
            return score
        if node.op in {"Mul", "Div"}:
            if node.op == "Div" and node.inputs[0] != score:
                raise NotUnderstood("scores are a divisor")
            if self._is_temperature(node, other):
                self.modifiers.append(Modifier("temperature", other, 1.0 if node.op == "Mul" else -1.0))
                return score
            if number.size != 1 or self.flow.is_fed(other):
                raise NotUnderstood(
                    "scores are multiplied by a tensor that is no constant for each head (as a mask for heads that the "
                    "program is fed is)"
                )
            self.scale *= float(number.reshape(())) if node.op == "Mul" else 1.0 / float(number.reshape(()))
            return score
        if node.op == "Sub" and node.inputs[0] != score:
            raise NotUnderstood("scores are subtracted from a tensor")
        self.modifiers.append(Modifier("bias", other, -self.scale if node.op == "Sub" else self.scale))
        return score

    def _sums_hidden(self, node: Node) -> bool:
        """Whether two values are summed that hidden states reach, neither of them a projection of the other."""
        a, b = node.inputs[:2]
        deep = node.op in {"Add", "Sub"} and all(self.flow.data_dependent(v) for v in (a, b))
        return deep and not any(_projects(self.flow, x, y) for x, y in ((a, b), (b, a)))

    def _scored(self, node: Node) -> tuple[Value, Value]:
        """(scores, bias) of such a sum: scores are the one term above which queries and keys are multiplied."""
        a, b = node.inputs[:2]
        found = [pair for pair in ((a, b), (b, a)) if self._leads_to_product(pair[0])]
        if len(found) != 1 or (node.op == "Sub" and found[0][0] != a) or is_chosen(self.flow, found[0][1]):
            raise NotUnderstood(content_bias(self.flow, a, b))
        return found[0]

    def _leads_to_product(self, value: Value) -> bool:
        place = (value, self.turned)
        if place not in self.tried:
            self.tried[place] = False
            trial = ScoreWalk(self.flow, self.turned, tried=self.tried, depth=self.depth + 1)
            with contextlib.suppress(NotUnderstood, Unrelated, LookupError):
                self.tried[place] = self.depth < MOST_SUMS and bool(trial.run(value))
        return self.tried[place]

    def _is_temperature(self, node: Node, other: Value) -> bool:
        """Whether the scores, [B, H, S, T], are multiplied by one stored number for each head."""
        scores, shape = self.flow.shape(node.outputs[0]), self.flow.shape(other)
        by_head = len(scores) == 4 and shape[-3:] == (scores[1], 1, 1) and shape[:-3] in ((), (1,))
        finite = by_head and not self.flow.is_fed(other) and bool((np.abs(self.flow.value(other)) > 0).all())
        return finite and bool(np.isfinite(self.flow.value(other)).all())

    def _zeroes_hidden(self, score: Value, factor: Array) -> bool:
        """Whether scores are multiplied by 1, and by 0 just where what follows hides them anyway."""
        shape = self.flow.shape(score)
        if len(shape) != 4 or not np.isin(factor, (0, 1)).all() or any(m.kind == "softcap" for m in self.modifiers):
            return False
        masks = tuple(m for m in (*reversed(self.modifiers), *self.behind) if m.kind != "sinks")
        hidden = total_bias(self.flow, masks, shape) <= -HIDDEN
        return bool((np.broadcast_to(factor, shape) == 1)[~hidden].all())

    def _row_shift(self, node: Node) -> Value | None:
        """A number per row, whatever it is computed from (often the row's maximum): softmax does not see it."""
        if node.op not in {"Add", "Sub"} or any(m.kind == "softcap" for m in self.modifiers):
            return None
        if (shifted := self._even_shift(node)) is not None:
            return shifted
        a, b = node.inputs[0], self._before_spreading(node.inputs[1])
        shape, shift = self.flow.shape(a), self.flow.shape(b)
        by_row = not self.turned and shift[-1:] == (1,) and shape[-1] > 1 and len(shift) == len(shape)
        if not self.flow.data_dependent(b) or (shift and not by_row):
            return None
        self.shifted = True
        return a

    def _before_spreading(self, value: Value) -> Value:
        """What is repeated along rows, where that is written out."""
        node = self.flow.producer(value)
        while node is not None and node.op in {"Expand", "Identity"}:
            value = node.inputs[0]
            node = self.flow.producer(value)
        return value

    def _even_shift(self, node: Node) -> Value | None:
        """The scores that one and the same stored number is added to or taken from, whatever their place."""
        a, b = node.inputs[:2]
        for score, other in ((a, b), (b, a)) if node.op == "Add" else ((a, b),):
            number = self.flow.value(other) if self.flow.is_constant(other) else None
            if number is not None and number.size == 1 and np.isfinite(number).all():
                self.shifted |= bool((number != 0).any())
                return score
        return None

    def _sinks(self, node: Node) -> Value:
        """Columns appended to the scores just before the softmax."""
        score, *rest = node.inputs
        widths = [self.flow.shape(v)[-1] for v in node.inputs]
        appended = sum(widths) == self.flow.shape(node.outputs[0])[-1]
        if len(rest) != 1 or self.flow.data_dependent(rest[0]) or not appended or self.modifiers or self.scale != 1.0:
            raise NotUnderstood(self._joined(node))
        self.modifiers.append(Modifier("sinks", rest[0]))
        return score

    def _joined(self, node: Node) -> str:
        """Why columns that are joined to the scores are no sinks."""
        if all(self.flow.data_dependent(v) for v in node.inputs):
            return (
                "its scores are joined from several products (with global keys and with keys nearby, or with blocks of "
                "keys); joined keys in one product, with a mask, are the same and are read"
            )
        return "columns are joined to the scores, but not as attention sinks are"

    def _clamped(self, node: Node) -> Value:
        """A floor so low that only masked scores reach it, and a ceiling as high, change nothing."""
        score = node.inputs[0]
        bounds = (*node.inputs[1:], "", "")[:2]
        if node.op == "Max":
            score, floor = _split_operands(self.flow, node)
            bounds = (floor, "")
        if any(v and self.flow.is_fed(v) for v in bounds):
            raise NotUnderstood("scores are clamped by a tensor")
        low, high = (self._number(node, side, v) for side, v in zip(("min", "max"), bounds, strict=True))
        if low > -HIDDEN or high < HIDDEN:
            raise NotUnderstood(
                f"scores are clamped between {low:g} and {high:g}, which no attention that would be written anew does; "
                "leave this one as it is (layers= selects others)"
            )
        return score

    def _number(self, node: Node, side: str, bound: Value) -> float:
        """A bound of a clamp, be it an input or an attribute; the largest of several floors, the least of ceilings."""
        pick, none = (np.max, -np.inf) if side == "min" else (np.min, np.inf)
        return float(pick(self.flow.value(bound))) if bound else float(node.attrs.get(side, none))

    def _masked(self, node: Node) -> Value:
        if node.op == "MaskedFill":
            score, condition, fill = node.inputs[0], node.inputs[1], node.inputs[2]
            keeps = False
        else:
            condition, yes, no = node.inputs
            keeps = self.flow.data_dependent(yes)
            score, fill = (yes, no) if keeps else (no, yes)
            if self.flow.data_dependent(yes) and self.flow.data_dependent(no):
                raise NotUnderstood("two scores are selected by a mask")
        if self.flow.data_dependent(condition):
            raise NotUnderstood(
                CHOSEN
                if is_chosen(self.flow, condition)
                else "the mask is computed from hidden states; leave this attention as it is (layers= selects others)"
            )
        filled = self.flow.value(fill)
        if filled.size != 1:
            raise NotUnderstood("masked scores are filled with a tensor instead of one number")
        self.modifiers.append(
            Modifier("mask" if keeps else "unmask", condition, float(filled.reshape(())) * self.scale)
        )
        return score


def _pairs(flow: Flow, node: Node, *ops: str) -> bool:
    """Whether every token is combined with every other: two operands of hidden states, each repeated where the other
    is not."""
    if node.op not in (ops or ("Add", "Sub", "Mul")) or not all(flow.data_dependent(v) for v in node.inputs[:2]):
        return False
    try:
        a, b = (flow.shape(v) for v in node.inputs[:2])
    except KeyError:  # above a projection values need not be recorded: told from what spreads them
        return all(p is not None and p.op == "Unsqueeze" for p in map(flow.producer, node.inputs[:2]))
    if len(a) != len(b):
        return False
    return any(m > n for m, n in zip(a, b, strict=True)) and any(m < n for m, n in zip(a, b, strict=True))


def _projects(flow: Flow, value: Value, scores: Value) -> bool:
    """Whether `value` is a projection of `scores`."""
    found = projection_at(flow, value)
    operands = flow.projection_operands(found[0]) if found is not None else None
    return found is not None and operands is not None and found[0].inputs[operands[0]] == scores


def _split_operands(flow: Flow, node: Node) -> tuple[Value, Value]:
    """(score, other); refuses a second operand that depends on hidden states."""
    a, b = node.inputs[:2]
    deep = flow.data_dependent(a), flow.data_dependent(b)
    if all(deep) and any(_projects(flow, x, y) for x, y in ((a, b), (b, a))):
        raise SurelyAttention(TALKING_HEADS)
    if all(deep) and node.op in {"Mul", "Div"}:
        raise NotUnderstood("scores are multiplied by something computed from hidden states (a learned temperature)")
    if all(deep):
        raise NotUnderstood(content_bias(flow, a, b))
    return (a, b) if deep[0] else (b, a)
