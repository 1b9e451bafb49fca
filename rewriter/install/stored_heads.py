"""Where the heads of an attention whose forward is kept are stored, norms behind their projections seen through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from passes.dataflow import Array, Flow, Value
from passes.site import AttentionSite, Operand
from passes.weights.head_gains import gains_like
from rewriter.errors import UnsupportedModel
from rewriter.install.neutral_norm import NormedColumns, normed_columns
from rewriter.install.stored_weight import Location, locate

HINT = "rewrite its exported program instead: pass torch.export.export(model, ...)"


def stores_heads(flow: Flow, site: AttentionSite) -> bool:
    """Whether keys' and values' matrices are stored, so that a forward that stays can be given fewer of their rows."""
    shared = ((o, o.projection) for _, o in site.shared)
    return all(
        place_of(flow, o, p.weight, p.feature_axes(flow.shape(p.weight)), o.columns) is not None for o, p in shared
    )


def place_of(flow: Flow, operand: Operand, value: Value, axes: Sequence[int], columns: Array) -> Location | None:
    """Where columns of a matrix (which has axes of them) or of a bias are stored."""
    summed = [axis for axis in operand.projection.weight_axes or () if axis not in axes]
    if axes and summed != sorted(summed):
        return None  # rows of its matrix run otherwise than what is stored
    place = locate(flow, value, axes, columns)
    if place is None and (normed := norm_behind(flow, operand)) is not None:
        return normed.matrix if axes else normed.bias
    return place


def parts_of(flow: Flow, operand: Operand) -> tuple[tuple[str, Value | None, tuple[int, ...], Array], ...]:
    """What `place_of` is asked for an operand's matrix and bias, named."""
    projection = operand.projection
    axes = projection.feature_axes(flow.shape(projection.weight))
    return (
        ("weight", projection.weight, axes, operand.columns),
        ("bias", projection.bias, (), projection.bias_positions(operand.columns)),
    )


def norm_behind(flow: Flow, operand: Operand) -> NormedColumns | None:
    """The batch norm that is read as a part of an operand's projection, None if there is none."""
    projection = operand.projection
    return normed_columns(flow, projection.weight, 0 if projection.out_first else -1, operand.columns)


def gains_place(
    flow: Flow, operand: Operand, value: Value, numbers: Array, heads: int
) -> tuple[Location, Array, Array]:
    """Where what a norm multiplies heads by is stored, the columns there by head, and what becomes of them; `numbers`
    [heads * dim]. Raises UnsupportedModel."""
    shape = flow.shape(value)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    by_head = len(long) > 1  # heads and features have an axis each
    place = locate(flow, value, long[:1] if by_head else ())
    if place is None or operand.norm is None or operand.norm.gains is None:
        raise UnsupportedModel("what a norm multiplies its heads by is computed, not stored", hint=HINT)
    where = np.arange(operand.heads)[:, None] if by_head else operand.norm.gains.places
    rows = gains_like(operand, numbers, shape).reshape(heads, -1) if by_head else numbers
    return place, place.positions[where], rows


def is_parameter(model: nn.Module, key: str) -> bool:
    return any(name == key for name, _ in model.named_parameters(remove_duplicate=False))


def parameter_at(model: nn.Module, key: str) -> nn.Parameter:
    """The parameter with this key; raises UnsupportedModel if it is none."""
    path, _, name = key.rpartition(".")
    try:
        found = model.get_submodule(path)._parameters.get(name)
    except AttributeError:
        found = None
    if found is None:
        raise UnsupportedModel(f"{key} is no parameter of the module", hint=HINT)
    return found
