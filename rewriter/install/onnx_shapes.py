"""Where only shapes of old projections, heads or scores are still read, they are read off what is still there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from passes.dataflow import LAYOUT, Flow, Value
from passes.operator_kinds import PASS_THROUGH
from passes.site import AttentionSite, Operand
from rewriter.install.onnx_editor import Editor
from rewriter.install.onnx_projection import three_axes

_Dimension = tuple[ir.Value, int, int]
"""A value, one of its axes, and how often the size of that."""

_Source = tuple[ir.Value, int, Value]


def release_shapes(editor: Editor, site: AttentionSite) -> list[ir.Node]:
    """Where only shapes of old projections, heads or scores are still read, read them off what goes in, or new heads.

    Returns the nodes that nothing reads any more.
    """
    flow = editor.capture.flow
    released: list[ir.Node] = []
    for operand in site.operands:
        names = [*flow.nodes[operand.projection.node].outputs, operand.projection.output, operand.stem]
        names += [v for i in operand.path for v in flow.nodes[i].outputs]
        if editor.capture.nodes[operand.projection.node].graph is not None:
            released += _released(editor, names, [operand])
    for operand in site.operands:
        released += _released(editor, _behind_seam(flow, site, operand), [operand])
    scores = [v for i in site.nodes if editor.capture.nodes[i].graph is not None for v in flow.nodes[i].outputs]
    return released + _released(editor, scores, [site.q, site.k])


def _behind_seam(flow: Flow, site: AttentionSite, operand: Operand) -> list[Value]:
    """How heads are laid out behind the seam for the old attention, last first."""
    found: dict[Value, None] = {}
    for value in (v for i in site.nodes for v in flow.nodes[i].inputs if v):
        above: list[Value] = []
        while value != operand.seam and (node := flow.producer(value)) is not None and node.op in LAYOUT | PASS_THROUGH:
            above.append(value)
            value = node.inputs[0]
        if value == operand.seam:
            found.update(dict.fromkeys(above))
    return list(found)


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
    fixed = {n for o in operands for n in (o.heads, o.dim, o.heads * o.dim)}
    parts = _dimensions(editor, name, [s for o in operands for s in _sources(editor, o)], fixed)
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


def _sources(editor: Editor, operand: Operand) -> list[_Source]:
    """Values that stay, the axes along which batches and tokens lie, and by what name they were recorded."""
    given, seam = three_axes(editor, operand), editor.value(operand.seam)
    producer = seam.producer()
    stays = producer is None or producer.graph is not None
    laid = [(seam, i, operand.seam) for i, axis in enumerate(operand.seam_axes) if axis in ("b", "s")] if stays else []
    return [*((given, i, given.name or "") for i in (0, 1)), *laid]


def _dimension(editor: Editor, nodes: list[ir.Node], part: _Dimension | int, stem: str) -> ir.Value:
    if isinstance(part, int):
        return editor.write.ints([part], f"{stem}.size")
    x, axis, times = part
    shape = editor.write.op(nodes, "Shape", [x], f"{stem}.input")
    size = editor.write.op(nodes, "Gather", [shape, editor.write.ints([axis], f"{stem}.axis")], f"{stem}.dim")
    if times == 1:
        return size
    return editor.write.op(nodes, "Mul", [size, editor.write.ints([times], f"{stem}.times")], f"{stem}.product")


def _dimensions(
    editor: Editor, name: Value, sources: Sequence[_Source], fixed: Collection[int]
) -> list[_Dimension | int] | None:
    """Each dimension of a value as a multiple of an axis of a source or a constant, told from two recordings.

    Where these do not differ in all that the file leaves open (the sides of images, so the number of patches), a size
    that is an axis' own is read off there; None if it is one of the `fixed` ones as well, or cannot be told.
    """
    first = editor.capture.flow
    other = editor.capture.other
    second = other.flow if other is not None else first
    counted = [(x, axis, first.shape(v)[axis], second.shape(v)[axis]) for x, axis, v in sources]
    unvaried = [] if editor.capture.varies_all else counted
    parts: list[_Dimension | int] = []
    for size, later in zip(first.shape(name), second.shape(name), strict=True):
        like = ((x, i, size // n) for x, i, n, m in counted if n and m and (size % n, size * m) == (0, later * n))
        if size == later:
            alike = [(x, i, 1) for x, i, n, m in unvaried if n == m == size > 1]
            if alike and size in fixed:
                return None
            parts.append(alike[0] if alike else size)
            continue
        found = min(like, key=lambda part: part[2], default=None)
        if found is None or any(n == m > 1 and found[2] % n == 0 for _, _, n, m in unvaried):
            return None
        parts.append(found)
    return parts
