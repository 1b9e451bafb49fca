"""Products of two values that data reaches, and the axes that they contract."""

from __future__ import annotations

from passes.dataflow import PRODUCTS, Flow, Node, Value
from passes.match.choosing import content_bias
from passes.match.operand_view import OperandView
from passes.match.verdicts import NotUnderstood
from passes.projections import einsum_terms
from passes.provenance import cache_root


def first_contraction(flow: Flow, value: Value) -> Node | None:
    """The next contraction above a value, through whatever lies between."""
    return next((n for n in reversed(flow.ancestors(value, stop=contracts)) if contracts(n)), None)


def contracts(node: Node) -> bool:
    return node.op in PRODUCTS


def contracted_by(node: Node) -> tuple[Value, ...]:
    """The two operands of a contraction."""
    return node.inputs[1:3] if node.op == "Baddbmm" else node.inputs[:2]


def query_and_key(flow: Flow, node: Node) -> tuple[OperandView, OperandView, Value | None]:
    if node.op == "Baddbmm":
        bias, a, b = node.inputs[:3]
        if node.attrs.get("beta", 1.0) == 0:  # whatever stands there, uninitialised memory mostly, is not read
            return OperandView(a, -2, -1), OperandView(b, -1, -2), None
        if flow.data_dependent(bias):
            raise NotUnderstood(content_bias(flow, bias))
        return OperandView(a, -2, -1), OperandView(b, -1, -2), bias
    a, b = node.inputs[:2]
    if node.op in {"MatMul", "FusedMatMul"} and not moves_batch(node):
        turned_a, turned_b = bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))
        view_a = OperandView(a, -1, -2) if turned_a else OperandView(a, -2, -1)
        return view_a, OperandView(b, -2, -1) if turned_b else OperandView(b, -1, -2), None
    if node.op == "Einsum":
        first, second, result = two_terms(flow, node)
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


STRAIGHT_FROM = "its keys and values come straight from an input ({})"
"""Why an attention that only reads a cache has nothing to share; for the name of the input."""


def require_projected(flow: Flow, value: Value) -> None:
    """A decoder step reads what was projected once, from the encoder's output, out of its cache inputs."""
    if flow.data_dependent(value) or (fed := cache_root(flow, value)) is None:
        return
    if len(flow.shape(fed)) == 3 and not any(n.op == "Concat" for n in flow.consumers(fed)):
        raise NotUnderstood(
            f"tokens are compared or mixed as they come from an input ({fed}): no projection makes keys or values of "
            "them whose heads could be shared"
        )
    raise NotUnderstood(
        f"{STRAIGHT_FROM.format(fed)}, so this file has no projection for them; the file "
        'that fills this cache has: select only its decoder there (layers="decoder") if both are to fit together'
    )


def moves_batch(node: Node) -> bool:
    return bool(node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0))


def two_terms(flow: Flow, node: Node) -> tuple[str, str, str]:
    """As `einsum_terms`. Raises NotUnderstood where an Einsum is no product of two operands."""
    try:
        return einsum_terms(flow, node)
    except ValueError as error:
        raise NotUnderstood(str(error)) from error
