"""From an anchor (a softmax, or a fused attention operator) to its contractions and everything between.

Nothing here knows where operands come from; that is `operands`. A step that is not understood raises
`NotUnderstood` for a real attention, `Unrelated` for a softmax that mixes no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from passes.dataflow import CONTRACTIONS, LAYOUT, PRODUCTS, Array, Flow, Node, Value
from passes.match.roundings import Rounding, quantizer_of
from passes.projections import einsum_terms
from passes.provenance import PASS_THROUGH, cache_root, projection_at
from passes.site import Modifier

FUSED_ANCHORS = frozenset({"Attention", "GroupedQueryAttention"})
FOREIGN_ANCHORS = frozenset({"MultiHeadAttention"})
HIDDEN = 1e4
"""Scores so far down are masked; no score that counts is so far up either."""

TALKING_HEADS = "its scores are mixed between heads by learned weights (talking heads)"
TURNED = "something is added to its scores where they are [keys, queries], or masks them there"

INTEGER_SCORES = (
    "its scores are computed in integers (QLinearMatMul); quantise in the QDQ format instead, "
    "or rewrite the float model and quantise it afterwards"
)


class NotUnderstood(Exception):
    """An attention with a step that matching does not understand; the message is the refusal's reason."""


class SurelyAttention(NotUnderstood):
    """Scores of pairs of tokens were seen: this is an attention, wherever its weights lead."""


class Unrelated(Exception):
    """A softmax that is no attention; the message says what it is instead."""


class FreeQuery(NotUnderstood):
    """A query that no fed data reaches.

    Attributes:
        query: the operand; a projected parameter, or what `otherwise` says.
    """

    def __init__(self, query: Value, otherwise: Exception) -> None:
        super().__init__(str(otherwise))
        self.query, self.otherwise = query, otherwise


