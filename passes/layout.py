"""Recorded heads in one order whatever the program's: arrays by what their axes hold."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array


def canonical(array: Array, axes: tuple[str, ...], heads: int, dim: int) -> Array:
    """[B, heads, tokens, dim] of an array whose axes hold what `axes` says (see `Operand.seam_axes`).

    Raises ValueError where one axis holds two whose sizes are not told.
    """
    known = {"h": heads, "d": dim}
    shape: list[int] = []
    for letters, size in zip(axes, array.shape, strict=True):
        if len(letters) <= 1:
            shape += [size] * len(letters)
            continue
        sizes = [known.get(letter, -1) for letter in letters]
        told = int(np.prod([n for n in sizes if n != -1]))
        if sizes.count(-1) > 1 or "g" in letters or (told and size % told):
            raise ValueError(f"an axis of {size} that holds {letters} cannot be taken apart")
        shape += [size // told if n == -1 else n for n in sizes]
    have = "".join(axes)
    split = array.reshape(shape).transpose([have.index(c) for c in ("bhgsd" if "g" in have else "bhsd")])
    return split.reshape(split.shape[0], heads, *split.shape[-2:])


def laid_out(array: Array, axes: tuple[str, ...]) -> Array:
    """[B, heads, tokens, dim] with its axes in the order of `axes`; the caller gives it the program's shape."""
    return np.ascontiguousarray(array.transpose(["bhsd".index(c) for c in "".join(axes)]))
