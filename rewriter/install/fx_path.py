"""Which size arguments on an operand's path hold its number of heads, and what they become with fewer heads.

Told by running the path's layout operators on a tensor of head numbers: where those numbers vary is the head axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node as FxNode

from passes.dataflow import LAYOUT, Array, Flow, Node, Value
from passes.operator_kinds import NORMS
from passes.site import Operand
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_emit import HINT


@dataclass(frozen=True)
class Resize:
    """New positional arguments of one node."""

    node: str
    args: tuple[Any, ...]


def is_nested(node: Node) -> bool:
    """Whether a flow node lies in a region (autocast, no_grad) that the graph wraps into one call."""
    return any("." in value for value in node.outputs if value)


def below_stem(flow: Flow, operand: Operand) -> list[Node]:
    """Nodes of the path that the stem's elements pass, in order."""
    reached = {operand.stem}
    found = []
    for node in (flow.nodes[i] for i in operand.path):
        if any(v in reached for v in node.inputs):
            reached.update(node.outputs)
            found.append(node)
    return found


def resizes(flow: Flow, nodes: Mapping[str, FxNode], operand: Operand, heads: int) -> list[Resize]:
    """How arguments between stem and seam change when the operand has `heads` heads.

    Raises UnsupportedModel where the head count cannot be told or changed.
    """
    path = below_stem(flow, operand)
    if any(is_nested(n) for n in path):
        raise UnsupportedModel(
            "its rotation or norm lies inside a wrapped region (autocast, flex_attention)", hint=HINT
        )
    if heads == operand.heads:
        return []
    held = {operand.stem: _heads_at_stem(flow, operand)}
    found: list[Resize] = []
    norm = operand.norm
    if norm is not None and (norm.gains is not None or not norm.per_head):
        found, path = _through_norm(flow, nodes, operand, path, held, heads)
    for node in path:
        for value, numbers in _heads_after(flow, node, held, operand.heads).items():
            held[value] = numbers
        change = _resized(nodes[node.name], node, held[node.outputs[0]], operand.heads, heads)
        if change is not None:
            found.append(change)
    return found


def _through_norm(
    flow: Flow, nodes: Mapping[str, FxNode], operand: Operand, path: list[Node], held: dict[Value, Array], heads: int
) -> tuple[list[Resize], list[Node]]:
    """(changes in a norm that treats heads apart, the path behind it); heads behind it lie as before it.

    What multiplies them is given fewer numbers, and an operator that says how many features it normalises fewer.
    """
    norm = operand.norm
    assert norm is not None
    end = next(i for i, node in enumerate(path) if norm.output in node.outputs)
    changes: list[Resize] = []
    for node in path[: end + 1]:
        if node.op in LAYOUT and flow.shape(node.outputs[0]) != flow.shape(norm.input):
            raise UnsupportedModel("heads are laid out anew in front of a norm that treats them apart", hint=HINT)
        fx = nodes[node.name]
        position = next((i for i, a in enumerate(fx.args) if isinstance(a, (list, tuple)) and node.op in NORMS), None)
        if position is None:
            continue
        sizes = [int(n) for n in fx.args[position]]  # type: ignore[union-attr, arg-type]
        sizes[0] = sizes[0] // operand.heads * heads  # head after head, so the first size counts them
        if not norm.per_head:
            changes.append(Resize(fx.name, (*fx.args[:position], sizes, *fx.args[position + 1 :])))
    if flow.shape(norm.output) != flow.shape(operand.stem):
        raise UnsupportedModel("heads are laid out anew in front of a norm that treats them apart", hint=HINT)
    held[norm.output] = held[operand.stem]
    return changes, path[end + 1 :]


def _heads_at_stem(flow: Flow, operand: Operand) -> Array:
    """The head that each element of the stem belongs to."""
    shape = flow.shape(operand.stem)
    axis = next(i for i, letters in enumerate(operand.stem_axes) if "h" in letters)
    letters, size = operand.stem_axes[axis], shape[axis]
    number = np.arange(size)
    if letters == "h" or letters.startswith("h"):
        line = number // (size // operand.heads)
    elif letters.endswith("h"):
        line = number % operand.heads
    else:
        raise UnsupportedModel(f"heads laid out as {operand.stem_axes} cannot be made fewer", hint=HINT)
    return np.broadcast_to(np.expand_dims(line, tuple(i for i in range(len(shape)) if i != axis)), shape).copy()


