"""Attentions without a softmax: tokens mixed by products of hidden states, with nothing to normalise scores.

Linear attention multiplies keys by values first, retention and gated units multiply scores by values as they are. All
have two contractions of hidden states with each other, one after the other; none of them is rewritten, and none is
overlooked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from passes.dataflow import LAYOUT, PRODUCTS, Flow, Node, Value
from passes.forms import Opaque
from passes.match.choosing import only_chooses
from passes.match.mixed_axis import mixes_no_tokens
from passes.match.scores import FOREIGN_ANCHORS, FUSED_ANCHORS
from passes.operator_kinds import data_operands
from passes.projections import einsum_terms
from passes.provenance import Tracer

REASON = (
    "it weighs tokens without a softmax of scores (linear attention, retention, a gated unit or a state-space layer); "
    "what replaces attention here is made for scores that a softmax normalises"
)
UNREAD = (
    "its scores are normalised by hand in a way that is not read as a softmax (after the product with values, with a "
    "number added to the sum, or block by block); written with softmax, where that is the same, it is read"
)
_SOFTMAXES = frozenset({"Softmax", "QLinearSoftmax", "LogSoftmax"}) | FUSED_ANCHORS | FOREIGN_ANCHORS


def without_softmax(flow: Flow, elsewhere: Collection[int] = ()) -> Iterator[tuple[Node, str]]:
    """The second contraction of each such attention, one for each group of contractions that feed one another, and
    what to say of it.

    `elsewhere`: indices of softmaxes that normalise no scores (features of linear attention), and are looked through.
    """
    found = _Found(flow, frozenset(elsewhere))
    seen: set[int] = set()
    for node in flow.nodes:
        if node.index in seen or not found.of_states(node) or found.normalised(node):
            continue
        later = found.further(node)
        if not later or not found.of_tokens(node):
            continue
        seen.update(n.index for n in later)
        if not only_chooses(flow, later[-1]):
            yield later[0], UNREAD if found.exponentials(node, later[0]) else REASON


class _Found:
    """What is known of the values of one flow; each is looked at once."""

    def __init__(self, flow: Flow, elsewhere: frozenset[int]) -> None:
        self.flow, self.elsewhere = flow, elsewhere
        self.tracer = Tracer(flow)
        self._states: dict[Value, bool] = {}
        self._normalised: dict[Value, bool] = {}

    def of_states(self, node: Node) -> bool:
        """Whether a node contracts hidden states with hidden states, not with weights that a router has chosen."""
        if node.op not in PRODUCTS or self.flow.projection_operands(node) is not None:
            return False
        if not any(self.flow.is_read(v) for v in node.outputs if v):
            return False
        operands = _factors(node)
        return len(operands) == 2 and all(self._carries(v) for v in operands)

    def of_tokens(self, node: Node) -> bool:
        """Whether what a node contracts is not each token's own: no matrices of which each has one, no copies of it.

        Told by running layout operators on numbers, so it is asked last: of most products other things tell enough.
        """
        matrices = zip(_factors(node), _matrix_axes(self.flow, node), strict=True)
        return not any(self._by_token(v, axes) for v, axes in matrices) and not mixes_no_tokens(self.flow, node)

    def _by_token(self, value: Value, matrix: tuple[int, ...]) -> bool:
        """Whether each matrix of a stack (along axes `matrix`) is one token's row of a projection, laid out: that mixes
        no tokens."""
        try:
            form = self.tracer.trace(value)
            ids = form.ids[0]
            sources = self.tracer.source_of(ids)
        except (Opaque, LookupError, ValueError):
            return False
        if len(form.ids) != 1 or len(sources) != 1 or ids.ndim < 4 or not (ids > 0).all():
            return False
        if any(ids.shape[axis] == 1 for axis in matrix):
            return False
        rows = (ids - sources[0].base) // sources[0].shape[-1]
        inside = {axis % rows.ndim for axis in matrix}
        first = rows[tuple(slice(0, 1) if axis in inside else slice(None) for axis in range(rows.ndim))]
        return bool((rows == first).all())

    def _carries(self, value: Value) -> bool:
        """Whether elements of a projection's output arrive in `value`, other than by choosing among stored ones."""
        todo, met = [value], set[Value]()
        while todo:
            name = todo.pop()
            if name in met or not self.flow.data_dependent(name):
                continue
            if self._states.get(name):
                self._states[value] = True
                return True
            met.add(name)
            node = self.flow.producer(name)
            if node is None:
                continue
            if self.flow.projection_operands(node) is not None:
                self._states.update({name: True, value: True})
                return True
            read = _read(node) if node.op in LAYOUT else []
            todo += [v for v in read or node.inputs if v and self._states.get(v) is not False]
        self._states.update(dict.fromkeys(met, False))
        return False

    def normalised(self, node: Node) -> bool:
        """Whether a softmax stands between the projections and this node: it is part of an attention that has one."""
        return any(self._below_softmax(v) for v in node.inputs if v)

    def _below_softmax(self, value: Value) -> bool:
        """Values are asked in execution order, so that what lies above is mostly known."""
        if value not in self._normalised:
            todo, met, answer = [value], set[Value](), False
            while todo and not answer:
                name = todo.pop()
                if name in met or not self.flow.data_dependent(name):
                    continue
                met.add(name)
                node = self.flow.producer(name)
                if node is None or self.flow.projection_operands(node) is not None:
                    continue
                answer = self._softmax(node) or bool(self._normalised.get(name))
                todo += [v for v in node.inputs if v]
            self._normalised[value] = answer
        return self._normalised[value]

    def _softmax(self, node: Node) -> bool:
        inside = bool(node.attrs.get("softmax_inside"))  # of control flow, which is refused for that
        return inside or (node.op in _SOFTMAXES and node.index not in self.elsewhere)

    def exponentials(self, first: Node, later: Node) -> bool:
        """Whether what `first` gives is raised to a power of e before `later` reads it."""
        below = {first.index}
        for node in self.flow.ancestors(*later.inputs, stop=lambda n: n.index <= first.index):
            if any(p.index in below for v in node.inputs if v and (p := self.flow.producer(v)) is not None):
                below.add(node.index)
                if node.op == "Exp":
                    return True
        return False

    def further(self, first: Node) -> list[Node]:
        """Contractions of states that the result reaches before a projection or a softmax, in order of execution."""
        todo, met, found = list(first.outputs), {first.index}, list[Node]()
        while todo:
            value = todo.pop()
            for node in self.flow.readers(value) if value else ():
                if node.index in met or self._softmax(node) or self.flow.projection_operands(node) is not None:
                    continue
                if node.op in LAYOUT and value not in _read(node):
                    continue  # it chooses what is read, as of queries those that stand out
                met.add(node.index)
                if self.of_states(node) and self.of_tokens(node):
                    found.append(node)
                todo.extend(node.outputs)
        return sorted(found, key=lambda n: n.index)


def _matrix_axes(flow: Flow, node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of each factor along which its matrices lie; along all others both factors have one for each place."""
    last = ((-2, -1), (-2, -1))
    if node.op != "Einsum":
        return last
    try:
        one, two, result = einsum_terms(flow, node)
    except (LookupError, ValueError):
        return last
    stacked = {c for c in one if c in two and c in result}
    return tuple(i for i, c in enumerate(one) if c not in stacked), tuple(
        i for i, c in enumerate(two) if c not in stacked
    )


def _read(node: Node) -> list[Value]:
    """What a layout operator moves, not where to."""
    return [node.inputs[i] for i in data_operands(node) if i < len(node.inputs)]


def _factors(node: Node) -> Sequence[Value]:
    return node.inputs[-2:] if node.op == "Baddbmm" else node.inputs[:2]
