"""A site's projection weights in canonical order, read from the program."""

from __future__ import annotations

import numpy as np

from passes.dataflow import Array, Flow
from passes.site import Operand


def operand_weight(flow: Flow, operand: Operand) -> Array:
    """[heads * dim, in]: rows of the projection that feed this operand, head-major."""
    weight = flow.value(operand.projection.weight)
    matrix = weight if operand.projection.out_first else weight.T
    return np.ascontiguousarray(matrix[operand.columns.reshape(-1)])


def operand_bias(flow: Flow, operand: Operand) -> Array | None:
    """[heads * dim], or None if the projection has no bias."""
    if operand.projection.bias is None:
        return None
    return np.ascontiguousarray(flow.value(operand.projection.bias).reshape(-1)[operand.columns.reshape(-1)])
