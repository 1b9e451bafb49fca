"""Some features of a batch normalisation made neutral: what it multiplied them by goes into the projection before it.

For attentions that keep their forward and whose keys or values pass such a norm (`rewriter.capture.folded_norms` reads
the two as one map). The norm stays where it is: for these features it then multiplies by 1 and adds one stored number,
in eval mode. In training mode it normalises by the batch, as before, with the same spread and another mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.dataflow import Array, Flow, Value
from rewriter.errors import UnsupportedModel
from rewriter.install.repeated_projection import joined, parted
from rewriter.install.stored_weight import Location, locate

_VARIANCE = "running_var"


@dataclass(frozen=True)
class NormedColumns:
    """Columns of a projection's stored matrix, and the norm behind them.

    Attributes:
        matrix: where the columns are stored, before the norm.
        norm: path of the norm.
        channels: the norm's feature of each column, in the shape that was asked for.
    """

    matrix: Location
    norm: str
    channels: Array

    @property
    def bias(self) -> Location:
        """Where what is added to these features is stored, once they are neutral."""
        return Location(f"{self.norm}.bias", (0,), self.matrix.features, self.channels)


def normed_columns(flow: Flow, value: Value, axis: int, columns: Array) -> NormedColumns | None:
    """What a projection's matrix is made of, if it is a stored one times the factors of a norm; else None."""
    node = flow.producer(value)
    names = [flow.weights[v].name for v in flow.weights_above(value)]
    norms = [n.rpartition(".")[0] for n in names if n.rpartition(".")[2] == _VARIANCE]
    if node is None or node.op != "Mul" or len(norms) != 1:
        return None
    place = locate(flow, node.inputs[0], (axis,), columns)
    return None if place is None else NormedColumns(place, norms[0], columns)


def neutralise(model: nn.Module, found: Sequence[NormedColumns]) -> Callable[[], None]:
    """Move the factors of these features into the matrices, in place; what undoes it.

    Raises UnsupportedModel, the model unchanged, where a norm has no weight and bias of its own.
    """
    norms = {columns.norm: model.get_submodule(columns.norm) for columns in found}
    for path, norm in norms.items():
        if any(getattr(norm, name, None) is None for name in ("weight", "bias", "running_mean", _VARIANCE)):
            raise UnsupportedModel(f"{path} has no weight and bias to take what its projections' heads add")
    holders = [(model.get_submodule(c.matrix.key.rpartition(".")[0]), c) for c in found]
    before = [(module, dict(module._parameters), dict(module._buffers)) for module, _ in holders]
    before += [(module, dict(module._parameters), dict(module._buffers)) for module in norms.values()]
    for holder, columns in holders:
        _move(holder, norms[columns.norm], columns)

    def undo() -> None:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    return undo


def _move(holder: nn.Module, norm: Any, columns: NormedColumns) -> None:
    channels = _index(columns.channels, norm.weight)
    places = _index(columns.matrix.positions, norm.weight)
    name = columns.matrix.key.rpartition(".")[2]
    with torch.no_grad():
        factor = norm.weight[channels] * torch.rsqrt(norm.running_var[channels] + norm.eps)
        bias = getattr(holder, "bias", None)
        mean = norm.running_mean[channels] - (0 if bias is None else bias[places])
        added = norm.bias[channels] - mean * factor
        matrix, axes = getattr(holder, name).detach().clone(), columns.matrix.axes
        rows = joined(matrix, axes)
        rows[places] *= factor.view(-1, *[1] * (rows.dim() - 1))
        _put(holder, name, parted(rows, axes, [matrix.shape[axis] for axis in axes]))
        if bias is not None:
            _put(holder, "bias", bias.detach().index_fill(0, places, 0.0))
        variance = norm.weight[channels].square() - norm.eps
        variance = torch.where(variance > norm.eps, variance, 1.0 - norm.eps)  # a feature that was all but switched off
        _put(norm, _VARIANCE, norm.running_var.index_copy(0, channels, variance))
        _put(norm, "running_mean", norm.running_mean.index_fill(0, channels, 0.0))
        _put(norm, "weight", norm.weight.detach().index_copy(0, channels, (variance + norm.eps).sqrt()))
        _put(norm, "bias", norm.bias.detach().index_copy(0, channels, added))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    old = module._parameters.get(name)
    if old is None:
        module._buffers[name] = tensor
    else:
        module._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)


def _index(numbers: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers.reshape(-1))).to(like.device)