@dataclass(frozen=True)
class OperandView:
    """An operand where the anchor reads it.

    Attributes:
        value: its name.
        token_axis, feature_axis: which axes are tokens and features.
        heads: set if the feature axis holds this many heads side by side (fused operators with 3-D inputs).
        fold: how many heads the token axis holds one after the other, for each one on the axis before it.
        apart: whether heads lie along the last two leading axes instead of one: groups, and the heads of a group.
    """

    value: Value
    token_axis: int
    feature_axis: int
    heads: int | None = None
    fold: int = 1
    apart: bool = False

    def arranged(self, array: Array) -> Array:
        """[lead..., tokens, features] of the recorded value, heads on one axis: those folded or apart are joined."""
        array = np.moveaxis(array, (self.token_axis, self.feature_axis), (-2, -1))
        if self.apart:
            *lead, groups, heads, rows, features = array.shape
            return array.reshape(*lead, groups * heads, rows, features)
        if self.fold == 1:
            return array
        *lead, heads, rows, features = array.shape
        return array.reshape(*lead, heads * self.fold, rows // self.fold, features)


@dataclass(frozen=True)
class ScorePath:
    """One anchor, from operands to output.

    Attributes:
        q, k, v: the operands.
        scale: factor on q·k; modifiers follow in order.
        scores: softmax input, None if fused.
        output: the attention output per head, with its axes in `output_view`.
        nodes: indices of the contractions, modifiers and softmax.
    """

    anchor: Node
    q: OperandView
    k: OperandView
    v: OperandView
    scale: float
    modifiers: tuple[Modifier, ...]
    scores: Value | None
    output_view: OperandView
    nodes: tuple[int, ...]
    masked_rows_are_zero: bool = False
    turned: bool = False
    """Whether the softmax is given [keys, queries] and runs over the first of them."""
    shifted: bool = False
    """Whether a number per row is subtracted before the softmax: scores are then known up to it."""
    roundings: tuple[Rounding, ...] = ()
    """Fake quantisation between the contraction and the softmax, in order; `after` counts modifiers."""
    ranks: tuple[int, ...] = ()
    """How many axes the scores have where each modifier meets them; empty for fused anchors."""


def anchors(flow: Flow) -> list[Node]:
    """Every node that could be the heart of an attention, in execution order."""
    hearts = {"Softmax", "QLinearSoftmax"} | FUSED_ANCHORS | FOREIGN_ANCHORS
    return [n for n in flow.nodes if n.op in hearts]


def score_path(flow: Flow, anchor: Node) -> ScorePath:
    """Read one anchor. Raises NotUnderstood or Unrelated."""
    if (reason := anchor.attrs.get("unread")) is not None:
        raise NotUnderstood(str(reason))
    if anchor.op == "QLinearSoftmax":
        raise _integer_scores(flow, anchor)
    if anchor.domain == "com.microsoft" or anchor.op in FOREIGN_ANCHORS:
        raise NotUnderstood(f"the fused operator {anchor.domain}::{anchor.op} is not read yet")
    if anchor.op in FUSED_ANCHORS:
        return _fused(flow, anchor)
    return _written_out(flow, anchor)


CONTENT_BIAS = (
    "the score bias is computed from hidden states (content-dependent positions); only biases from masks and positions "
    "can be kept"
)
ORDER_OF_OTHERS = (
    "its operator is causal over {keys} keys for {queries} queries, counted from the first of each, so it compares "
    "positions of different sequences (as where cross-attention is called without a mask); pass example_inputs with "
    "the mask that this model is used with"
)

_LEARNED = (
    "all that it attends to is learned (object queries that have not met the input yet), so its result is the same "
    "for every input and can be stored instead of computed"
)


def _fused(flow: Flow, anchor: Node) -> ScorePath:
    q, k, v = anchor.inputs[:3]
    mask = anchor.inputs[3] if len(anchor.inputs) > 3 else ""
    if len(anchor.inputs) > 4 and any(anchor.inputs[4:]):
        raise NotUnderstood("the attention operator keeps its own key/value cache (past_key, past_value inputs)")
    if not any(flow.is_fed(operand) for operand in (q, k, v)):
        raise NotUnderstood(_LEARNED)
    for operand in (k, v):
        _require_projected(flow, operand)
    deep = [flow.data_dependent(x) for x in (q, k, v)]
    if deep == [False, True, True]:
        raise FreeQuery(q, NotUnderstood("its queries come neither from the input nor from a projected parameter"))
    if not all(deep):
        named = [name for name, projected in zip(("queries", "keys", "values"), deep, strict=True) if not projected]
        raise NotUnderstood(f"its {' and '.join(named)} are no learned projection of what the program is given")
    modifiers: list[Modifier] = []
    if anchor.attrs.get("is_causal"):
        queries, keys = (flow.shape(v)[-2] for v in (q, k))
        if queries != keys and anchor.op == "Attention":
            raise NotUnderstood(ORDER_OF_OTHERS.format(queries=queries, keys=keys))
        modifiers.append(Modifier("causal"))
    if softcap := float(anchor.attrs.get("softcap", 0.0)):
        modifiers.append(Modifier("softcap", number=softcap))
    if mask:
        if flow.data_dependent(mask):
            raise NotUnderstood(CONTENT_BIAS)
        modifiers.append(_mask_or_bias(flow, mask))
    heads, kv_heads = anchor.attrs.get("q_num_heads"), anchor.attrs.get("kv_num_heads")
    flat = len(flow.shape(q)) == 3 and bool(heads)
    default = (flow.shape(q)[-1] // (int(heads) if flat and heads else 1)) ** -0.5
    scale = float(anchor.attrs.get("scale") or default)

    def view(value: Value, count: int | None) -> OperandView:
        return OperandView(value, -2, -1, int(count) if flat and count else None)

    return ScorePath(
        anchor, view(q, heads), view(k, kv_heads), view(v, kv_heads), scale, tuple(modifiers), None,
        view(anchor.outputs[0], heads), (anchor.index,), masked_rows_are_zero=True,
    )  # fmt: skip


def _integer_scores(flow: Flow, softmax: Node) -> NotUnderstood | Unrelated:
    """What a softmax of integers is: an attention that is not read, or a projection's."""
    node: Node | None = softmax
    while node is not None:
        if flow.projection_operands(node) is not None:
            return Unrelated("it normalises a learned projection (a router, a classifier or weights for pooling)")
        if node.op in CONTRACTIONS:
            break
        node = flow.producer(node.inputs[0])
    return NotUnderstood(INTEGER_SCORES)


def _mask_or_bias(flow: Flow, value: Value) -> Modifier:
    if flow.value(value).dtype == np.bool_:
        return Modifier("mask", value, -np.inf)
    return Modifier("bias", value, 1.0)


def _written_out(flow: Flow, softmax: Node) -> ScorePath:
    if not any(flow.is_read(v) for v in softmax.outputs if v):
        raise Unrelated("nothing reads what it gives")
    rank = len(flow.shape(softmax.inputs[0]))
    axis = int(softmax.attrs.get("axis", -1)) % max(rank, 1)
    columns = rank >= 2 and axis == rank - 2
    mixes = _context(flow, softmax.outputs[0], turned=columns)
    try:
        back = _Backward(flow, turned=columns).run(softmax.inputs[0])
    except Unrelated as error:
        reason = _learned_alone(flow, softmax) or _samples(flow, softmax)
        if reason is not None:
            raise NotUnderstood(reason) from error
        raise
    except NotUnderstood as error:
        if isinstance(error, FreeQuery) and not isinstance(mixes, _Mix):
            raise error.otherwise from error
        if isinstance(error, SurelyAttention):
            raise
        if not isinstance(mixes, _Mix) and not _reaches_contraction(flow, softmax):
            raise Unrelated(f"its result weighs no value tokens ({mixes or 'it reaches no contraction'})") from error
        raise
    if axis != rank - 1 and not columns:
        raise NotUnderstood(f"softmax runs over axis {axis} of the scores, not over one of the last two")
    if mixes is None or isinstance(mixes, str):
        raise NotUnderstood(f"the attention weights do not lead to one contraction with values: {mixes or 'no reader'}")
    q, k, added = _qk_operands(flow, back.contraction)
    if back.turned:
        if added is not None:
            raise NotUnderstood(TURNED)
        q, k = k, q
    alpha, beta = (float(back.contraction.attrs.get(n, 1.0)) for n in ("alpha", "beta"))
    first = () if added is None else (Modifier("bias", added, back.scale * beta),)
    contracted = flow.shape(back.contraction.outputs[0])
    met = (_by_window(m, contracted, shape) for m, shape in zip(back.modifiers, back.shapes, strict=True))
    modifiers = (*first, *reversed([*met]))
    ranks = (*(3 for _ in first), *reversed(back.ranks))
    roundings = tuple(replace(r, after=len(modifiers) - r.after) for r in reversed(back.roundings))
    return ScorePath(
        softmax, q, k, mixes.v, back.scale * alpha, modifiers, softmax.inputs[0], mixes.output,
        (back.contraction.index, *back.nodes, softmax.index, *mixes.nodes), mixes.zero_nan,
        columns, back.shifted, roundings, ranks,
    )  # fmt: skip


def _learned_alone(flow: Flow, softmax: Node) -> str | None:
    """What to say of an attention among parameters; None if there is none: no product of two projections is scored."""
    if flow.data_dependent(softmax.inputs[0]):
        return None
    scores = _first_contraction(flow, softmax.inputs[0])
    projected = scores is not None and all(_first_contraction(flow, v) is not None for v in scores.inputs[:2])
    if not projected or flow.is_fed(scores.outputs[0] if scores else "") or not _reaches_contraction(flow, softmax):
        return None
    return _LEARNED


def _first_contraction(flow: Flow, value: Value) -> Node | None:
    """The next contraction above a value, through whatever lies between."""
    return next((n for n in reversed(flow.ancestors(value, stop=_contracts)) if _contracts(n)), None)


def _contracts(node: Node) -> bool:
    return node.op in PRODUCTS


def _contracted(node: Node) -> tuple[Value, ...]:
    """The two operands of a contraction."""
    return node.inputs[1:3] if node.op == "Baddbmm" else node.inputs[:2]


def _samples(flow: Flow, softmax: Node) -> str | None:
    """What to say of weights for values that are sampled at computed places (deformable attention); None otherwise."""
    value = softmax.outputs[0]
    while len(readers := flow.live_readers(value)) == 1 and readers[0].op in LAYOUT | PASS_THROUGH:
        value = readers[0].outputs[0]
    for reader in readers:
        above = flow.ancestors(*(v for v in reader.inputs if v and v != value), stop=_contracts)
        if reader.op in CONTRACTIONS | {"Mul"} and any("gridsample" in n.op.lower().replace("_", "") for n in above):
            return (
                "it weighs values that are sampled at computed places (deformable attention), by a projection of the "
                "query alone: there are no keys whose heads could be shared"
            )
    return None


def _by_window(modifier: Modifier, contracted: tuple[int, ...], met: tuple[int, ...]) -> Modifier:
    """A mask that meets scores [B * W, H, S, T] where they are laid out as [B, W, H, S, T]."""
    apart = len(contracted) == 4 and len(met) == 5 and met[2:] == contracted[1:] and modifier.value is not None
    return replace(modifier, windows=met[1]) if apart else modifier


@dataclass
class _Backward:
    """Walks from softmax up to the contraction of two data operands.

    `scale` is the product of the factors met so far: it multiplies whatever is found further up.
    """

    flow: Flow
    turned: bool = False
    """Whether scores are [keys, queries] where the walk is."""
    scale: float = 1.0
    modifiers: list[Modifier] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    shifted: bool = False
    roundings: list[Rounding] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    contraction: Node = field(init=False)

    def run(self, value: Value) -> _Backward:
        while True:
            node = self.flow.producer(value)
            if node is None or not self.flow.data_dependent(value):
                raise Unrelated("its input does not depend on hidden states")
            router = Unrelated("it normalises a learned projection (a router, a classifier or weights for pooling)")
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
        if free != _contracted(node)[0] or min(len(self.flow.shape(v)) for v in _contracted(node)) < 3:
            return None
        return NotUnderstood(
            "its queries are learned numbers that no projection makes, so it has no query heads to read; project them "
            "(a linear layer behind the parameter)"
        )

    def _refuse_scores(self, projection: Node) -> None:
        """Raises SurelyAttention if what is projected are scores or pairs of tokens, not tokens."""
        if self._projects_scores(projection):
            raise SurelyAttention(TALKING_HEADS)
        if self._projects_pairs(projection):
            raise SurelyAttention(
                "its scores are a learned function of each query and key together (additive attention), not their "
                "product"
            )

    def _projects_pairs(self, node: Node) -> bool:
        """Whether what a projection reads is a function of sums of every query with every key."""
        operands = self.flow.projection_operands(node)
        value = node.inputs[operands[0]] if operands is not None else ""
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
                return all(self.flow.data_dependent(v) for v in above.inputs[:2])
            if above.op not in LAYOUT | PASS_THROUGH | {"Add", "Sub", "Mul", "Div", "MaskedFill"}:
                return False
            deep = [v for v in above.inputs if v and self.flow.data_dependent(v)]
            if len(deep) != 1:
                return False
            value = deep[0]
        return False

    def _free_operand(self, node: Node) -> Value | None:
        """The one of a contraction's operands that no fed data reaches, if the other is made of hidden states."""
        if not _contracts(node) or node.op == "QLinearMatMul" or len(node.inputs) < 2:
            return None
        free = [v for v in _contracted(node) if not self.flow.is_fed(v)]
        return free[0] if len(free) == 1 else None

    def _is_contraction(self, node: Node) -> bool:
        if node.op == "Baddbmm":
            return True
        if node.op not in CONTRACTIONS:
            return False
        if node.op == "QLinearMatMul":
            raise NotUnderstood(INTEGER_SCORES)
        for operand in node.inputs[:2]:
            _require_projected(self.flow, operand)
        return len(node.inputs) >= 2 and all(self.flow.data_dependent(v) for v in node.inputs[:2])

    def _step(self, node: Node) -> Value:
        if node.op in PASS_THROUGH:
            if (quantize := quantizer_of(self.flow, node)) is not None:
                self.roundings.append(Rounding(quantize, self.scale, len(self.modifiers)))
            return node.inputs[0]
        if node.op == "Reshape" and _keeps_last_two(self.flow, node):
            return node.inputs[0]
        if len(relaid := _relaid(self.flow, node)) > 1:
            self.nodes += [n.index for n in relaid[1:]]
            return relaid[-1].inputs[0]
        if node.op == "Transpose" and _swaps_last_two(self.flow, node):
            self.turned = not self.turned
            return node.inputs[0]
        if _flattens_rows(self.flow, node) and not self.modifiers:
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
        if node.op == "ScatterND":
            raise NotUnderstood(
                "scores are written into a band (as of sliding chunks, where a query meets the keys around it only); "
                "write them as one matrix of all queries and keys with a mask, which is the same"
            )
        raise NotUnderstood(f"operator {node.op} between score and softmax is not understood")

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
        score, other = _split_operands(self.flow, node)
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
        masks = tuple(m for m in reversed(self.modifiers) if m.kind != "sinks")
        hidden = total_bias(self.flow, masks, shape) <= -HIDDEN
        return bool((np.broadcast_to(factor, shape) == 1)[~hidden].all())

    def _row_shift(self, node: Node) -> Value | None:
        """A number per row, whatever it is computed from (often the row's maximum): softmax does not see it."""
        if node.op not in {"Add", "Sub"} or any(m.kind == "softcap" for m in self.modifiers):
            return None
        if (shifted := self._even_shift(node)) is not None:
            return shifted
        a, b = node.inputs[0], self._before_spreading(node.inputs[1])
        shape = self.flow.shape(a)
        deep = self.flow.data_dependent(b) and self.flow.shape(b)[-1:] == (1,) and shape[-1] > 1
        if not deep or len(self.flow.shape(b)) != len(shape):
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
            raise NotUnderstood(f"scores are clamped between {low:g} and {high:g}")
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
            raise NotUnderstood("the mask is computed from hidden states")
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
        raise NotUnderstood(CONTENT_BIAS)
    return (a, b) if deep[0] else (b, a)


def _keeps_last_two(flow: Flow, node: Node) -> bool:
    before, after = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    return len(before) >= 2 and before[-2:] == after[-2:]


def _relaid(flow: Flow, node: Node, down: bool = False) -> tuple[Node, ...]:
    """Nodes, from this one up (or down), that only lay scores out anew, and keep the last two axes taken together.

    TensorFlow's exporter writes contractions with an axis of size 1 at the end, so that none of them keeps these alone.
    """
    found: list[Node] = []
    here: Node | None = node
    while here is not None and here.op in {"Reshape", "Squeeze", "Unsqueeze"} and len(found) < 4:
        found.append(here)
        ends = (found[0].inputs[0], here.outputs[0]) if down else (here.inputs[0], node.outputs[0])
        before, after = (flow.shape(v) for v in ends)
        if len(before) >= 2 and before[-2:] == after[-2:]:
            return tuple(found)
        readers = flow.live_readers(here.outputs[0]) if down else []
        here = (readers[0] if len(readers) == 1 else None) if down else flow.producer(here.inputs[0])
    return ()


def _flattens_rows(flow: Flow, node: Node) -> bool:
    """Whether rows of scores are brought onto one axis, as a softmax over two axes wants them, or back."""
    if node.op not in {"Reshape", "Flatten"}:
        return False
    before, after = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    return before[-1:] == after[-1:] and 2 in (len(before), len(after))


def _qk_operands(flow: Flow, node: Node) -> tuple[OperandView, OperandView, Value | None]:
    if node.op == "Baddbmm":
        bias, a, b = node.inputs[:3]
        if node.attrs.get("beta", 1.0) == 0:  # whatever stands there, uninitialised memory mostly, is not read
            return OperandView(a, -2, -1), OperandView(b, -1, -2), None
        if flow.data_dependent(bias):
            raise NotUnderstood(CONTENT_BIAS)
        return OperandView(a, -2, -1), OperandView(b, -1, -2), bias
    a, b = node.inputs[:2]
    if node.op in {"MatMul", "FusedMatMul"} and not _moves_batch(node):
        turned_a, turned_b = bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))
        view_a = OperandView(a, -1, -2) if turned_a else OperandView(a, -2, -1)
        return view_a, OperandView(b, -2, -1) if turned_b else OperandView(b, -1, -2), None
    if node.op == "Einsum":
        first, second, result = _terms(flow, node)
        shared = [c for c in first if c in second and c not in result]
        for (x, x_term), (y, y_term) in (((a, first), (b, second)), ((b, second), (a, first))):
            if len(shared) == 1 and _asks(x_term, y_term, result):
                query = OperandView(x, x_term.index(result[-2]), x_term.index(shared[0]))
                return query, OperandView(y, y_term.index(result[-1]), y_term.index(shared[0])), None
        raise NotUnderstood(
            f"scores come from an Einsum ({first},{second}->{result}) whose result does not end with queries and keys; "
            "write it so that heads come before them (bhst), which is the same numbers"
        )
    raise NotUnderstood(f"scores come from a {node.op} whose axes are not understood")


