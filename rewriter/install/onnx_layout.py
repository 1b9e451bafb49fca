"""Nodes that lay tokens, heads and features of a value out anew; "canonical" is [batch, heads, tokens, features]."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.install.onnx_obstacles import HEADS_IN_BATCH, fused_shape, heads_apart
from rewriter.onnx_nodes import NodeWriter


def arrange(
    write: NodeWriter,
    nodes: list[ir.Node],
    value: ir.Value,
    tokens: tuple[str, str],
    axes: tuple[str, ...],
    heads: int,
    dim: int,
    name: str,
    group: int = 1,
) -> ir.Value:
    """[tokens..., heads * dim] as the stem is laid out; `group` is the size of an axis "g"."""
    if axes == (*tokens, "hd"):
        return value
    wanted = "".join(axes).replace("g", "")  # behind "h"; a last Reshape takes them apart
    value = write.op(nodes, "Reshape", [value, write.ints([0, 0, heads, dim], f"{name}.split")], f"{name}.heads")
    have = "".join(tokens) + "hd"
    perm = [have.index(a) for a in wanted]
    if perm != [0, 1, 2, 3]:
        value = write.op(nodes, "Transpose", [value], f"{name}.ordered", perm=perm)
    if all(len(a) == 1 for a in axes) and "g" not in axes:
        return value
    if axes in HEADS_IN_BATCH:
        return lead(write, nodes, value, [-1], [2, 3], f"{name}.arranged")
    shape = fused_shape(axes, heads, dim, group)
    assert shape is not None  # sites laid out otherwise are not installed
    return write.op(nodes, "Reshape", [value, write.ints(shape, f"{name}.fused")], f"{name}.arranged")


def canonical(
    write: NodeWriter, nodes: list[ir.Node], value: ir.Value, axes: tuple[str, ...], heads: int, name: str
) -> ir.Value:
    """Any seam as [B, heads, tokens, features]."""
    if axes == ("b", "h", "s", "d"):
        return value
    if all(len(a) == 1 for a in axes) and len(axes) == 4:
        return write.op(nodes, "Transpose", [value], f"{name}.canonical", perm=[axes.index(a) for a in "bhsd"])
    if axes == ("bh", "s", "d"):
        return lead(write, nodes, value, [-1, heads], [1, 2], f"{name}.canonical")
    if axes == ("hb", "s", "d"):
        return heads_behind(write, nodes, value, heads, f"{name}.canonical")
    if axes == ("b", "s", "hd"):
        shape = write.ints([0, 0, heads, -1], f"{name}.split_shape")
        split = write.op(nodes, "Reshape", [value, shape], f"{name}.split")
        return write.op(nodes, "Transpose", [split], f"{name}.canonical", perm=[0, 2, 1, 3])
    if heads_apart(axes):
        perm = [[a or "g" for a in axes].index(letter) for letter in "bhgsd"]
        if perm != sorted(perm):
            value = write.op(nodes, "Transpose", [value], f"{name}.apart", perm=perm)
        return lead(write, nodes, value, [-1, heads], [3, 4], f"{name}.canonical")
    raise AssertionError(f"queries, keys or values laid out as {axes} are not installed")


def from_canonical(
    write: NodeWriter, nodes: list[ir.Node], value: ir.Value, axes: tuple[str, ...], name: str
) -> ir.Value:
    """[B, heads, tokens, features] as `axes`."""
    if axes == ("b", "h", "s", "d"):
        return value
    if all(len(a) == 1 for a in axes) and len(axes) == 4:
        return write.op(nodes, "Transpose", [value], name, perm=["bhsd".index(a) for a in axes])
    if axes == ("bh", "s", "d"):
        return lead(write, nodes, value, [-1], [2, 3], name)
    if axes == ("hb", "s", "d"):
        value = write.op(nodes, "Transpose", [value], f"{name}.turned", perm=[1, 0, 2, 3])
        return lead(write, nodes, value, [-1], [2, 3], name)
    if axes == ("b", "s", "hd"):
        turned = write.op(nodes, "Transpose", [value], f"{name}.turned", perm=[0, 2, 1, 3])
        return write.op(nodes, "Reshape", [turned, write.ints([0, 0, -1], f"{name}.merged")], name)
    raise AssertionError(f"sites whose output is laid out as {axes} are not installed")


def heads_behind(write: NodeWriter, nodes: list[ir.Node], value: ir.Value, heads: int, name: str) -> ir.Value:
    """[heads * B, S, D] as [B, heads, S, D]."""
    value = lead(write, nodes, value, [heads, -1], [1, 2], f"{name}.apart")
    return write.op(nodes, "Transpose", [value], name, perm=[1, 0, 2, 3])


def lead(
    write: NodeWriter, nodes: list[ir.Node], value: ir.Value, lead: list[int], keep: list[int], name: str
) -> ir.Value:
    """Reshape to `lead`, one size of which is -1, followed by the value's own sizes along the axes `keep`."""
    shape = write.op(nodes, "Shape", [value], f"{name}.shape")
    tail = write.op(nodes, "Gather", [shape, write.ints(keep, f"{name}.tail")], f"{name}.sizes")
    full = write.op(nodes, "Concat", [write.ints(lead, f"{name}.lead"), tail], f"{name}.full", axis=0)
    return write.op(nodes, "Reshape", [value, full], name)
