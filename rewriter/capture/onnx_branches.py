"""Branches of If that hold attentions, lifted into the graph around them so that one flow shows all of them.

Exporters merge a decoder's first and later steps into one file that chooses between two bodies. Lifted, both are
computed, and what the graph gave out of the If are outputs of both; `rewriter/install/onnx_branches.py` puts back what
was edited in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from rewriter.capture.input_roles import InputRole, input_roles
from rewriter.capture.onnx_bodies import bodies_of, everything_read, holds_anchor

BRANCHES = ("then_branch", "else_branch")
MOST = 64
"""Ifs that are lifted; each takes a pass over the graph, and a stranger's file may hold thousands."""


@dataclass(frozen=True)
class Branch:
    """A body that was emptied.

    Attributes:
        prefix: what names of lifted nodes and values begin with, as those of two bodies may be the same.
        stored: initializers that were the body's own.
        names: of lifted nodes, as they were.
        inputs: inputs of the graph that only this branch reads, by those that they stand for.
    """

    body: ir.Graph
    prefix: str
    stored: tuple[ir.Value, ...]
    names: Mapping[ir.Node, str | None]
    inputs: Mapping[ir.Value, ir.Value]


@dataclass(frozen=True)
class Lifted:
    """An If whose branches stand in the graph; it does not itself.

    Attributes:
        branches: in the order of `BRANCHES`.
        chooser: what chooses between outputs that others read, in its place; None if nothing reads any.
        ports: (place among the graph's outputs, index of the If's output) where both branches' outputs follow each
            other instead.
        outer: nodes that stood in the graph before.
    """

    node: ir.Node
    branches: tuple[Branch, Branch]
    chooser: ir.Node | None
    ports: tuple[tuple[int, int], ...]
    outer: frozenset[ir.Node]

    @property
    def chosen(self) -> tuple[int, ...]:
        """Indices of outputs that the chooser gives."""
        direct = {index for _, index in self.ports}
        return tuple(i for i in range(len(self.node.outputs)) if i not in direct)


def lift(model: ir.Model) -> tuple[Lifted, ...]:
    """Lift branches that hold attentions, outer ones first, in place; of more than `MOST` the first."""
    lifted: list[Lifted] = []
    roles = input_roles(model) if any(map(chooses, model.graph)) else ()
    while len(lifted) < MOST and (node := next(filter(chooses, model.graph), None)) is not None:
        lifted.append(_lift(model.graph, node, len(lifted), roles))
    return tuple(lifted)


def chooses(node: ir.Node) -> bool:
    """Whether a node is an If with an attention in a branch."""
    return node.op_type == "If" and node.domain in ("", "ai.onnx") and any(holds_anchor(b) for b in bodies_of(node))


def _lift(graph: ir.Graph, node: ir.Node, number: int, roles: Sequence[InputRole]) -> Lifted:
    outer = frozenset(graph) - {node}
    ports = tuple(
        (place, out.index() or 0)
        for place, out in enumerate(graph.outputs)
        if out.producer() is node and not out.uses()
    )
    bodies = [node.attributes[name].as_graph() for name in BRANCHES]
    branches, given = [], []
    for body, prefix in zip(bodies, _prefixes(bodies, number), strict=True):
        given.append(_outputs(body, node))
        branches.append(_emptied(graph, node, body, prefix))
    branches = _with_short_masks(graph, branches, roles)
    lifted = Lifted(node, (branches[0], branches[1]), None, ports, outer)
    if lifted.chosen:
        chooser = _chooser(lifted, given)
        graph.insert_before(node, [chooser])
        for index, out in zip(lifted.chosen, chooser.outputs, strict=True):
            node.outputs[index].replace_all_uses_with(out, replace_graph_outputs=True)
        lifted = replace(lifted, chooser=chooser)
    _replace_outputs(graph, ports, given)
    graph.remove(node)
    return lifted


def _prefixes(bodies: Sequence[ir.Graph], number: int) -> list[str]:
    """What the bodies are called if that tells them apart, else which they are."""
    names = [body.name or "" for body in bodies]
    if len(set(names)) < len(names) or not all(names):
        names = ["then", "else"]
    return [f"{name}{number or ''}/" for name in names]


def _outputs(body: ir.Graph, node: ir.Node) -> list[ir.Value]:
    """What a body gives out, each value once and made in the body, with the types and shapes that are known."""
    values: list[ir.Value] = []
    for value, out in zip(list(body.outputs), node.outputs, strict=True):
        producer = value.producer()
        if producer is None or producer.graph is not body or value in values:
            copy = ir.Node("", "Identity", [value], num_outputs=1)
            copy.outputs[0].name = f"{value.name}.given{len(values)}"
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            body.append(copy)
            value = copy.outputs[0]
        value.type = value.type or out.type
        value.shape = value.shape if value.shape is not None else out.shape
        values.append(value)
    body.outputs.clear()
    return values