def _asks(query: str, key: str, result: str) -> bool:
    """Whether an Einsum's result ends in the query's tokens and the key's; the query may have one more axis, groups."""
    own = [c for c in query if c not in key and c in result]
    tokens = [c for c in key if c not in query and c in result]
    return tokens == [result[-1]] and result[-2] in own and len(own) <= 2


def _require_projected(flow: Flow, value: Value) -> None:
    """A decoder step reads what was projected once, from the encoder's output, out of its cache inputs."""
    if flow.data_dependent(value) or (fed := cache_root(flow, value)) is None:
        return
    if len(flow.shape(fed)) == 3 and not any(n.op == "Concat" for n in flow.consumers(fed)):
        raise NotUnderstood(
            f"tokens are compared or mixed as they come from an input ({fed}): no projection makes keys or values of "
            "them whose heads could be shared"
        )
    raise NotUnderstood(
        f"its keys and values come straight from an input ({fed}), so this file has no projection for them; the file "
        'that fills this cache has: select only its decoder there (layers="decoder") if both are to fit together'
    )


def _moves_batch(node: Node) -> bool:
    return bool(node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0))


def _terms(flow: Flow, node: Node) -> tuple[str, str, str]:
    """As `einsum_terms`. Raises NotUnderstood."""
    try:
        return einsum_terms(flow, node)
    except ValueError as error:
        raise NotUnderstood(str(error)) from error


