"""How a learned projection's weight makes a matrix, and which token and feature each element of its output is.

Most programs multiply by a matrix. Others write an Einsum whose weight has an axis for heads, ``abc,cde->abde``, or
multiply by a stack of matrices, one for each head; numbers may be multiplied by a factor on the way. All are one map of
features, and read as such.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array, Flow, Node

# letters of terms as in Einsum's equation: every axis of an operand has one


@dataclass(frozen=True)
class Layout:
    """A contraction with a constant, as a map of features.

    Attributes:
        out_first: whether the weight is [out, in], where it is a plain matrix.
        weight_axes: the weight's axes, those that are summed over first: transposed so, these joined and all others
            joined, it is [in, out]; None for a plain matrix.
        summed: how many axes are summed over.
        factor: what the product is multiplied by.
        rows, columns: token (an index into the input's leading axes, flattened) and feature of each element of the
            output, flattened.
        features: how many columns there are.
    """

    out_first: bool
    weight_axes: tuple[int, ...] | None
    summed: int
    factor: float
    rows: Array
    columns: Array
    features: int

    @property
    def features_last(self) -> bool:
        """Whether the output's last axis holds all features in order, and tokens run over the others."""
        index = np.arange(len(self.rows))
        return np.array_equal(self.rows, index // self.features) and np.array_equal(self.columns, index % self.features)


def layout_of(flow: Flow, node: Node) -> Layout | str:
    """The layout of a node that is a projection; where it is not read, what it is instead."""
    operands = flow.projection_operands(node)
    assert operands is not None
    if node.op not in {"MatMul", "Gemm", "Linear", "FusedMatMul", "Einsum"}:
        return f"the projection is a {node.op}"
    if node.op == "Gemm" and node.attrs.get("beta", 1.0) not in (0.0, 1.0) and any(node.inputs[2:]):
        return "the projection scales its bias"
    if any(node.attrs.get(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return "the projection reads its input transposed"
    read = _terms(flow, node)
    if read is None:
        return "the projection's batch and features are not told apart"
    x, w, result = (read[0], read[1], read[2])
    x, w = (x, w) if operands == (0, 1) else (w, x)
    contracted = [c for c in w if c in x and c not in result]
    if not contracted or any(c in x for c in w if c not in contracted):
        return "the projection's weight differs from one sequence or token to the next"
    if sorted(x[-len(contracted) :]) != sorted(contracted):
        return "the projection reads features that are not on its input's last axis"
    return _laid(flow, node, operands, (x, w, result), x[-len(contracted) :])


def _laid(flow: Flow, node: Node, operands: tuple[int, int], terms: tuple[str, str, str], contracted: str) -> Layout:
    x, w, result = terms
    sizes = dict(zip(x, flow.shape(node.inputs[operands[0]]), strict=True))
    sizes |= dict(zip(w, flow.shape(node.inputs[operands[1]]), strict=True))
    own = [c for c in w if c not in contracted]
    shape = [sizes[c] for c in result]
    rows, columns = (
        _numbers(letters, result, sizes, shape) for letters in ([c for c in x if c not in contracted], own)
    )
    matrix = len(w) == 2 and len(contracted) == 1
    return Layout(
        out_first=matrix and w[1] == contracted,
        weight_axes=None if matrix else tuple(w.index(c) for c in (*contracted, *own)),
        summed=len(contracted),
        factor=float(node.attrs.get("alpha", 1.0)),
        rows=rows,
        columns=columns,
        features=int(np.prod([sizes[c] for c in own], dtype=np.int64)),
    )


def _numbers(letters: list[str], result: str, sizes: dict[str, int], shape: list[int]) -> Array:
    """The flat index over axes `letters` of each element of the result; axes that it lacks are of size 1."""
    total = np.zeros(shape, np.int64)
    step = 1
    for letter in reversed(letters):
        if letter in result:
            axis = result.index(letter)
            total += (step * np.arange(sizes[letter])).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        step *= sizes[letter]
    return total.reshape(-1)


def _terms(flow: Flow, node: Node) -> tuple[str, str, str] | None:
    """The terms of both inputs and of the result; None if an axis is batch and feature at once."""
    if node.op == "Einsum":
        try:
            terms = einsum_terms(flow, node)
        except ValueError:
            return None
        return terms if all(len(set(t)) == len(t) for t in terms) else None
    a, b = (len(flow.shape(v)) for v in node.inputs[:2])
    turned = node.op == "Linear" or bool(node.attrs.get("transB", 0))
    ranks = flow.shape(node.inputs[0])[:-2], flow.shape(node.inputs[1])[:-2]
    lead = string.ascii_uppercase[: max(a, b) - 2]
    first, second, result = "", "", ""
    for place, letter in enumerate(lead):
        here = [r[place - len(lead)] if len(r) >= len(lead) - place else None for r in ranks]
        if here[0] is not None and here[1] is not None and min(here[0], here[1]) > 1:
            return None
        mine = letter.lower() if here[0] is not None and here[1] is not None else letter
        first += letter if here[0] is not None else ""
        second += mine if here[1] is not None else ""
        result += mine if here[1] is not None and (here[0] is None or here[1] > 1) else letter
    tokens = "" if a == 1 else "t"
    return f"{first}{tokens}y", f"{second}zy" if turned else f"{second}yz", f"{result}{tokens}z"


def einsum_features(node: Node, weight: int, shape: tuple[int, ...]) -> int:
    """Output features of an Einsum whose input number `weight` is a constant of this shape; told from it alone."""
    inputs, _, result = str(node.attrs.get("equation", "")).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if weight >= len(terms) or len(terms[weight]) != len(shape):  # broken, or an ellipsis: nothing of features
        return 0
    term = terms[weight]
    return int(np.prod([n for c, n in zip(term, shape, strict=True) if c in result], dtype=np.int64))


def _leading(shape: tuple[int, ...], term: str) -> tuple[int, ...]:
    """The sizes of the axes that an ellipsis in a term stands for."""
    start, behind = term.find("..."), len(term.partition("...")[2])
    return shape[start : len(shape) - behind] if start >= 0 else ()


def einsum_terms(flow: Flow, node: Node) -> tuple[str, str, str]:
    """The two input terms and the output term of an Einsum's equation, without blanks, ellipses written out.

    An equation without an output has all letters that stand once, in the order of the alphabet. Raises ValueError for
    other numbers of inputs, and for leading axes of different sizes that are broadcast to each other.
    """
    equation = str(node.attrs.get("equation", "")).replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        result = "..." * ("..." in inputs) + "".join(sorted(c for c in set(inputs) - set(".,") if inputs.count(c) == 1))
    if len(terms) > 2 and result:
        raise ValueError(
            f"einsum {equation!r} contracts {len(terms)} factors at once; written as one contraction after the other "
            "(attention weights with values first), which is the same, it is read"
        )
    if len(terms) != 2 or not result:
        raise ValueError(f"einsum {equation!r} is not understood")
    if "..." in equation:
        leading = [_leading(flow.shape(v), t) for v, t in zip(node.inputs[:2], terms, strict=True)]
        widest = max(leading, key=len)
        if "..." not in result or any(sizes != widest[len(widest) - len(sizes) :] for sizes in leading):
            raise ValueError(f"einsum {equation!r} broadcasts its leading axes")
        free = "".join(c for c in string.ascii_uppercase if c not in equation)[: len(widest)]
        terms = [t.replace("...", free[len(free) - len(sizes) :]) for t, sizes in zip(terms, leading, strict=True)]
        result = result.replace("...", free)
    return terms[0], terms[1], result
