"""The parameters of a site as its module holds them, and those that a replacement brings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from passes.dataflow import Array, Flow, Value
from passes.site import AttentionSite, Operand
from passes.targets.replacement import Replacement
from passes.weights.head_gains import gains_like, stored_gains
from passes.weights.projection import merges_in_order
from rewriter.errors import UnsupportedModel
from rewriter.install.mixer import MixerParameters
from rewriter.install.stored_weight import parameter_of


def original_parameters(module: torch.nn.Module, flow: Flow, site: AttentionSite, owner: str) -> MixerParameters:
    """Matrices [features, hidden] and biases [features] of a site: the module's own parameters where those are all this
    site's, else what is cut out of them; the output projection where the owner holds it bare."""
    tensors: dict[str, Any] = {}
    for role, operand in (("q", site.q), ("k", site.k), ("v", site.v)):
        tensors[f"{role}_weight"] = _rows(module, flow, operand, operand.projection.weight, True)
        bias = operand.projection.bias
        tensors[f"{role}_bias"] = None if bias is None else _rows(module, flow, operand, bias, False)
    return MixerParameters(**tensors, **_bare_output(module, flow, site, owner))


def _bare_output(module: torch.nn.Module, flow: Flow, site: AttentionSite, owner: str) -> dict[str, torch.Tensor]:
    """The output projection where the owner holds it as bare parameters; empty where it is a module, or outside."""
    out = site.out
    if out is None or submodule_path(flow, site, owner, "out") is not None or not merges_in_order(flow, site):
        return {}
    names = [flow.weights[v].name for v in flow.weights_above(out.weight)]
    if not names or not all(n.rpartition(".")[0] == owner for n in names):
        return {}
    matrix = np.asarray(out.matrix(flow.value(out.weight)))
    found = {"out_weight": matrix if out.out_first else matrix.T}
    if out.bias is not None:
        found["out_bias"] = np.asarray(flow.value(out.bias)).reshape(-1)
    like = _placed_like(module, flow, out.weight)
    return {name: _like(array, like) for name, array in found.items()}


def _rows(module: torch.nn.Module, flow: Flow, operand: Operand, value: str, matrix: bool) -> torch.Tensor:
    """The projection's own parameter where all of it is this operand's, else the rows that are."""
    weight = flow.weights.get(value)
    tensor = _parameter(module, weight.name) if weight is not None else None
    if tensor is None or (matrix and operand.projection.weight_axes is not None):
        # computed from stored ones, as a slice of a packed matrix is, or a stack of matrices
        numbers = operand.projection.matrix(flow.value(value)) if matrix else flow.value(value)
        tensor = _like(numbers, _placed_like(module, flow, value))
    if matrix and not operand.projection.out_first:
        tensor = tensor.detach().t()
    elif whole_key(flow, operand) is not None and (matrix or operand.projection.bias_index is None):
        return tensor
    columns = operand.columns if matrix else operand.projection.bias_positions(operand.columns)
    index = torch.from_numpy(np.ascontiguousarray(columns.reshape(-1)))
    tensor = tensor if matrix else tensor.reshape(-1)
    return tensor.detach()[index.to(tensor.device)].contiguous()


