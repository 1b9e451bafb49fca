"""Operators that lay scores or weights out anew, told by what they do to the last two axes."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array, Flow, Node


def keeps_last_two(flow: Flow, node: Node) -> bool:
    before, after = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    return len(before) >= 2 and before[-2:] == after[-2:]


def relaid_by(flow: Flow, node: Node, down: bool = False) -> tuple[Node, ...]:
    """Nodes, from this one up (or down), that only lay scores out anew, and keep the last two axes taken together.

    TensorFlow's exporter writes contractions with an axis of size 1 at the end, so that none of them keeps these alone.
    """
    found: list[Node] = []
    here: Node | None = node
    while here is not None and here.op in {"Reshape", "Squeeze", "Unsqueeze"} and len(found) < 4:
        found.append(here)
        ends = (found[0].inputs[0], here.outputs[0]) if down else (here.inputs[0], node.outputs[0])
        before, after = (flow.shape(v) for v in ends)
        if len(before) >= 2 and before[-2:] == after[-2:]:
            return tuple(found)
        readers = flow.live_readers(here.outputs[0]) if down else []
        here = (readers[0] if len(readers) == 1 else None) if down else flow.producer(here.inputs[0])
    return ()


def flattens_rows(flow: Flow, node: Node) -> bool:
    """Whether rows of scores are brought onto one axis, as a softmax over two axes wants them, or back."""
    if node.op not in {"Reshape", "Flatten"}:
        return False
    before, after = flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    return before[-1:] == after[-1:] and 2 in (len(before), len(after))


def swaps_last_two(flow: Flow, node: Node) -> bool:
    shape = flow.shape(node.inputs[0])
    numbers = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
    rest: list[Array | None] = [flow.value(v) if v else None for v in node.inputs[1:]]
    return len(shape) >= 2 and np.array_equal(node.evaluate([numbers, *rest])[0], numbers.swapaxes(-2, -1))
