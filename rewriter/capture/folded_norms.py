"""Batch normalisations behind projections that attentions read, written into those projections' weights.

In eval mode such a norm multiplies each feature by a number and adds one. Done to the graph that a module was exported
to for analysis, where a norm is then one more factor of a stored matrix (the module keeps its norm, see
`rewriter.install.neutral_norm`), and to a copy of a graph that is edited itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Graph
from torch.fx import Node as FxNode

from rewriter.capture.pointwise import STANDS_FOR, called, operator_name, read_by_attention, recorded

aten = torch.ops.aten

_LAYOUT = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "_unsafe_view", "transpose", "permute", "movedim", "squeeze"),
        *("unsqueeze", "contiguous", "clone", "dropout", "detach", "alias"),
    }
)
_ASKS_SHAPE = frozenset({"reshape_as", "view_as", "expand_as", "sym_size"})
"""Operators that read no element of what is not their first argument (or of any)."""


def fold_norms(graph: Graph, only: Collection[str] | None = None) -> bool:
    """Fold, in place, every such norm that reads the whole of one projection alone (or of those which, or whose
    convolutions, have these node names); whether there were any."""
    folded = False
    for product in dict.fromkeys(read_by_attention(graph)):
        path = _to_norm(product) if only is None or product.meta.get(STANDS_FOR, product.name) in only else None
        if path is not None and _aligned(product, path):
            _fold(graph, product, path[-1])
            folded = True
    if folded:
        graph.lint()
    return folded


def _to_norm(product: FxNode) -> list[FxNode] | None:
    """The nodes from a linear layer to the norm that alone reads its elements."""
    if operator_name(product) != "linear":
        return None
    path, node = list[FxNode](), product
    while len(readers := [u for u in node.users if not _asks_shape(u, node)]) == 1:
        node = readers[0]
        path.append(node)
        if operator_name(node) == "batch_norm":
            return path if _is_constant(node) and node.args[0] is (path[-2] if len(path) > 1 else product) else None
        if operator_name(node) not in _LAYOUT or len(node.all_input_nodes) != 1:
            return None
    return None


def _asks_shape(user: FxNode, node: FxNode) -> bool:
    return operator_name(user) in _ASKS_SHAPE and (len(user.args) < 2 or user.args[0] is not node)


def _is_constant(norm: FxNode) -> bool:
    """Whether a norm has statistics of its own and uses them."""
    mean, variance, training = norm.args[3:6]
    return isinstance(mean, FxNode) and isinstance(variance, FxNode) and not training


def _aligned(product: FxNode, path: Sequence[FxNode]) -> bool:
    """Whether channel c of what the norm reads is feature c of the linear layer: seen by running what lies between."""
    given = recorded(product)
    if given is None or not all(isinstance(n, int) for n in given.shape):
        return False
    shape = [*given.shape]
    numbers = torch.arange(shape[-1]).expand(shape)
    for node in path[:-1]:
        assert callable(node.target)
        numbers = node.target(numbers, *node.args[1:], **node.kwargs)
    if numbers.dim() < 2 or numbers.shape[1] != shape[-1]:
        return False
    channels = torch.arange(shape[-1]).view(-1, *[1] * (numbers.dim() - 2))
    return bool((numbers == channels).all())


def _fold(graph: Graph, product: FxNode, norm: FxNode) -> None:
    x, weight = product.args[:2]
    bias = product.args[2] if len(product.args) > 2 else product.kwargs.get("bias")
    _, gain, shift, mean, variance, _, _, epsilon = norm.args[:8]

    def call(target: Any, *args: Any) -> FxNode:
        return called(product, target, *args)

    with graph.inserting_before(product):
        factor = call(aten.rsqrt.default, call(aten.add.Scalar, variance, epsilon))
        factor = factor if gain is None else call(aten.mul.Tensor, factor, gain)
        centred = mean if bias is None else call(aten.sub.Tensor, mean, bias)
        offset = call(aten.neg.default, call(aten.mul.Tensor, centred, factor))
        offset = offset if shift is None else call(aten.add.Tensor, offset, shift)
        matrix = call(aten.mul.Tensor, weight, call(aten.unsqueeze.default, factor, 1))
        result = call(aten.linear.default, x, matrix, offset)
    result.meta[STANDS_FOR] = product.meta.get(STANDS_FOR, product.name)
    product.replace_all_uses_with(result)
    graph.erase_node(product)
    read = norm.args[0]
    assert isinstance(read, FxNode)
    norm.replace_all_uses_with(read)
    graph.erase_node(norm)