_EXPRESSION = 6
"""Operators one on top of the other that two masks are compared by."""


@dataclass(frozen=True)
class _Mix:
    v: OperandView
    output: OperandView
    nodes: tuple[int, ...]
    zero_nan: bool


def _context(flow: Flow, value: Value, turned: bool) -> _Mix | str | None:
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
        kept = node.op in PASS_THROUGH or (node.op == "Reshape" and _keeps_last_two(flow, node))
        kept = kept or _flattens_rows(flow, node)
        kept = kept or (node.op == "Expand" and flow.shape(node.inputs[0]) == flow.shape(node.outputs[0]))
        if kept or (node.op == "Slice" and _drops_columns(flow, node)):
            value = node.outputs[0]
        elif len(relaid := _relaid(flow, node, down=True)) > 1:
            nodes += [n.index for n in relaid[1:]]
            value = relaid[-1].outputs[0]
        elif node.op == "Transpose" and _swaps_last_two(flow, node):
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


def _reaches_contraction(flow: Flow, softmax: Node) -> bool:
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


def _swaps_last_two(flow: Flow, node: Node) -> bool:
    shape = flow.shape(node.inputs[0])
    numbers = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
    rest: list[Array | None] = [flow.value(v) if v else None for v in node.inputs[1:]]
    return len(shape) >= 2 and np.array_equal(node.evaluate([numbers, *rest])[0], numbers.swapaxes(-2, -1))


