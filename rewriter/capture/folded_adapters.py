"""Low-rank adapters beside projections, written into those projections' matrices.

An adapter that was not merged (LoRA, 2106.09685; DoRA, VeRA and others of the kind) adds to a linear layer what other
linear layers make of the same input: a sum of linear maps, which is one. Done to the graph that a module was exported
to for analysis, and to a copy of a graph that is edited itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph
from torch.fx import Node as FxNode

from rewriter.capture.pointwise import STANDS_FOR, called, operator_name, recorded

aten = torch.ops.aten

MERGED = "merged_of"
"""The key of a linear layer's meta under which it has the node of the matrix that adapters were added to."""
_KEEPS_NUMBERS = frozenset({"dropout", "detach", "alias", "clone", "contiguous"})
_CASTS = frozenset({"to", "_to_copy", "type_as"})
_SUMS, _FACTORS, _DIVISORS = frozenset({"add", "add_"}), frozenset({"mul", "mul_"}), frozenset({"div", "div_"})
_DEEPEST = 8
"""How many nodes lie between a sum and its input, at most: one for each rank, factor, cast and sum."""


def fold_adapters(graph: Graph, inputs: Collection[str], only: Collection[str] | None = None) -> bool:
    """Write, in place, each sum of linear maps of one value as one linear layer, or those of them with these node
    names; whether there were any.

    Args:
        inputs: names of the placeholders that hold no weights.
    """
    folder = _Folder(_reached(graph, inputs))
    folded = False
    for node in reversed([n for n in graph.nodes if operator_name(n) in _SUMS]):  # whole sums before their parts
        source = folder.source(node) if node.users and (only is None or node.name in only) else None
        if source is not None:
            folder.fold(graph, node, source)
            folded = True
    if folded:
        graph.lint()
    return folded


def _reached(graph: Graph, inputs: Collection[str]) -> set[FxNode]:
    """Nodes whose numbers depend on inputs."""
    reached: set[FxNode] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and node.name in inputs) or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


@dataclass(frozen=True)
class _Map:
    """A linear map as nodes of a graph: matrix [out, in], None of the identity; what is then added, [out] or None."""

    matrix: FxNode | None
    offset: FxNode | None


@dataclass(frozen=True)
class _Folder:
    reached: set[FxNode]

    def source(self, total: FxNode) -> FxNode | None:
        """The nearest value of which all parts of a sum are linear maps."""
        found = self._sources(total, _DEEPEST)
        return found[0] if found else None

    def _sources(self, node: FxNode, depth: int) -> list[FxNode]:
        """All values of which a node is a linear map, nearest first."""
        name, args = operator_name(node), node.args
        if node not in self.reached or not depth or not _is_plain(node):
            return []
        if name == "linear" and (matrix := args[1]) not in self.reached and _alike(node, matrix):
            read = _unchanged(args[0])
            before = [_unchanged(read.args[0])] if _is_cast(read) else []
            return [read, *before, *self._sources(read, depth - 1)]
        if name in _SUMS:
            parts = [n for n in args[:2] if isinstance(n, FxNode)]
            if len(parts) < 2 or not _same_shape(node, *parts):
                return []
            first, second = (self._sources(n, depth - 1) for n in parts)
            return [n for n in first if n in second]
        if (kept := _unchanged(node)) is not node:
            return self._sources(kept, depth - 1)
        if _is_cast(node):
            return self._sources(args[0], depth - 1)  # type: ignore[arg-type]
        step = self._scaled(node)
        return [] if step is None else self._sources(step[0], depth - 1)

    def _scaled(self, node: FxNode) -> tuple[FxNode, Any] | None:
        """(what is multiplied, by which number or node of a weight) of a node that scales its features."""
        name, args = operator_name(node), node.args
        if name not in _FACTORS | _DIVISORS or node.kwargs:
            return None
        pairs = [(args[0], args[1]), (args[1], args[0])] if name in _FACTORS else [(args[0], args[1])]
        for value, factor in pairs:
            if not isinstance(value, FxNode) or value not in self.reached:
                continue
            if _same_shape(node, value) and self._is_factor(factor, node):
                return value, factor
        return None

    def _is_factor(self, factor: Any, product: FxNode) -> bool:
        """Whether a number, or a weight, multiplies all features by one number or each by its own."""
        if isinstance(factor, (int, float)):
            return True
        held = recorded(factor) if isinstance(factor, FxNode) and factor not in self.reached else None
        if not isinstance(held, torch.Tensor) or not held.is_floating_point():
            return False
        return held.numel() == 1 or tuple(held.shape[-1:]) == (held.numel(),) == tuple(recorded(product).shape[-1:])

    def fold(self, graph: Graph, total: FxNode, source: FxNode) -> None:
        """Put one linear layer in the place of a sum, and take out what nothing reads any more.

        Weights are added up in float32 at least, and stored in the type that the layer reads.
        """
        kind = recorded(source).dtype
        with graph.inserting_before(total):
            whole = self._map(total, source, total)
            stored = [None if part is None else _cast(total, part, kind) for part in (whole.matrix, whole.offset)]
            layer = called(total, aten.linear.default, source, *stored)
            result = _cast(total, layer, recorded(total).dtype)
        layer.meta[STANDS_FOR], layer.meta[MERGED] = total.name, self._base(total)
        total.replace_all_uses_with(result)
        erase_unread(graph, total)

    def _base(self, node: FxNode) -> FxNode:
        """The weight of the first linear layer of a sum."""
        while operator_name(node := _unchanged(node)) != "linear":
            step = self._scaled(node)
            node = node.all_input_nodes[0] if step is None else step[0]
        return node.all_input_nodes[1]

    def _map(self, node: FxNode, source: FxNode, like: FxNode) -> _Map:
        def call(target: Any, *args: Any) -> FxNode:
            return called(like, target, *args)

        if (node := _unchanged(node)) is source:
            return _Map(None, None)
        name, args = operator_name(node), node.args
        if _is_cast(node):
            return self._map(args[0], source, like)  # type: ignore[arg-type]
        if name == "linear":
            inner = self._map(args[0], source, like)  # type: ignore[arg-type]
            given = args[1], args[2] if len(args) > 2 else node.kwargs.get("bias")
            matrix, bias = (None if n is None else _wide(like, n) for n in given)
            moved = None if inner.offset is None else call(aten.matmul.default, matrix, inner.offset)
            return _Map(
                matrix if inner.matrix is None else call(aten.matmul.default, matrix, inner.matrix),
                _total(call, moved, bias),
            )
        if name in _SUMS:
            first, second = (self._map(a, source, like) for a in args[:2])  # type: ignore[arg-type]
            matrix = call(aten.add.Tensor, first.matrix, second.matrix)
            return _Map(matrix, _total(call, first.offset, second.offset))
        step = self._scaled(node)
        assert step is not None
        return _times(call, self._map(step[0], source, like), step[1], by=name in _DIVISORS)


