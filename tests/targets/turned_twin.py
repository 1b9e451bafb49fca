"""Twins whose key/value heads are turned copies of each other: lossless to merge, but not by averaging.

A zoo model's heads are made equal within groups (`lossless_twin.tied`), then each is turned by a rotation of its own,
undone in the queries and in the output projection. Rows and columns are found by matching; that a twin still computes
what the tied model did is checked where twins are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.dataflow import Array, Flow
from passes.match.attention import find_attention
from passes.site import AttentionSite, Operand
from rewriter.capture.example_inputs import prepare
from rewriter.capture.torch_export import capture
from tests.targets.lossless_twin import distance, tied
from tests.zoo.case import ZooCase


def turned(case: ZooCase, *, perturbed: bool = False) -> nn.Module:
    """The tied module with every key/value head turned; `perturbed` changes the last head's turn of the keys and of
    the values without undoing it.

    Fails if turning changed what the module computes.
    """
    module = tied(case).eval()
    inputs = case.inputs(2, 9, 0)
    before = case.run(module, inputs)
    args, kwargs = prepare(module, inputs)
    flow = capture(module, args, kwargs).flow
    generator = np.random.default_rng(5)
    done: set[str] = set()
    for site in find_attention(flow).sites:
        if site.k.projection.weight not in done:
            done.add(site.k.projection.weight)
            _turn(module, flow, site, generator)
    assert distance(before, case.run(module, inputs)) < 2e-4, "the twin does not compute what the model did"
    if perturbed:
        case.perturb(module)
    return module


def rotation(dim: int, partner: tuple[int, ...] | None, generator: np.random.Generator) -> Array:
    """A random orthogonal [dim, dim] matrix that commutes with the rotary embedding of these partners."""
    partners = tuple(range(dim)) if partner is None else partner
    matrix = np.zeros((dim, dim))
    free = [d for d in range(dim) if partners[d] == d]
    for d in (d for d in range(dim) if d < partners[d]):
        angle = generator.uniform(0.5, 5.5)
        where = np.ix_((d, partners[d]), (d, partners[d]))
        matrix[where] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    if free:
        matrix[np.ix_(free, free)] = np.linalg.qr(generator.normal(size=(len(free), len(free))))[0]
    return matrix


def _turn(module: nn.Module, flow: Flow, site: AttentionSite, generator: np.random.Generator) -> None:
    partner = None if site.k.rotary is None else site.k.rotary.partner
    normed = site.k.norm is not None or site.q.norm is not None
    for head in range(site.kv_heads):
        readers = [h for h in range(site.heads) if site.group[h] == head]
        if not normed:
            turn = rotation(site.head_dim, partner, generator)
            for operand, rows in ((site.k, [head]), (site.q, readers)):
                for row in rows:
                    _turn_rows(module, flow, operand, row, turn)
        if site.out is not None and site.v.norm is None:
            turn = rotation(site.value_dim, None, generator)
            _turn_rows(module, flow, site.v, head, turn)
            weight = _parameter(module, flow, site.out.weight)
            assert weight is not None
            matrix = weight if weight.shape[-1] == site.heads * site.value_dim else weight.t()
            if weight.shape[0] == weight.shape[1] and not site.out.out_first:
                matrix = _stored_out_first(weight, flow, site)
            for h in readers:
                part = matrix[:, h * site.value_dim : (h + 1) * site.value_dim]
                part.copy_(part @ torch.from_numpy(turn.T).to(part.dtype))


def _stored_out_first(weight: Tensor, flow: Flow, site: AttentionSite) -> Tensor:
    """[E, heads * dim] view of a square matrix, told by comparing with what the product reads."""
    assert site.out is not None
    read = torch.from_numpy(np.ascontiguousarray(flow.value(site.out.weight)))
    return weight.t() if torch.equal(read, weight) else weight


def _turn_rows(module: nn.Module, flow: Flow, operand: Operand, head: int, turn: Array) -> None:
    columns = torch.from_numpy(np.ascontiguousarray(operand.columns[head]))
    for tensor in _rows(module, flow, operand):
        part = tensor[columns]
        tensor[columns] = (torch.from_numpy(turn) @ part.double().reshape(len(columns), -1)).to(part).view(part.shape)


def _rows(module: nn.Module, flow: Flow, operand: Operand) -> Iterator[Tensor]:
    """The stored weight and bias as tensors whose first axis runs over output features."""
    weight = _parameter(module, flow, operand.projection.weight)
    assert weight is not None
    read = torch.from_numpy(np.ascontiguousarray(flow.value(operand.projection.weight)))
    as_read = weight if weight.shape == read.shape and torch.equal(weight, read) else weight.t()
    yield as_read if operand.projection.out_first else as_read.t()
    bias = None if operand.projection.bias is None else _parameter(module, flow, operand.projection.bias)
    if bias is not None:
        yield bias


def _parameter(module: nn.Module, flow: Flow, value: str) -> Tensor | None:
    """The module's own tensor behind a value of the program, through transpositions."""
    while value not in flow.weights:
        node = flow.producer(value)
        assert node is not None, value
        value = node.inputs[0]
    found: Any = dict([*module.named_parameters(), *module.named_buffers()]).get(flow.weights[value].name)
    return None if found is None else found.detach()