def _value_operand(
    flow: Flow, node: Node, weights: Value, turned: bool, nodes: tuple[int, ...], zero_nan: bool
) -> _Mix | str:
    """The contraction of attention weights with values; `turned`: weights are [keys, queries] there."""
    if node.op == "QLinearMatMul":
        return INTEGER_SCORES
    a, b = node.inputs[:2]
    other = b if a == weights else a
    if not flow.data_dependent(other):
        _require_projected(flow, other)
        return "they are multiplied by a constant matrix"
    plain = node.op == "MatMul" or (
        node.op == "FusedMatMul"
        and not _moves_batch(node)
        and not any(node.attrs.get(n, 0) for n in ("transA", "transB"))
        and node.attrs.get("alpha", 1.0) == 1.0
    )
    if plain and a == weights and not turned:
        return _Mix(OperandView(b, -2, -1), OperandView(node.outputs[0], -2, -1), nodes, zero_nan)
    if plain and b == weights and turned:  # features by tokens: values times weights
        return _Mix(OperandView(a, -1, -2), OperandView(node.outputs[0], -1, -2), nodes, zero_nan)
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
            return _Mix(view, out, nodes, zero_nan)
    return f"a {node.op} whose axes are not understood reads them"


def total_bias(flow: Flow, modifiers: tuple[Modifier, ...], shape: tuple[int, int, int, int]) -> Array:
    """All additive and masking modifiers as one float64 tensor of `shape` [B, H, S, T]."""
    bias = np.zeros(shape)
    for modifier in modifiers:
        bias = apply_modifier(flow, modifier, bias)
    return bias


