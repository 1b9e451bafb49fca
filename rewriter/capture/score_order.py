"""Einsums whose scores have their axes in another order than attention's, put into it: [lead..., queries, keys].

``nlhd,nshd->nlsh`` with a softmax over s, or ``ibhd,jbhd->ijbh`` with one over j, are attention over heads like any
other. Between the two einsums only the order of axes changes; what goes in and comes out stays. Done to the graph that
a module was exported to for analysis, and to a copy of a graph that is edited itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph
from torch.fx import Node as FxNode

from rewriter.capture.pointwise import STANDS_FOR, aten, called, operator_name, recorded

_SOFTMAXES = frozenset({"softmax", "_softmax"})
_ELEMENTWISE = frozenset(
    {
        *("mul", "div", "add", "sub", "masked_fill", "where", "tanh", "clamp", "neg", "clone", "contiguous", "to"),
        *("_to_copy", "dropout", "nan_to_num", "alias"),
    }
)


def order_scores(graph: Graph, only: Collection[str] | None = None) -> bool:
    """Reorder, in place, the axes of such scores, or of those whose softmax `only` names; whether there were any."""
    found = [
        chain
        for node in list(graph.nodes)
        if operator_name(node) in _SOFTMAXES and (only is None or node.name in only)
        if (chain := _chain(node)) is not None
    ]
    for chain in found:
        chain.reorder(graph)
    if found:
        graph.lint()
    return bool(found)


@dataclass(frozen=True)
class _Chain:
    """What lies between two einsums.

    Attributes:
        product, mixing: the einsums.
        steps: the nodes between them, in order; all give scores or weights of the product's shape.
        softmax: one of them.
        order: for each axis of the canonical scores the axis of the product's result.
    """

    product: FxNode
    steps: tuple[FxNode, ...]
    softmax: FxNode
    mixing: FxNode
    order: tuple[int, ...]

    def reorder(self, graph: Graph) -> None:
        first, second, result = _terms(self.product)
        _set_equation(self.product, f"{first},{second}->{''.join(result[axis] for axis in self.order)}")
        inside = {self.product, *self.steps}
        for node in self.steps:
            for other in [n for n in node.all_input_nodes if n not in inside and recorded(n).dim()]:
                node.replace_input_with(other, self._reordered(graph, node, other))
        axis = int(self.softmax.args[1]) % len(self.order)  # type: ignore[arg-type]
        self.softmax.args = (self.softmax.args[0], self.order.index(axis), *self.softmax.args[2:])
        terms = list(_terms(self.mixing))
        place = next(i for i, n in enumerate(_operands(self.mixing)) if n in inside)
        terms[place] = "".join(terms[place][axis] for axis in self.order)
        _set_equation(self.mixing, f"{terms[0]},{terms[1]}->{terms[2]}")
        self.softmax.meta[STANDS_FOR] = self.softmax.name
        for node in inside:
            node.meta["val"] = recorded(node).permute(self.order)

    def _reordered(self, graph: Graph, before: FxNode, other: FxNode) -> FxNode:
        """A mask or bias that meets the scores, its axes in their order."""
        with graph.inserting_before(before):
            for _ in range(len(self.order) - recorded(other).dim()):
                other = called(other, aten.unsqueeze.default, other, 0)
            return called(other, aten.permute.default, other, list(self.order))


def _chain(softmax: FxNode) -> _Chain | None:
    """The chain of a softmax whose scores are in another order; None if they are not, or are used otherwise too."""
    shape = tuple(getattr(recorded(softmax), "shape", ()))
    if not shape or not isinstance(softmax.args[1], int):
        return None
    steps = [softmax]
    product = _before(softmax, shape)
    while product is not None and _elementwise(product):
        steps.insert(0, product)
        product = _before(product, shape)
    mixing = _only_user(softmax)
    while mixing is not None and _elementwise(mixing):
        steps.append(mixing)
        mixing = _only_user(mixing)
    if product is None or mixing is None or not (_is_einsum(product) and _is_einsum(mixing)):
        return None
    if any(_only_user(n) is not after for n, after in zip((product, *steps), (*steps, mixing), strict=True)):
        return None
    sizes = [getattr(recorded(n), "shape", None) for step in steps for n in step.all_input_nodes]
    if any(size is None or len(size) > len(shape) for size in sizes):
        return None
    order = _order(product, softmax.args[1] % len(shape), mixing, steps[-1])
    return None if order is None else _Chain(product, tuple(steps), softmax, mixing, order)


def _before(node: FxNode, shape: tuple[int, ...]) -> FxNode | None:
    """The one operand of scores' own shape that an einsum leads to."""
    whole = [n for n in node.all_input_nodes if tuple(getattr(recorded(n), "shape", ())) == shape]
    states = [n for n in whole if _is_einsum(n) or _elementwise(n)]
    return states[0] if len(states) == 1 else None


def _elementwise(node: FxNode) -> bool:
    return operator_name(node).removesuffix("_") in _ELEMENTWISE


def _only_user(node: FxNode) -> FxNode | None:
    """The one node that reads a node's result; what nothing reads in turn (a copy kept for show) does not count."""
    users = [n for n in node.users if n.users or n.op == "output"]
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _order(product: FxNode, axis: int, mixing: FxNode, weights: FxNode) -> tuple[int, ...] | None:
    """Axes of the scores as [lead..., queries, keys]; None where they are, or either einsum is no attention's."""
    first, second, result = _terms(product)
    key = result[axis]
    query_term, other = (first, second) if key in second else (second, first)
    tokens = [c for c in result if c not in other]
    lead = [c for c in query_term if c in other and c in result]
    summed = [c for c in query_term if c in other and c not in result]
    if key in query_term or len(tokens) != 1 or len(summed) != 1 or sorted((*lead, *tokens, key)) != sorted(result):
        return None
    if result == "".join((*lead, *tokens, key)) or len(set(query_term)) != len(query_term):
        return None
    place = _operands(mixing).index(weights)
    mine, values, mixed = _terms(mixing)[place], _terms(mixing)[1 - place], _terms(mixing)[2]
    over, asks = mine[axis], mine[result.index(tokens[0])]
    if over not in values or over in mixed or asks in values or asks not in mixed or len(mine) != len(result):
        return None
    return tuple(result.index(c) for c in (*lead, *tokens, key))


def _is_einsum(node: FxNode) -> bool:
    if operator_name(node) != "einsum":
        return False
    try:
        terms = _terms(node)
    except ValueError:
        return False
    return len(_operands(node)) == 2 and all(t.isalpha() and len(set(t)) == len(t) for t in terms)


def _operands(node: FxNode) -> list[FxNode]:
    operands: Any = node.args[1]
    return list(operands)


def _terms(node: FxNode) -> tuple[str, str, str]:
    """Raises ValueError where there are not two inputs, or no result is written."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    first, second = terms.split(",")
    return first, second, result


def _set_equation(node: FxNode, equation: str) -> None:
    node.args = (equation, *node.args[1:])
