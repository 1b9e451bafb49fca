"""A site's projection weights in canonical order, read from the program."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array, Flow
from passes.site import AttentionSite, Operand

_BLOCK = 128


def operand_weight(flow: Flow, operand: Operand) -> Array:
    """[heads * dim, in]: rows of the projection that feed this operand, head-major."""
    weight, rows = _matrix(flow, operand), operand.columns.reshape(-1)
    return np.ascontiguousarray(weight[rows]) if operand.projection.out_first else transposed(weight, rows)


def operand_rows(flow: Flow, operand: Operand) -> Array:
    """As `operand_weight`, where it lies: not copied if the operand's features are one run of the projection's."""
    weight, rows = _matrix(flow, operand), operand.columns.reshape(-1)
    matrix = weight if operand.projection.out_first else weight.T
    run = slice(int(rows[0]), int(rows[0]) + len(rows))
    return matrix[run] if np.array_equal(rows, np.arange(run.start, run.stop)) else operand_weight(flow, operand)


def _matrix(flow: Flow, operand: Operand) -> Array:
    return operand.projection.matrix(flow.value(operand.projection.weight))


def transposed(matrix: Array, columns: Array) -> Array:
    """``matrix.T[columns]`` in one piece; block by block, since a stride as long as a row misses every cache."""
    made = np.empty((len(columns), len(matrix)), matrix.dtype)
    for i in range(0, len(matrix), _BLOCK):
        band = matrix[i : i + _BLOCK]
        for j in range(0, len(columns), _BLOCK):
            made[j : j + _BLOCK, i : i + _BLOCK] = band[:, columns[j : j + _BLOCK]].T
    return made


def operand_bias(flow: Flow, operand: Operand) -> Array | None:
    """[heads * dim], or None if the projection has no bias."""
    if operand.projection.bias is None:
        return None
    positions = operand.projection.bias_positions(operand.columns)
    return np.ascontiguousarray(flow.value(operand.projection.bias).reshape(-1)[positions.reshape(-1)])


@dataclass(frozen=True)
class SiteWeights:
    """All weights of one attention, float64, head by head, each bias as the last column (zeros where there is none).

    Attributes:
        q: [H, D, n + 1], k: [N, D, n' + 1], v: [N, Dv, n'' + 1].
        out: [H, E, Dv], None if no output projection reads the merged heads in order.
        out_bias: [E], None if the output projection has none.
    """

    q: Array
    k: Array
    v: Array
    out: Array | None
    out_bias: Array | None


def site_weights(flow: Flow, site: AttentionSite) -> SiteWeights:
    """Read a site's weights. Raises KeyError if one of them is not stored in the program."""
    q, k, v = (_homogeneous(flow, o) for o in (site.q, site.k, site.v))
    if site.out is None or not merges_in_order(flow, site):
        return SiteWeights(q, k, v, None, None)
    weight = np.asarray(site.out.matrix(flow.value(site.out.weight)), dtype=np.float64)
    matrix = weight if site.out.out_first else weight.T
    bias = None if site.out.bias is None else np.asarray(flow.value(site.out.bias), dtype=np.float64).reshape(-1)
    return SiteWeights(q, k, v, matrix.reshape(len(matrix), site.heads, -1).transpose(1, 0, 2), bias)


def merges_in_order(flow: Flow, site: AttentionSite) -> bool:
    """Whether the output projection reads the heads' features one head after the other, told from the recording."""
    return bool(merge_orders(flow, site))


def merge_orders(flow: Flow, site: AttentionSite) -> frozenset[str]:
    """How the rows run that the output projection reads: over "batch" first, over "tokens" first, both (where one of
    them is of size 1), or neither (features are not in the order of heads, or values were not recorded). Of blocks of
    tokens only that their rows are among those of the heads is told: "blocks"."""
    if site.merged is None or site.out is None:
        return frozenset()
    try:
        output, merged = flow.value(site.output), flow.value(site.merged)
    except KeyError:
        return frozenset()
    width = site.heads * site.value_dim
    if merged.shape[-1] != width and merged.shape[-2:] != (site.heads, site.value_dim):
        return frozenset()
    if site.output_axes == ("b", "s", "hd"):
        by_token = output
    elif site.output_axes == ("bh", "s", "d"):
        by_token = output.reshape(-1, site.heads, *output.shape[1:]).transpose(0, 2, 1, 3)
    elif sorted(site.output_axes) == sorted("bhsd"):
        by_token = output.transpose([site.output_axes.index(a) for a in "bshd"])
    elif site.by_blocks and sorted({*site.output_axes}) == sorted("bhsd") and site.output_axes.count("b") == 2:
        first = [a for a, name in enumerate(site.output_axes) if name == "b"]
        order = [*first, *(site.output_axes.index(a) for a in "shd")]
        heads = {row.tobytes() for row in np.ascontiguousarray(output.transpose(order)).reshape(-1, width)}
        read = {row.tobytes() for row in np.ascontiguousarray(merged).reshape(-1, width)}
        return frozenset({"blocks"} if read <= heads else ())
    else:
        return frozenset()
    rows = merged.reshape(-1, width)
    wanted = {"batch": by_token, "tokens": by_token.swapaxes(0, 1)}
    return frozenset(
        name for name, w in wanted.items() if np.array_equal(w.reshape(-1, rows.shape[-1]), rows, equal_nan=True)
    )


def _homogeneous(flow: Flow, operand: Operand) -> Array:
    """[heads, dim, in + 1]."""
    weight, bias = operand_weight(flow, operand), operand_bias(flow, operand)
    column = np.zeros(len(weight)) if bias is None else np.asarray(bias, dtype=np.float64)
    joined = np.concatenate([np.asarray(weight, dtype=np.float64), column[:, None]], axis=1)
    return joined.reshape(operand.heads, operand.dim, -1)
