"""Attentions without a softmax: tokens mixed by products of hidden states, with nothing to normalise scores.

Linear attention multiplies keys by values first, retention and gated units multiply scores by values as they are. All
have two contractions of hidden states with each other, one after the other; none of them is rewritten, and none is
overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator

from passes.dataflow import CONTRACTIONS, LAYOUT, Flow, Node, Value
from passes.match.scores import FOREIGN_ANCHORS, FUSED_ANCHORS
from passes.provenance import data_operands

REASON = (
    "it weighs tokens without a softmax (linear attention, retention, a gated unit or a state-space layer); "
    "what replaces attention here is made for scores that a softmax normalises"
)
_SOFTMAXES = frozenset({"Softmax", "QLinearSoftmax", "LogSoftmax"}) | FUSED_ANCHORS | FOREIGN_ANCHORS
_COMBINING = CONTRACTIONS | {"Baddbmm"}


def without_softmax(flow: Flow) -> Iterator[Node]:
    """The second contraction of each such attention, one for each group of contractions that feed one another."""
    found = _Found(flow)
    seen: set[int] = set()
    for node in flow.nodes:
        if node.index in seen or not found.of_states(node) or found.normalised(node):
            continue
        later = found.further(node)
        if later:
            seen.update(n.index for n in later)
            yield later[0]


class _Found:
    """What is known of the values of one flow; each is looked at once."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._states: dict[Value, bool] = {}
        self._normalised: dict[Value, bool] = {}

    def of_states(self, node: Node) -> bool:
        """Whether a node contracts hidden states with hidden states, not with weights that a router has chosen."""
        if node.op not in _COMBINING or self.flow.projection_operands(node) is not None:
            return False
        operands = node.inputs[-2:] if node.op == "Baddbmm" else node.inputs[:2]
        return len(operands) == 2 and all(self._carries(v) for v in operands)

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
            read = [node.inputs[i] for i in data_operands(node) if i < len(node.inputs)] if node.op in LAYOUT else []
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
                answer = node.op in _SOFTMAXES or bool(self._normalised.get(name))
                todo += [v for v in node.inputs if v]
            self._normalised[value] = answer
        return self._normalised[value]

    def further(self, first: Node) -> list[Node]:
        """Contractions of states that the result reaches before a projection or a softmax, in order of execution."""
        todo, met, found = list(first.outputs), {first.index}, list[Node]()
        while todo:
            value = todo.pop()
            for node in self.flow.readers(value) if value else ():
                if node.index in met or node.op in _SOFTMAXES or self.flow.projection_operands(node) is not None:
                    continue
                met.add(node.index)
                if self.of_states(node):
                    found.append(node)
                todo.extend(node.outputs)
        return sorted(found, key=lambda n: n.index)