def _emptied(graph: ir.Graph, node: ir.Node, body: ir.Graph, prefix: str) -> Branch:
    """Move what a body holds before the If that it belongs to."""
    nodes, stored = list(body), tuple(body.initializers.values())
    names = {inner: inner.name for inner in nodes}
    body.remove(nodes)
    for inner in nodes:
        inner.name = f"{prefix}{inner.name.lstrip('/')}" if inner.name else None
        for value in inner.outputs:
            if value.name:
                value.name = prefix + value.name
    graph.insert_before(node, nodes)
    for value in stored:
        body.initializers.pop(value.name or "")
        value.name = prefix + (value.name or "")
        graph.register_initializer(value)
    return Branch(body, prefix, stored, names, {})


def _with_short_masks(graph: ir.Graph, branches: Sequence[Branch], roles: Sequence[InputRole]) -> list[Branch]:
    """A branch that reads no cache, beside one that does, takes masks over its own tokens instead of over all."""
    inputs = {v.name: v for v in graph.inputs}
    pasts = {role.name for role in roles if role.kind == "past"}
    masks = {role.name: role.axes.index("total") for role in roles if role.kind == "mask" and "total" in role.axes}
    lengths = [d for role in roles if role.kind == "ids" for a, d in zip(role.axes, role.shape, strict=True)
               if a == "length" and d is not None]  # fmt: skip
    read = [{name for node in branch.names for name in everything_read(node)} for branch in branches]
    done = []
    for branch, names in zip(branches, read, strict=True):
        if lengths and not names & pasts and any(other & pasts for other in read):
            shorter = {m: _short_mask(graph, branch, inputs[m], masks[m], lengths[0]) for m in names & masks.keys()}
            branch = replace(branch, inputs={made: inputs[name] for name, made in shorter.items()})
        done.append(branch)
    return done


def _short_mask(graph: ir.Graph, branch: Branch, mask: ir.Value, axis: int, length: int | str) -> ir.Value:
    assert mask.shape is not None
    size = length if isinstance(length, int) else f"{length} + 0"  # an expression: no name that other inputs share
    dims = [size if i == axis else d for i, d in enumerate(mask.shape.dims)]
    made = ir.Value(name=f"{branch.prefix}{mask.name}", shape=ir.Shape(dims), type=mask.type)
    graph.inputs.append(made)
    inside = {n for node in branch.names for n in (node, *nodes_within(node))}
    for node, position in list(mask.uses()):
        if node in inside:
            node.replace_input_with(position, made)
    return made


def nodes_within(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes in the bodies of a node, and in theirs."""
    for body in bodies_of(node):
        for inner in body:
            yield inner
            yield from nodes_within(inner)


def _chooser(lifted: Lifted, given: Sequence[Sequence[ir.Value]]) -> ir.Node:
    """An If whose bodies pass on what was made outside of them."""
    attributes = []
    for name, branch, values in zip(BRANCHES, lifted.branches, given, strict=True):
        nodes = [ir.Node("", "Identity", [values[i]], num_outputs=1) for i in lifted.chosen]
        for index, node in zip(lifted.chosen, nodes, strict=True):
            node.outputs[0].name = f"{branch.prefix}passed_{index}"
            node.outputs[0].type, node.outputs[0].shape = values[index].type, values[index].shape
        made = ir.Graph([], [n.outputs[0] for n in nodes], nodes=nodes, name=branch.body.name)
        attributes.append(ir.AttrGraph(name, made))
    node = ir.Node("", "If", lifted.node.inputs, attributes, num_outputs=len(lifted.chosen), name=lifted.node.name)
    for index, out in zip(lifted.chosen, node.outputs, strict=True):
        old = lifted.node.outputs[index]
        out.name, out.type, out.shape = old.name, old.type, old.shape
    return node


def _replace_outputs(graph: ir.Graph, ports: Sequence[tuple[int, int]], given: Sequence[Sequence[ir.Value]]) -> None:
    """Both branches' outputs where the graph gave out the If's."""
    index = dict(ports)
    flat = [
        value
        for place, out in enumerate(list(graph.outputs))
        for value in ([values[index[place]] for values in given] if place in index else [out])
    ]
    graph.outputs.clear()
    graph.outputs.extend(flat)
