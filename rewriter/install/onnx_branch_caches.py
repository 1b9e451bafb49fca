"""Caches of files that choose between branches: both give out one tensor, so its heads are those of both.

Where one branch fills a cache and another only reads it (a decoder's cross-attention), the reader repeats the heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.dataflow import Value
from passes.targets.replacement import Replacement
from rewriter.capture.input_roles import constant_array
from rewriter.capture.onnx_branches import Lifted
from rewriter.onnx_nodes import NodeWriter


@dataclass(frozen=True)
class Shared:
    """One output of the file, and the values that the branches give out as it.

    Attributes:
        past: the input that takes it in the next step, if there is one.
    """

    name: str
    given: tuple[Value, ...]
    past: str | None


def shared_outputs(model: ir.Model, lifted: Sequence[Lifted], pasts: Mapping[str, str]) -> tuple[Shared, ...]:
    """What outputs of the file stand for in `model`, whose branches are lifted; `pasts` are inputs by the output that
    they take in the next step."""
    groups: list[tuple[str, tuple[Value, ...]]] = [(v.name or "", (v.name or "",)) for v in model.graph.outputs]
    for one in reversed(lifted):
        for place, index in one.ports:
            first, second = groups[place], groups.pop(place + 1)
            groups[place] = (one.node.outputs[index].name or "", (*first[1], *second[1]))
    return tuple(Shared(name, given, pasts.get(name)) for name, given in groups if len(given) > 1)


def conflicts(model: ir.Model, outputs: Sequence[Shared], replacements: Sequence[Replacement]) -> dict[str, str]:
    """By site, why a cache cannot change its heads in one branch alone; as sites that this leaves out may be those that
    others went with, ask again without them."""
    made = {v.name: v for v in model.graph.outputs}
    fewer = {
        name: r
        for r in replacements
        if r.mixing is None and r.linear is None
        for operand in (r.site.k, r.site.v)
        for name, _ in operand.presents
        if r.grouped.kv_heads != operand.heads
    }
    found: dict[str, str] = {}
    for shared in outputs:
        for replacement in [fewer[name] for name in shared.given if name in fewer]:
            others = [name for name in shared.given if fewer.get(name) is not replacement]
            reasons = (_clash(replacement, made[name], fewer.get(name), shared) for name in others)
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is not None:
                found[replacement.site.name] = reason
    return found


def _clash(replacement: Replacement, given: ir.Value, other: Replacement | None, shared: Shared) -> str | None:
    """Why a cache cannot be what `replacement` makes of it, as a branch gives it out that `other` rewrites, if any."""
    if other is not None and other.grouped.kv_heads == replacement.grouped.kv_heads:
        alike = all(np.array_equal(a, other.tensors.get(name, ())) for name, a in replacement.tensors.items())
        if alike or not (replacement.turned or other.turned):
            return None
        return (
            f"the file's branches hold other weights, and would turn the heads of one cache ({shared.name}) differently"
        )
    if not _follows(given, shared):
        return (
            f"another branch of the file gives out the same cache ({shared.name}) with all heads, and is not rewritten"
        )
    if replacement.turned:
        return (
            f"another branch reads the cache that it fills ({shared.name}), and would need its queries turned with the "
            "keys; without calibration (by the mean) nothing is turned"
        )
    return None


def _follows(value: ir.Value, shared: Shared) -> bool:
    """Whether a branch gives out no heads of its own: nothing at all, or what it was given."""
    source = _passed(value)
    if source.producer() is None and shared.past is not None and source.name == shared.past:
        return True
    array = constant_array(source, 1)
    return array is not None and not array.size


def _passed(value: ir.Value) -> ir.Value:
    """What an Identity passes on."""
    node = value.producer()
    given = node.inputs[0] if node is not None and node.op_type == "Identity" else None
    return value if given is None else given


def follow(model: ir.Model, outputs: Sequence[Shared], caches: Mapping[Value, int]) -> None:
    """Branches that only read or pass on a cache take the heads that the one that fills it has now.

    `caches`: the axis that runs over heads, by output that was rewritten.
    """
    made = {v.name: v for v in model.graph.outputs}
    taken = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    taken |= {v.name for node in model.graph for v in node.outputs} | {node.name for node in model.graph}
    write = NodeWriter(model.graph, {name for name in taken if name})
    inputs = {v.name: v for v in model.graph.inputs}
    for shared in outputs:
        for name, axis in caches.items():
            heads = _heads(made[name], axis) if name in shared.given else None
            if heads is None:
                continue
            for value in (made[other] for other in shared.given if other != name):
                _resize_empty(write, value, axis, heads)
            past = inputs.get(shared.past or "")
            if past is not None and past.shape is not None and past.shape[axis] != heads:
                _repeat(model.graph, write, past, axis, heads, {id(made[n]) for n in shared.given})


def _heads(value: ir.Value, axis: int) -> int | None:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else None


def _resize_empty(write: NodeWriter, value: ir.Value, axis: int, heads: int) -> None:
    """A branch that gives out nothing says so in the new number of heads."""
    node, array = value.producer(), constant_array(_passed(value), 1)
    if array is None or array.size or node is None:
        return
    empty = np.zeros([heads if i == axis else size for i, size in enumerate(array.shape)], array.dtype)
    value.shape = ir.Shape(empty.shape)
    if node.op_type == "Constant":
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(empty))
    else:
        node.replace_input_with(0, write.constant(empty, f"{value.name}.empty"))


def _repeat(graph: ir.Graph, write: NodeWriter, past: ir.Value, axis: int, heads: int, passed: set[int]) -> None:
    """Whatever reads a cache, but for what passes it on, reads each of its heads as often as it stood there before."""
    assert past.shape is not None
    before = past.shape[axis]
    assert isinstance(before, int)
    readers = [(n, i) for n, i in past.uses() if not any(id(v) in passed for v in n.outputs)]
    past.shape = ir.Shape([heads if i == axis else size for i, size in enumerate(past.shape)])
    if not readers:
        return
    index = write.ints(np.repeat(np.arange(heads), before // heads).tolist(), f"{past.name}.heads")
    nodes: list[ir.Node] = []
    wide = write.op(nodes, "Gather", [past, index], f"{past.name}.repeated", axis=axis)
    wide.type = past.type
    for node, position in readers:
        node.replace_input_with(position, wide)
    graph.insert_before(graph[0], nodes)