def new_parameters(before: MixerParameters, replacement: Replacement) -> MixerParameters:
    """Parameters that the replacement changes new, in the old dtype and on the old device; the others as they were."""
    changed: dict[str, Any] = {}
    parts = ("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "out_weight", "out_bias")
    for name in parts:
        old = getattr(before, name)
        if old is not None and name in replacement.tensors:
            changed[name] = _like(replacement.tensors[name], old)
    return replace(before, **changed)


def output_writes(
    module: torch.nn.Module, flow: Flow, replacement: Replacement
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, its new content) of an output projection that changes; it keeps its shape and stays where it is.

    Raises UnsupportedModel if it is no stored parameter.
    """
    out = replacement.site.out
    writes = []
    for part, value in () if out is None else (("weight", out.weight), ("bias", out.bias)):
        array = replacement.tensors.get(f"out_{part}")
        if array is None or value is None or out is None:
            continue
        weight = flow.weights.get(value)
        parameter = None if weight is None else _parameter(module, weight.name)
        if parameter is None:
            raise UnsupportedModel(f"the output projection's {part} is computed, not stored, so it cannot be replaced")
        new = _like(array if part == "bias" else out.stored(array, flow.shape(value)), parameter)
        writes.append((parameter, new.view_as(parameter)))
    return writes


def write_outputs(writes: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write, in place, what `output_writes` gave."""
    with torch.no_grad():
        for parameter, content in writes:
            parameter.copy_(content)


def new_gains(module: torch.nn.Module, flow: Flow, replacement: Replacement, owner: str) -> dict[str, torch.Tensor]:
    """New numbers that norms multiply heads by, by the parameter's path from the owner, shaped as that is but for the
    number of heads. Raises UnsupportedModel if they are no parameters of the owner."""
    found: dict[str, torch.Tensor] = {}
    for role, operand in (("k", replacement.site.k), ("v", replacement.site.v)):
        for part, value in stored_gains(operand).items():
            weight = parameter_of(flow, value)
            parameter = None if weight is None else _parameter(module, weight.name)
            inside = weight is not None and weight.name.startswith(f"{owner}.")
            if weight is None or parameter is None or not inside or parameter.shape != flow.shape(value):
                raise UnsupportedModel("what a norm multiplies its heads by is computed, not stored in the module")
            numbers = gains_like(operand, replacement.tensors[f"{role}_{part}"], flow.shape(value))
            found[weight.name.removeprefix(f"{owner}.")] = _like(numbers, parameter)
    return found


def replacement_tensors(replacement: Replacement) -> dict[str, torch.Tensor]:
    """What a replacement brings, by name, as arrays of its own dtypes."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in replacement.tensors.items()}


def whole_key(flow: Flow, operand: Operand) -> str | None:
    """State-dict key of a projection that feeds this operand alone and in order, else None."""
    weight = flow.weights.get(operand.projection.weight)
    whole = operand.columns.size == operand.projection.features
    in_order = np.array_equal(operand.columns.reshape(-1), np.arange(operand.columns.size))
    return weight.name if weight is not None and whole and in_order and operand.projection.out_first else None


def submodule_path(flow: Flow, site: AttentionSite, owner: str, role: str) -> str | None:
    """Path, from the owner, of the module that projects the output or normalises an operand; None if it has none."""
    if role == "out":
        above = () if site.out is None else flow.weights_above(site.out.weight)
        path = _holder([name for v in above if (name := flow.weights[v].name)])
    else:
        norm = site.q.norm if role == "q" else site.k.norm
        node = flow.producer(norm.output) if norm is not None else None
        path = node.owner if node is not None else ""
    inside = path.startswith(f"{owner}.") if owner else bool(path)
    return path[len(owner) + 1 if owner else 0 :] if inside else None


def _holder(keys: Sequence[str]) -> str:
    """Path of the innermost module that holds all these parameters, be they adapters' or parametrizations'."""
    levels = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    shared = (level[0] for level in itertools.takewhile(lambda level: len({*level}) == 1, levels))
    return ".".join(itertools.takewhile(lambda step: step != "parametrizations", shared))


def _parameter(module: torch.nn.Module, key: str) -> torch.Tensor | None:
    path, _, name = key.rpartition(".")
    try:
        found = getattr(module.get_submodule(path), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _placed_like(module: torch.nn.Module, flow: Flow, value: Value) -> torch.Tensor:
    """An empty tensor of the type that the program computes a weight in, where the module's parameters are."""
    return next(module.parameters()).new_empty(0, dtype=getattr(torch, flow.dtypes.get(value, flow.dtype)))


def _like(array: Array, old: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype=old.dtype, device=old.device)
