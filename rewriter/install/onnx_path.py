"""What lies between a projection and the attention works on another number of heads: rotation, norms, caches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.dataflow import LAYOUT, Value
from passes.operator_kinds import PASS_THROUGH
from passes.site import Operand
from rewriter.install.onnx_editor import Editor


def rewire(editor: Editor, operand: Operand, stem: ir.Value, new: ir.Value, heads: int, *, copied: bool) -> ir.Value:
    """The path reads the new stem; its values, caches and presents change their number of heads. Returns the seam.

    `copied`: the path stays as it is for what else reads it, and a copy of it reads the new stem.
    """
    inside = {id(editor.capture.nodes[i]) for i in operand.path}
    nodes = {i: editor.capture.nodes[i] for i in operand.path}
    seam = editor.value(operand.seam)
    if copied:
        copies = _copied_path(editor, nodes, {id(stem): new})
        nodes, seam = copies.nodes, copies.values[id(seam)]
    else:
        returned = {name for name, _ in operand.presents}
        for node, position in list(stem.uses()):
            if id(node) in inside or any(v.name in returned for v in node.outputs):
                node.replace_input_with(position, new)
    if stem.is_graph_output():
        _become_output(editor, stem, new)
    if heads == operand.heads:
        return seam
    for index, axis in operand.reshapes:
        name = editor.capture.nodes[index].outputs[0].name
        assert name is not None
        _recount(editor, nodes[index], name, axis, operand.heads, heads)
    for node in nodes.values():
        _narrow_gain(editor, node)
        if node.op_type == "RotaryEmbedding" and node.attributes.get_int("num_heads", 0) == operand.heads:
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
        for value in node.outputs:
            if value is not stem and not value.is_graph_output():
                value.shape = None
    if operand.past is not None and operand.past_head_axis is not None:
        resize(editor.value(operand.past), operand.past_head_axis, heads)
        _forget_shapes(editor.value(operand.past), inside)
    for name, axis in operand.presents:
        resize(new if name == operand.stem else editor.value(name), axis, heads)
    return seam


@dataclass(frozen=True)
class _Copies:
    """Nodes by index, and values by the id of what they are a copy of."""

    nodes: dict[int, ir.Node]
    values: dict[int, ir.Value]


def _copied_path(editor: Editor, path: Mapping[int, ir.Node], values: dict[int, ir.Value]) -> _Copies:
    """Copies of the nodes of a path, in order, that read one of `values` or what is made of them."""
    nodes: dict[int, ir.Node] = {}
    for index, node in path.items():
        if not any(id(v) in values for v in node.inputs):
            continue
        inputs = [values.get(id(v), v) for v in node.inputs]
        name = editor.write.unique(f"{node.name or node.op_type}.shared")
        copy = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=len(node.outputs),
            overload=node.overload, version=node.version, name=name,
        )  # fmt: skip
        for old, made in zip(node.outputs, copy.outputs, strict=True):
            made.name, made.type = editor.write.unique(f"{old.name}.shared"), old.type
            values[id(old)] = made
        editor.graph.insert_after(node, [copy])
        nodes[index] = copy
    return _Copies(nodes, values)


def _forget_shapes(value: ir.Value, inside: Collection[int]) -> None:
    """What is declared of a cache between the input and the path (as where it is cast) counts the old heads."""
    todo = [value]
    while todo:
        for node, _ in todo.pop().uses():
            if id(node) in inside or node.op_type not in PASS_THROUGH | LAYOUT:
                continue
            made = [out for out in node.outputs if out.shape is not None and not out.is_graph_output()]
            for out in made:
                out.shape = None
            todo += made


def _narrow_gain(editor: Editor, node: ir.Node) -> None:
    """A norm whose numbers are spread over heads, and the same for all of them, is given those of one.

    They are inputs of the norm, or written out behind it.
    """
    if node.op_type in {"RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization"}:
        places = [1, 2]
    elif node.op_type in {"Mul", "Add"}:
        places = [i for i, value in enumerate(node.inputs) if value is not None and _is_constant(editor, value.name)]
    else:
        return
    for position, value in enumerate(node.inputs):
        name = value.name if value is not None and position in places else None
        if name is None or len(editor.capture.flow.shape(name)) < 2:
            continue
        numbers = np.asarray(editor.capture.flow.value(name))
        rows = numbers.reshape(-1, numbers.shape[-1])
        if len(rows) > 1 and (rows == rows[0]).all():
            node.replace_input_with(position, editor.write.constant(rows[0].copy(), f"{name}_of_one_head"))


def _is_constant(editor: Editor, name: Value | None) -> bool:
    if name is None or name not in editor.capture.values:  # what was put in a moment ago
        return False
    return not editor.capture.flow.data_dependent(name) and not editor.capture.flow.is_fed(name)


def _recount(editor: Editor, node: ir.Node, name: Value, axis: int, before: int, heads: int) -> None:
    """Write the new number of heads into a shape that is written out; `name` is what was reshaped to it."""
    assert node.inputs[1] is not None
    if _left_open(editor, node.inputs[1], axis):
        return
    size = editor.capture.flow.shape(name)[axis] // before * heads
    nodes: list[ir.Node] = []
    stem, rank = f"{name}.{heads}_heads", len(editor.capture.flow.shape(name))
    parts = [editor.write.ints([size], f"{stem}.size")]
    if axis > 0:
        first = editor.write.ints([*range(axis)], f"{stem}.first")
        parts.insert(0, editor.write.op(nodes, "Gather", [node.inputs[1], first], f"{stem}.lead"))
    if axis + 1 < rank:
        last = editor.write.ints([*range(axis + 1, rank)], f"{stem}.last")
        parts.append(editor.write.op(nodes, "Gather", [node.inputs[1], last], f"{stem}.rest"))
    shape = editor.write.op(nodes, "Concat", parts, f"{stem}.shape", axis=0)
    editor.graph.insert_before(node, nodes)
    node.replace_input_with(1, shape)


def _left_open(editor: Editor, shape: ir.Value, axis: int) -> bool:
    """Whether a constant shape leaves an axis to what comes in (-1, 0)."""
    name = shape.name
    return name is not None and _is_constant(editor, name) and bool(editor.capture.flow.value(name)[axis] <= 0)


def _become_output(editor: Editor, old: ir.Value, new: ir.Value) -> None:
    position = next(i for i, o in enumerate(editor.graph.outputs) if o is old)
    name, new.type, new.shape = old.name, old.type, old.shape
    old.name = editor.write.unique(f"{name}_before")
    new.name = name
    editor.graph.outputs[position] = new


def resize(value: ir.Value, axis: int, heads: int) -> None:
    """Change one dimension of a declared shape."""
    if value.shape is not None and not value.shape.is_unknown_dim(axis):
        dims = list(value.shape)
        dims[axis] = heads
        value.shape = ir.Shape(dims)
