"""Puts lifted branches back where they were (`rewriter/capture/onnx_branches.py`), as they are now."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.capture.onnx_branches import BRANCHES, Branch, Lifted, nodes_within
from rewriter.onnx_nodes import NodeWriter


def put_back(model: ir.Model, lifted: Sequence[Lifted]) -> dict[str, str]:
    """Undo `lift` on an edited model; returns what initializers are called now, by lifted name.

    A node that both branches read since then stays in the graph around them.
    """
    renamed: dict[str, str] = {}
    for one in reversed(lifted):
        renamed |= _put_back(model.graph, one)
    return renamed


def _put_back(graph: ir.Graph, lifted: Lifted) -> dict[str, str]:
    outputs = list(graph.outputs)
    given = _given(lifted, outputs)
    homes = _homes(graph, lifted, given)
    anchor = lifted.chooser
    if anchor is None:
        graph.append(lifted.node)
    else:
        graph.insert_before(anchor, [lifted.node])
    _restore_outputs(graph, lifted, outputs)
    renamed: dict[str, str] = {}
    for branch, values, home in zip(lifted.branches, given, homes, strict=True):
        graph.remove(home)
        branch.body.extend(home)
        branch.body.outputs.extend(values)
        renamed |= _restored_names(graph, branch, home)
        for made, original in branch.inputs.items():
            made.replace_all_uses_with(original)
            graph.inputs.remove(made)
    return renamed


def _given(lifted: Lifted, outputs: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """What each branch gives out now, in the order of the If's outputs."""
    found: list[dict[int, ir.Value]] = [{}, {}]
    for shift, (place, index) in enumerate(lifted.ports):
        for number in range(2):
            found[number][index] = outputs[place + shift + number]
    for number, name in enumerate(BRANCHES):
        if lifted.chooser is not None:
            passed = lifted.chooser.attributes[name].as_graph()
            for index, node in zip(lifted.chosen, list(passed), strict=True):
                value = node.inputs[0]
                assert value is not None
                found[number][index] = value
    return [[values[i] for i in range(len(lifted.node.outputs))] for values in found]


def _homes(graph: ir.Graph, lifted: Lifted, given: Sequence[Sequence[ir.Value]]) -> list[list[ir.Node]]:
    """Nodes that one branch alone leads to, and that did not stand around it before, in order."""
    outside = {id(v) for v in graph.outputs} - {id(v) for values in given for v in values}
    ends = [{id(v) for v in values} for values in given]
    enclosing = {inner: node for node in graph for inner in nodes_within(node)}
    read_by: dict[ir.Node, set[int]] = {}
    for node in reversed(list(graph)):
        if node is lifted.chooser:
            continue
        if node in lifted.outer or any(id(v) in outside for v in node.outputs):
            read_by[node] = {-1}
            continue
        readers = {enclosing.get(user, user) for v in node.outputs for user, _ in v.uses()} - {lifted.chooser}
        numbers = {n for reader in readers for n in read_by.get(reader, {-1})}
        numbers |= {n for n, values in enumerate(ends) if any(id(v) in values for v in node.outputs)}
        read_by[node] = numbers
    for node in graph:  # what nothing reads stands with what it reads
        if not read_by.get(node, {-1}):
            makers = (v.producer() for v in node.inputs if v is not None)
            own = {n for n, branch in enumerate(lifted.branches) if node in branch.names}
            read_by[node] = own.union(*(read_by.get(maker, set()) - {-1} for maker in makers if maker is not None))
    return [[n for n in graph if read_by.get(n) == {number}] for number in range(2)]


def _restore_outputs(graph: ir.Graph, lifted: Lifted, outputs: Sequence[ir.Value]) -> None:
    """The If gives out again what both branches did, in the shapes that these have now."""
    index = {place + shift: index for shift, (place, index) in enumerate(lifted.ports)}
    graph.outputs.clear()
    places = iter(range(len(outputs)))
    for place in places:
        if place in index:
            out = lifted.node.outputs[index[place]]
            out.shape = outputs[place].shape
            next(places)
        else:
            out = outputs[place]
        graph.outputs.append(out)
    if lifted.chooser is not None:
        for i, made in zip(lifted.chosen, list(lifted.chooser.outputs), strict=True):
            made.replace_all_uses_with(lifted.node.outputs[i], replace_graph_outputs=True)
        for name in BRANCHES:
            passed = lifted.chooser.attributes[name].as_graph()
            passed.outputs.clear()
            passed.remove(list(passed))
        graph.remove(lifted.chooser, safe=True)


def _restored_names(graph: ir.Graph, branch: Branch, nodes: Sequence[ir.Node]) -> dict[str, str]:
    """Names as they were; new ones without the prefix, in so far as nothing else in the body is called so."""
    old = [node for node in nodes if node in branch.names]
    for node in old:
        node.name = branch.names[node]
        for value in node.outputs:
            value.name = (value.name or "").removeprefix(branch.prefix)
    taken = {node.name for node in old} | {v.name for node in old for v in node.outputs}
    unique = NodeWriter(branch.body, {name for name in taken if name}).unique
    for node in (node for node in nodes if node not in branch.names):
        word = (node.name or "").removeprefix(branch.prefix).removeprefix(f"{branch.prefix[:-1]}.")
        node.name = unique(word) if word else word
        for value in node.outputs:
            name = (value.name or "").removeprefix(branch.prefix)
            value.name = unique(name) if name else name
    renamed = {value.name or "": (value.name or "").removeprefix(branch.prefix) for value in branch.stored}
    for name, value in zip(renamed, branch.stored, strict=True):
        if graph.initializers.get(name) is value:
            del graph.initializers[name]
            value.name = renamed[name]
            branch.body.register_initializer(value)
    return renamed
