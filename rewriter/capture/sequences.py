"""Sequences of tensors, seen through: what takes a tensor out of one is shown as an operator on tensors.

Exporters write `split` and `unbind` of sizes they do not know as SplitToSequence, whose pieces SequenceAt takes, and
join lists by ConcatFromSequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array
from rewriter.capture.onnx_constants import constant_tensor
from rewriter.onnx_nodes import input_at


@dataclass(frozen=True)
class OnTensors:
    """What a node that reads a sequence does to the tensors in it.

    Attributes:
        op: the operator it is like.
        inputs: what that reads.
        run: computes it.
        hidden: the nodes that make the sequence.
    """

    op: str
    inputs: tuple[ir.Value, ...]
    run: Callable[[Sequence[Array | None]], tuple[Array, ...]]
    hidden: tuple[ir.Node, ...]


def on_tensors(node: ir.Node) -> OnTensors | None:
    """The node seen through its sequence; None if it reads none, or one whose making depends on data."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in {"SequenceAt", "ConcatFromSequence"}:
        return None
    sequence = node.inputs[0]
    maker = sequence.producer() if sequence is not None else None
    if sequence is None or maker is None:
        return None
    position = _number(input_at(node, 1))
    if node.op_type == "SequenceAt" and maker.op_type == "SplitToSequence" and position is not None:
        return _piece(maker, position)
    made = _elements(sequence)
    if made is None:
        return None
    elements, hidden = made
    if node.op_type == "ConcatFromSequence":
        return OnTensors("Concat", elements, _joined(node), hidden)
    if position is None or not -len(elements) <= position < len(elements):
        return None
    return OnTensors("Identity", (elements[position],), lambda arrays: (_there(arrays[0]),), hidden)


def _piece(maker: ir.Node, position: int) -> OnTensors:
    """One piece of a tensor that is split."""
    axis, keeps = maker.attributes.get_int("axis", 0), maker.attributes.get_int("keepdims", 1)

    def run(arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        piece = _pieces(_there(arrays[0]), arrays[1] if len(arrays) > 1 else None, axis)[position]
        return (piece if keeps or len(arrays) > 1 else np.squeeze(piece, axis),)

    return OnTensors("Split", tuple(v for v in maker.inputs if v is not None), run, (maker,))


def _pieces(x: Array, split: Array | None, axis: int) -> list[Array]:
    """Of the given sizes, or all of one size but the last, which may be smaller; single elements without `split`."""
    sizes = np.ones((), np.int64) if split is None else np.asarray(split)
    cuts = np.cumsum(sizes)[:-1] if sizes.ndim else np.arange(int(sizes), x.shape[axis], int(sizes))
    return np.split(x, cuts, axis=axis)


def _elements(sequence: ir.Value) -> tuple[tuple[ir.Value, ...], tuple[ir.Node, ...]] | None:
    """What a sequence was put together from, in order, and the nodes that did it; None if that is not known."""
    maker = sequence.producer()
    if maker is None:
        return None
    if maker.op_type in {"SequenceConstruct", "SequenceEmpty"}:
        return tuple(v for v in maker.inputs if v is not None), (maker,)
    if maker.op_type != "SequenceInsert" or maker.inputs[0] is None or maker.inputs[1] is None:
        return None
    before, where = _elements(maker.inputs[0]), input_at(maker, 2)
    place = _number(where) if where is not None or before is None else len(before[0])
    if before is None or place is None:
        return None
    elements = list(before[0])
    elements.insert(place, maker.inputs[1])
    return tuple(elements), (*before[1], maker)


def _joined(node: ir.Node) -> Callable[[Sequence[Array | None]], tuple[Array, ...]]:
    axis = node.attributes["axis"].as_int()
    join = np.stack if node.attributes.get_int("new_axis", 0) else np.concatenate
    return lambda arrays: (np.asarray(join([_there(a) for a in arrays], axis=axis)),)


def _number(value: ir.Value | None) -> int | None:
    tensor = constant_tensor(value) if value is not None else None
    return None if tensor is None or tensor.size != 1 else int(tensor.numpy().reshape(()))


def _there(array: Array | None) -> Array:
    if array is None:
        raise ValueError("a required input is missing")
    return array