def apply_modifier(flow: Flow, modifier: Modifier, scores: Array) -> Array:
    """One modifier on scores [B, H, S, T], float64; sinks make them wider."""
    if modifier.kind == "sinks":
        columns = _by_head(flow, modifier, scores.shape).astype(np.float64)
        wide = np.broadcast_to(columns, (*scores.shape[:-1], columns.shape[-1]))
        return np.concatenate([scores, wide], axis=-1)
    if modifier.kind == "softcap":
        assert modifier.number is not None
        return np.asarray(modifier.number * np.tanh(scores / modifier.number))
    if modifier.kind == "causal":
        rows, columns = scores.shape[-2:]
        keep = np.arange(columns)[None] <= np.arange(rows)[:, None] + (columns - rows)
        return np.where(keep, scores, -np.inf)
    assert modifier.number is not None
    operand = _by_head(flow, modifier, scores.shape)
    if modifier.kind == "temperature":
        return np.asarray(scores * operand.astype(np.float64) ** modifier.number)
    if modifier.kind == "bias":
        return np.asarray(scores + operand.astype(np.float64) * modifier.number)
    keep = operand.astype(bool) if modifier.kind == "mask" else ~operand.astype(bool)
    return np.where(keep, scores, modifier.number)


def _by_head(flow: Flow, modifier: Modifier, shape: tuple[int, ...]) -> Array:
    """A modifier's tensor, broadcastable to [B, H, S, T]."""
    assert modifier.value is not None
    array = flow.value(modifier.value)
    if modifier.windows is not None:
        return join_windows(array, modifier.windows, shape[0])
    if modifier.heads_first:
        return array.reshape(shape[1], shape[0], *array.shape[1:]).swapaxes(0, 1)
    return unfuse_heads(array, shape) if modifier.apart is None else join_heads(array, modifier.apart)


