"""Are the constants that a rewrite did not declare as changed still there, bit for bit?"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

_CHUNK = 1 << 20


def differing_tensors(after: ir.Model, before: ir.Model, changed: frozenset[str]) -> list[str]:
    """Names of initializers of `before`, outside `changed`, that `after` lacks or holds with other bits."""
    new = dict(_initializers(after))
    return [
        name
        for name, tensor in _initializers(before)
        if name not in changed and (name not in new or not same_bits(tensor, new[name]))
    ]


def _initializers(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value


def same_bits(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    """True if both tensors have the same type, shape and bytes; reads them piece by piece."""
    if one is other or _same_place(one, other):
        return True
    if one.dtype != other.dtype or one.shape.numpy() != other.shape.numpy():
        return False
    if one.dtype == ir.DataType.STRING:
        return bool((one.numpy() == other.numpy()).all())
    x, y = _bytes(one), _bytes(other)
    return x.size == y.size and all(
        np.array_equal(x[i : i + _CHUNK], y[i : i + _CHUNK]) for i in range(0, x.size, _CHUNK)
    )


def _same_place(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    """Whether both are one stretch of one file, read in one way: then there is nothing to compare."""
    if not (isinstance(one, ir.ExternalTensor) and isinstance(other, ir.ExternalTensor)):
        return False
    kind = one.dtype == other.dtype and one.shape.numpy() == other.shape.numpy()
    place = (one.offset or 0) == (other.offset or 0) and os.path.realpath(one.path) == os.path.realpath(other.path)
    return kind and place


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
