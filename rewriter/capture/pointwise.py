"""Convolutions that attentions read, written as the linear layers that they are.

Those are over channels where kernels are of size 1, else over the channels of all tokens that a kernel covers.

Done to the graph that a module was exported to for analysis, and to a copy of a graph that is edited itself. The module
keeps its convolution: what is stored has the same rows, so the door out finds them there.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph
from torch.fx import Node as FxNode

aten = torch.ops.aten

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
_PRODUCTS = frozenset({"matmul", "bmm", "mm", "baddbmm", "einsum"})
_SOFTMAXES = frozenset({"softmax", "_softmax"})
_FUSED = "scaled_dot_product_attention"
_ENDS = _CONVOLUTIONS | _PRODUCTS | _SOFTMAXES | {"linear", "addmm", _FUSED}


STANDS_FOR = "stands_for"
"""The key of a node's meta under which a linear layer has the name of the node that it was written for."""


def write_as_linear(graph: Graph, only: Collection[str] | None = None) -> bool:
    """Replace, in place, the convolutions that lie between an attention and what it attends to, or those of them with
    these node names; whether there were any.

    A product is an attention's if a softmax reads it or it reads one.
    """
    found = [n for n in dict.fromkeys(read_by_attention(graph)) if _is_dense(n) and (only is None or n.name in only)]
    for node in found:
        _replace(graph, node)
    if found:
        graph.lint()
    return bool(found)


def operator_name(node: FxNode) -> str:
    """The aten operator of a node without its overload; "" for all else."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema is not None else ""


def read_by_attention(graph: Graph) -> Iterator[FxNode]:
    """The convolutions, products and linear layers nearest above attentions' queries, keys and values."""
    for node in graph.nodes:
        if operator_name(node) == _FUSED:
            yield from _next(node, _above)
        elif operator_name(node) in _SOFTMAXES:
            for product in (*_next(node, _above), *_next(node, _below)):
                if operator_name(product) in _PRODUCTS:
                    yield from _next(product, _above)


def _above(node: FxNode) -> Iterable[FxNode]:
    return node.all_input_nodes


def _below(node: FxNode) -> Iterable[FxNode]:
    return node.users


def _next(start: FxNode, step: Callable[[FxNode], Iterable[FxNode]]) -> Iterator[FxNode]:
    """The first convolutions, products, softmaxes and linear layers in one direction."""
    todo, seen = [*step(start)], {start}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if operator_name(node) in _ENDS:
            yield node
        else:
            todo.extend(step(node))


def _is_dense(node: FxNode) -> bool:
    """Whether a convolution multiplies all channels of the tokens under its kernel by one matrix."""
    if operator_name(node) not in _CONVOLUTIONS:
        return False
    shapes = [getattr(recorded(n), "shape", None) for n in node.all_input_nodes[:2]]
    given = _given(node)
    if any(s is None for s in shapes) or isinstance(given.get("padding"), str):
        return False
    x, weight = shapes
    assert x is not None and weight is not None
    return not given.get("transposed") and given.get("groups", 1) == 1 and len(x) == len(weight)


def _given(node: FxNode) -> dict[str, Any]:
    """A node's arguments by name."""
    schema = node.target._schema  # type: ignore[union-attr]
    return dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)


def recorded(node: FxNode) -> Any:
    """What a node gave when the graph was made (a tensor without data, mostly), or the stored tensor it reads."""
    if node.op == "get_attr" and "val" not in node.meta and node.graph.owning_module is not None:
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    return node.meta.get("val")


def called(like: FxNode, target: Any, *args: Any) -> FxNode:
    """A new node where nodes are being inserted, of the module that `like` is of, with what it gives."""
    node = like.graph.call_function(target, args)
    node.meta.update({k: copy.copy(like.meta[k]) for k in ("nn_module_stack", "stack_trace") if k in like.meta})
    values = [recorded(a) if isinstance(a, FxNode) else a for a in args]
    if all(v is not None or a is None for v, a in zip(values, args, strict=True)):
        with torch.no_grad():
            node.meta["val"] = target(*values)
    return node


def _replace(graph: Graph, node: FxNode) -> None:
    weight = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    with graph.inserting_before(node):
        rows = _rows(node)
        matrix = called(node, aten.flatten.using_ints, weight, 1)
        product = called(node, aten.linear.default, rows, matrix, bias)
        result = called(node, aten.movedim.int, product, -1, 1)
    product.meta[STANDS_FOR] = node.name
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _rows(node: FxNode) -> FxNode:
    """[N, places..., channels times kernel]: what a convolution multiplies at each place."""
    x, weight = node.all_input_nodes[:2]
    sizes = list(recorded(weight).shape[2:])
    given, count = _given(node), len(sizes)

    def along(name: str, otherwise: int) -> list[int]:
        numbers = list(given.get(name, [otherwise]))
        return numbers * count if len(numbers) == 1 else numbers

    if any(padding := along("padding", 0)):
        x = called(node, aten.constant_pad_nd.default, x, [n for p in reversed(padding) for n in (p, p)])
    steps = list(zip(sizes, along("stride", 1), along("dilation", 1), strict=True))
    if all(step == (1, 1, 1) for step in steps):
        return called(node, aten.movedim.int, x, 1, -1)
    for axis, (size, stride, dilation) in enumerate(steps, 2):
        x = called(node, aten.unfold.default, x, axis, (size - 1) * dilation + 1, stride)
        if dilation > 1:
            x = called(node, aten.slice.Tensor, x, -1, 0, None, dilation)
    x = called(node, aten.movedim.int, x, 1, count + 1)
    return called(node, aten.flatten.using_ints, x, count + 1)