def _unchanged(node: Any) -> FxNode:
    """The node whose numbers a node hands on."""
    while operator_name(node) in _KEEPS_NUMBERS and not (operator_name(node) == "dropout" and node.args[2]):
        node = node.args[0]
    found: FxNode = node
    return found


def _total(call: Any, first: Any, second: Any) -> FxNode | None:
    parts = [p for p in (first, second) if p is not None]
    result: FxNode | None = call(aten.add.Tensor, *parts) if len(parts) == 2 else next(iter(parts), None)
    return result


def _times(call: Any, inner: _Map, factor: Any, *, by: bool) -> _Map:
    """A map whose features are multiplied, or divided, by a number each."""
    rows, numbers = factor, factor
    if isinstance(factor, FxNode):
        numbers = call(aten.reshape.default, _wide(factor, factor), [-1])
        rows = call(aten.unsqueeze.default, numbers, 1)
        target = aten.div.Tensor if by else aten.mul.Tensor
    else:
        target = aten.div.Scalar if by else aten.mul.Scalar
    offset = None if inner.offset is None else call(target, inner.offset, numbers)
    return _Map(call(target, inner.matrix, rows), offset)


def _is_plain(node: FxNode) -> bool:
    """Whether a node gives one tensor of floats, adds its operands as they are if it adds, and writes over nothing that
    others read."""
    held, name = recorded(node), operator_name(node)
    floats = isinstance(held, torch.Tensor) and held.is_floating_point()
    alone = not name.endswith("_") or (isinstance(node.args[0], FxNode) and len(node.args[0].users) == 1)
    return bool(floats and alone and node.kwargs.get("alpha", 1) == 1)


def _alike(node: FxNode, matrix: Any) -> bool:
    """Whether a linear layer computes in the type of its weight."""
    held = recorded(matrix) if isinstance(matrix, FxNode) else None
    return isinstance(held, torch.Tensor) and held.dim() == 2 and held.dtype == recorded(node).dtype


def _same_shape(total: FxNode, *parts: Any) -> bool:
    held = [recorded(n) for n in (total, *parts)]
    return all(isinstance(t, torch.Tensor) and t.is_floating_point() and t.shape == held[0].shape for t in held)


def _is_cast(node: FxNode) -> bool:
    """Whether a node gives another value's floats in another type, or in the same."""
    if operator_name(node) not in _CASTS or not isinstance(node.args[0], FxNode):
        return False
    before, after = recorded(node.args[0]), recorded(node)
    return all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in (before, after))


def _cast(like: FxNode, node: FxNode, kind: torch.dtype) -> FxNode:
    return node if recorded(node).dtype == kind else called(like, aten.to.dtype, node, kind)


def _wide(like: FxNode, node: Any) -> FxNode:
    """A weight as the type in which weights are added up."""
    return _cast(like, node, torch.promote_types(recorded(node).dtype, torch.float32))


def erase_unread(graph: Graph, node: FxNode, drop: Callable[[FxNode], None] | None = None) -> None:
    """Erase, in place, a node that nothing reads but checks of its type, and what only it read.

    Args:
        drop: what erases the placeholders and attributes among them; left out, they stay.
    """
    todo, erased = [node], set[FxNode]()
    while todo:
        node = todo.pop()
        kept = drop is None and node.op != "call_function"
        if kept or node in erased or any(u.target is not aten._assert_tensor_metadata.default for u in node.users):
            continue
        erased.add(node)
        for check in [*node.users]:
            graph.erase_node(check)
        todo += node.all_input_nodes
        if node.op == "call_function" or drop is None:
            graph.erase_node(node)
        else:
            drop(node)
