"""Einsums that multiply by a matrix, seen as the matrix products that they are.

``bnc,cd->bnd`` is MatMul, ``bnc,dc->bnd`` with the matrix turned; which operand comes first does not matter. All other
equations stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from passes.dataflow import Array, Node, unlike


def with_products(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The same nodes; an Einsum of a tensor with a matrix over the tensor's last axis is shown as MatMul."""
    return tuple(_as_product(node) if node.op == "Einsum" and len(node.inputs) == 2 else node for node in nodes)


def _as_product(node: Node) -> Node:
    left, _, result = str(node.attrs.get("equation", "")).replace(" ", "").partition("->")
    terms = left.split(",")
    for turned in (False, True):
        for x, w in ((0, 1), (1, 0)):
            if len(terms) == 2 and _multiplies(terms[x], terms[w], result, turned):
                return _shown(node, swapped=x == 1, turned=turned)
    return node


def _multiplies(tensor: str, matrix: str, result: str, turned: bool) -> bool:
    """Whether the equation is ``...c,cd->...d``, or ``...c,dc->...d`` if `turned`."""
    if len(matrix) != 2 or not (matrix.isalpha() and tensor[-1:].isalpha()):
        return False
    into, out = (matrix[1], matrix[0]) if turned else (matrix[0], matrix[1])
    lead = tensor[:-1]
    return into != out and tensor[-1] == into and result == lead + out and not {into, out} & set(lead)


def _shown(node: Node, *, swapped: bool, turned: bool) -> Node:
    def evaluate(inputs: Sequence[Array | None]) -> tuple[Array, ...]:
        return node.evaluate(inputs[::-1] if swapped else inputs)

    return replace(
        node,
        op="FusedMatMul" if turned else "MatMul",
        domain="",
        attrs={"transB": 1} if turned else {},
        inputs=node.inputs[::-1] if swapped else node.inputs,
        evaluate=evaluate,
        likeness=unlike,
    )