def join_heads(array: Array, apart: tuple[int, int]) -> Array:
    """What broadcasts to [B, KV, G, S, T], as what broadcasts to [B, KV * G, S, T]; `apart` is (KV, G)."""
    array = array.reshape((1,) * (5 - array.ndim) + array.shape)
    batch, *heads, rows, columns = array.shape
    if heads == [1, 1]:
        return array.reshape(batch, 1, rows, columns)
    return np.broadcast_to(array, (batch, *apart, rows, columns)).reshape(batch, -1, rows, columns)


def join_windows(array: Array, windows: int, batch: int) -> Array:
    """What broadcasts to [batch / windows, windows, H, S, T], as what broadcasts to [batch, H, S, T]."""
    array = array.reshape((1,) * (5 - array.ndim) + array.shape)
    wide = np.broadcast_to(array, (batch // windows, windows, *array.shape[2:]))
    return wide.reshape(batch, *array.shape[2:])


def unfuse_heads(array: Array, shape: tuple[int, ...]) -> Array:
    """A mask written over a fused batch·head axis, as [B, H, S, T]."""
    if array.ndim == 3 and array.shape[0] == shape[0] * shape[1] and array.shape[0] != 1:
        return array.reshape(shape[0], shape[1], *array.shape[1:])
    return array
