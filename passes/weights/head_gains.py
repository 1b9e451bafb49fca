"""What norms multiply each head's features by, where heads differ in it: read head by head, and laid out as stored."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array, Flow, Value
from passes.site import Operand


def stored_gains(operand: Operand) -> dict[str, Value]:
    """The values that hold an operand's numbers by head: "gain", and "shift" if there is one; empty without any."""
    gains = None if operand.norm is None else operand.norm.gains
    if gains is None:
        return {}
    return {"gain": gains.gain} | ({} if gains.shift is None else {"shift": gains.shift})


def operand_gains(flow: Flow, operand: Operand) -> dict[str, Array]:
    """[heads * dim] each, head-major, by the names of `stored_gains`."""
    gains = None if operand.norm is None else operand.norm.gains
    if gains is None:
        return {}
    places = gains.places.reshape(-1)
    return {part: flow.value(value).reshape(-1)[places] for part, value in stored_gains(operand).items()}


def gains_like(operand: Operand, numbers: Array, shape: tuple[int, ...]) -> Array:
    """`numbers` [heads' * dim], head-major, laid out as the operand's own of this `shape` are, which counts fewer heads
    along the axis along which heads lie."""
    gains = None if operand.norm is None else operand.norm.gains
    assert gains is not None
    heads = len(numbers) // operand.dim
    flat = np.empty_like(numbers)
    flat[gains.places[:heads].reshape(-1)] = numbers
    axis = next(a for a, size in enumerate(shape) if size > 1)  # head after head, so the first axis counts them
    return flat.reshape(*shape[:axis], shape[axis] // operand.heads * heads, *shape[axis + 1 :])
