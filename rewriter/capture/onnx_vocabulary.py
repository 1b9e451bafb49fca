"""numpy implementations of ONNX layout operators and of the integer arithmetic that feeds their shapes.

Provenance runs these on index tensors, so they must move elements exactly as ONNX Runtime does and must not
care about dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from passes.dataflow import Array

Attrs = Mapping[str, Any]
Inputs = Sequence[Array | None]
Operator = Callable[[Attrs, Inputs, int], tuple[Array, ...]]
"""(attributes, inputs, number of outputs) to outputs."""


def _ints(array: Array | None) -> list[int]:
    return [] if array is None else [int(i) for i in np.asarray(array).reshape(-1)]


def _need(array: Array | None) -> Array:
    if array is None:
        raise ValueError("a required input is missing")
    return array


def _axes(attrs: Attrs, inputs: Inputs, position: int = 1) -> list[int]:
    """Axes as an attribute (before opset 13) or as an input."""
    if "axes" in attrs:
        return [int(a) for a in attrs["axes"]]
    return _ints(inputs[position]) if len(inputs) > position else []


def reshape(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    shape = [int(s) for s in attrs["shape"]] if "shape" in attrs else _ints(inputs[1])
    if not attrs.get("allowzero", 0):
        shape = [x.shape[i] if s == 0 else s for i, s in enumerate(shape)]
    return (x.reshape(shape),)


def flatten(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    axis = int(attrs.get("axis", 1))
    axis += x.ndim if axis < 0 else 0
    return (x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1),)


def transpose(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    return (np.transpose(_need(inputs[0]), attrs.get("perm")),)


def squeeze(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    axes = _axes(attrs, inputs)
    return (np.squeeze(x, tuple(axes)) if axes else np.squeeze(x),)


def unsqueeze(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    axes = _axes(attrs, inputs)
    rank = x.ndim + len(axes)
    return (np.expand_dims(x, tuple(a % rank for a in axes)),)


def expand(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    return (np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(_ints(inputs[1])))),)


def tile(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    return (np.tile(_need(inputs[0]), _ints(inputs[1])),)


def slice_(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    if "starts" in attrs:
        starts, ends = list(attrs["starts"]), list(attrs["ends"])
        axes, steps = list(attrs.get("axes", range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = _ints(inputs[1]), _ints(inputs[2])
        axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
        steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index: list[slice] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = _range(start, end, step, x.shape[axis])
    return (x[tuple(index)],)


def _range(start: int, end: int, step: int, size: int) -> slice:
    """ONNX clamps a start beyond the front to the first element where Python takes nothing, if steps go backwards."""
    if step > 0:
        return slice(start, end, step)
    first = min(max(start + size if start < 0 else start, 0), size - 1)
    last = end + size if end < 0 else end
    return slice(first, None if last < 0 else last, step)


def split(attrs: Attrs, inputs: Inputs, outputs: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    axis = int(attrs.get("axis", 0))
    sizes = [int(s) for s in attrs["split"]] if "split" in attrs else _ints(inputs[1]) if len(inputs) > 1 else []
    if not sizes:
        count = int(attrs.get("num_outputs", outputs))
        step = -(-x.shape[axis] // count)
        sizes = [min(step, x.shape[axis] - i * step) for i in range(count)]
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=axis))


def concat(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    return (np.concatenate([_need(x) for x in inputs], axis=int(attrs.get("axis", 0))),)


def gather(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    return (np.take(_need(inputs[0]), _need(inputs[1]).astype(np.int64), axis=int(attrs.get("axis", 0))),)


def gather_elements(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x, index = _need(inputs[0]), _need(inputs[1])
    return (x[_along(index, int(attrs.get("axis", 0)))],)


def _along(index: Array, axis: int) -> tuple[Array, ...]:
    """Full indices of elements that `index` moves along `axis`; it may cover only a part of the other axes."""
    grid: list[Array] = list(np.indices(index.shape, sparse=True))
    grid[axis] = index.astype(np.int64)
    return tuple(grid)


def gather_nd(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x, index = _need(inputs[0]), _need(inputs[1])
    batch = int(attrs.get("batch_dims", 0))
    if batch == 0:
        return (x[tuple(np.moveaxis(index, -1, 0))],)
    lead = index.shape[:batch]
    flat_x, flat_i = x.reshape(-1, *x.shape[batch:]), index.reshape(-1, *index.shape[batch:])
    out = np.stack([a[tuple(np.moveaxis(i, -1, 0))] for a, i in zip(flat_x, flat_i, strict=True)])
    return (out.reshape(*lead, *out.shape[1:]),)


def scatter_nd(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x, index, updates = (_need(i) for i in inputs[:3])
    if attrs.get("reduction", "none") not in ("none", b"none"):
        raise NotImplementedError("ScatterND with a reduction")
    out = x.copy()
    out[tuple(np.moveaxis(index, -1, 0))] = updates
    return (out,)


def scatter_elements(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x, index, updates = (_need(i) for i in inputs[:3])
    out = x.copy()
    if attrs.get("reduction", "none") not in ("none", b"none"):
        raise NotImplementedError("ScatterElements with a reduction")
    out[_along(index, int(attrs.get("axis", 0)))] = updates
    return (out,)


def pad(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    x = _need(inputs[0])
    if attrs.get("mode", "constant") not in ("constant", b"constant"):
        raise NotImplementedError("Pad that is not constant")
    pads = [int(p) for p in attrs["pads"]] if "pads" in attrs else _ints(inputs[1])
    axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(x.ndim))
    half = len(pads) // 2
    out = x
    for axis, before, after in zip(axes, pads[:half], pads[half:], strict=True):
        if before < 0 or after < 0:
            keep = np.arange(max(0, -before), out.shape[axis] + min(0, after))
            out = np.take(out, keep, axis=axis)
        width = [(0, 0)] * x.ndim
        width[axis] = (max(0, before), max(0, after))
        out = np.pad(out, width)
    return (out,)


def trilu(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    k = _ints(inputs[1])[0] if len(inputs) > 1 and inputs[1] is not None else 0
    x = _need(inputs[0])
    return (np.triu(x, k) if attrs.get("upper", 1) else np.tril(x, k),)


def where(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    return (np.where(_need(inputs[0]).astype(bool), _need(inputs[1]), _need(inputs[2])),)


def identity(attrs: Attrs, inputs: Inputs, _: int) -> tuple[Array, ...]:
    return (_need(inputs[0]),)


OPERATORS: Mapping[str, Operator] = {
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Tile": tile,
    "Slice": slice_,
    "Split": split,
    "Concat": concat,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterND": scatter_nd,
    "ScatterElements": scatter_elements,
    "Pad": pad,
    "Trilu": trilu,
    "Where": where,
    "Identity": identity,
    "Dropout": identity,
}
