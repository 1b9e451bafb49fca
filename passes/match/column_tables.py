"""How heads may lie among the columns of a projection."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from passes.dataflow import Array


def laid_out(features: int, heads: int, parts: int) -> Iterator[tuple[Array, ...]]:
    """`parts` tables of columns [heads, dim], as a projection may hold them within each other."""
    dim = features // (heads * parts)
    column = np.arange(features)
    laid = (
        column.reshape(parts, heads, dim),
        column.reshape(heads, parts, dim).swapaxes(0, 1),
        column.reshape(heads, dim, parts).transpose(2, 0, 1),
        column.reshape(parts, dim, heads).swapaxes(1, 2),
        column.reshape(dim, heads, parts).transpose(2, 1, 0),
    )
    seen: set[bytes] = set()
    for held in laid:
        if held.tobytes() not in seen:
            seen.add(held.tobytes())
            yield tuple(np.ascontiguousarray(t) for t in held)


def tables(features: int, heads: int, dim: int) -> Iterator[Array]:
    """Columns [heads, dim] of `heads` * `dim` features: head after head, or feature after feature."""
    column = np.arange(features)
    yield column.reshape(heads, dim)
    yield np.ascontiguousarray(column.reshape(dim, heads).T)