def _heads_after(flow: Flow, node: Node, held: Mapping[Value, Array], heads: int) -> dict[Value, Array]:
    if node.op == "Concat":
        held = {**held, **_beside(flow, node, held)}
    if node.op in LAYOUT:
        results = node.evaluate([held[v] if v in held else flow.value(v) if v else None for v in node.inputs])
    else:
        results = tuple(_heads_kept(flow, node, held, v) if v else np.empty(0) for v in node.outputs)
    for value, numbers in zip(node.outputs, results, strict=True):
        if value and numbers.size and len(np.unique(numbers)) != heads:
            raise UnsupportedModel(f"{node.name} takes the heads apart", hint=HINT)
    return dict(zip(node.outputs, results, strict=True))


def _beside(flow: Flow, node: Node, held: Mapping[Value, Array]) -> dict[Value, Array]:
    """Heads of what is joined to an operand: tokens of another stream, whose heads lie alike."""
    numbers = next(held[v] for v in node.inputs if v in held)
    axis = _axis(numbers)
    line = np.take(np.moveaxis(numbers, axis, -1).reshape(-1, numbers.shape[axis]), 0, axis=0)
    joined = flow.shape(node.outputs[0])
    if len(joined) != numbers.ndim or joined[axis] != len(line):  # heads are joined, not tokens
        return {}
    found = {}
    for value in (v for v in node.inputs if v and v not in held and flow.data_dependent(v)):
        shape = flow.shape(value)
        if len(shape) == numbers.ndim and shape[axis] == len(line):
            spread = line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            found[value] = np.broadcast_to(spread, shape).copy()
    return found


def _heads_kept(flow: Flow, node: Node, held: Mapping[Value, Array], output: Value) -> Array:
    """Heads after an operator that works on elements, or sums up the features of each head."""
    numbers: Array = np.broadcast_arrays(*(held[v] for v in node.inputs if v in held))[0]
    for value in node.inputs:
        if value and value not in held:
            _require_alike(node, numbers, flow.shape(value))
    shape = flow.shape(output)
    if len(shape) != numbers.ndim or any(n not in (1, m) for n, m in zip(shape, numbers.shape, strict=True)):
        raise UnsupportedModel(f"{node.name} between projection and attention changes how heads lie", hint=HINT)
    return numbers[tuple(slice(n) for n in shape)]


def _require_alike(node: Node, numbers: Array, other: Sequence[int]) -> None:
    """A tensor that meets the heads must be the same for all of them."""
    from_end = numbers.ndim - _axis(numbers)
    if len(other) >= from_end and other[-from_end] != 1:
        raise UnsupportedModel(f"{node.name} combines the heads with a tensor that has a value for each", hint=HINT)


def _axis(numbers: Array) -> int:
    varying = [a for a in range(numbers.ndim) if bool((np.diff(numbers, axis=a) != 0).any())]
    if len(varying) != 1:
        raise UnsupportedModel("heads run over several axes of one tensor", hint=HINT)
    return varying[0]


def _resized(fx: FxNode, node: Node, numbers: Array, before: int, heads: int) -> Resize | None:
    if node.op not in {"Reshape", "Expand"}:
        return None
    position = next((i for i, a in enumerate(fx.args) if isinstance(a, (list, tuple))), None)
    if position is None and _overload(fx).endswith("_as"):
        raise UnsupportedModel(f"{node.name} takes its sizes from another tensor", hint=HINT)
    if position is None:
        return None
    sizes = list(fx.args[position])  # type: ignore[arg-type]
    axis = _axis(numbers)
    if _overload(fx) == "unflatten":
        axis -= int(fx.args[1]) % (numbers.ndim - len(sizes) + 1)  # type: ignore[arg-type]
    elif len(sizes) != numbers.ndim:
        raise UnsupportedModel(f"{node.name} names its sizes in a way that is not understood", hint=HINT)
    if not 0 <= axis < len(sizes) or sizes[axis] == -1:
        return None
    if isinstance(sizes[axis], int):
        sizes[axis] = sizes[axis] // before * heads
    elif -1 not in sizes:
        sizes[axis] = -1  # a product with the head count, computed from the input's sizes
    else:
        raise UnsupportedModel(f"{node.name} computes its sizes from the number of heads", hint=HINT)
    return Resize(fx.name, (*fx.args[:position], sizes, *fx.args[position + 1 :]))


def _overload(fx: FxNode) -> str:
    target = fx.target
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)
