"""Where only shapes of old projections or scores are still read, they are read off the projections' inputs instead."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from passes.dataflow import Flow, Value
from passes.site import AttentionSite, Operand
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_projection import three_axes


def release_shapes(editor: Editor, site: AttentionSite) -> list[ir.Node]:
    """Where only shapes of old projections or scores are still read, read them off the projections' inputs instead.

    Returns the nodes that nothing reads any more.
    """
    flow = editor.capture.flow
    released: list[ir.Node] = []
    for operand in site.operands:
        names = [*flow.nodes[operand.projection.node].outputs, operand.projection.output, operand.stem]
        names += [v for i in operand.path for v in flow.nodes[i].outputs]
        if editor.capture.nodes[operand.projection.node].graph is not None:
            released += _released(editor, names, [operand])
    scores = [v for i in site.nodes if editor.capture.nodes[i].graph is not None for v in flow.nodes[i].outputs]
    return released + _released(editor, scores, [site.q, site.k])


def _released(editor: Editor, names: Sequence[Value], operands: Sequence[Operand]) -> list[ir.Node]:
    """Readers of nothing but the shapes of these values, whose shapes come from elsewhere now."""
    done: list[ir.Node] = []
    for name in dict.fromkeys(names):
        value = editor.capture.values.get(name)
        readers = {id(n): n for n, _ in value.uses()} if value is not None else {}
        if all(n.op_type == "Shape" for n in readers.values()):
            done += [n for n in readers.values() if _release(editor, n, name, operands)]
    return done


def _release(editor: Editor, reader: ir.Node, name: Value, operands: Sequence[Operand]) -> bool:
    parts = _dimensions(editor, name, [three_axes(editor, o) for o in operands])
    if parts is None:
        return False
    start = reader.attributes.get_int("start", 0)
    end = reader.attributes.get_int("end", len(parts))
    nodes: list[ir.Node] = []
    stem = f"{reader.outputs[0].name}_released"
    whole = editor.write.op(
        nodes, "Concat", [_dimension(editor, nodes, p, stem) for p in parts[start:end]], stem, axis=0
    )
    editor.graph.insert_after(reader, nodes)
    reader.outputs[0].replace_all_uses_with(whole)
    return True


def _dimension(editor: Editor, nodes: list[ir.Node], part: tuple[ir.Value, int] | int, stem: str) -> ir.Value:
    if isinstance(part, int):
        return editor.write.ints([part], f"{stem}.size")
    x, axis = part
    shape = editor.write.op(nodes, "Shape", [x], f"{stem}.input")
    return editor.write.op(nodes, "Gather", [shape, editor.write.ints([axis], f"{stem}.axis")], f"{stem}.dim")


def _dimensions(editor: Editor, name: Value, sources: Sequence[ir.Value]) -> list[tuple[ir.Value, int] | int] | None:
    """Each dimension of a value as (source, its axis) or a constant, told from two recordings."""
    first = editor.capture.flow
    other = editor.capture.other
    second = other.flow if other is not None else first
    axes = [(x, axis) for x in sources for axis in (0, 1)]
    parts: list[tuple[ir.Value, int] | int] = []
    for size, later in zip(first.shape(name), second.shape(name), strict=True):
        like = (p for p in axes if _sizes(editor, p, first, second) == (size, later))
        found = next(like, None) if size != later else None
        if found is None and size != later:
            return None
        parts.append(size if found is None else found)
    return parts


def _sizes(editor: Editor, part: tuple[ir.Value, int], first: Flow, second: Flow) -> tuple[int, int]:
    x, axis = part
    assert x.name is not None
    return first.shape(x.name)[axis], second.shape(x.name)[axis]
