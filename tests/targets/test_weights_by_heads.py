"""Weights with axes for heads, or for queries, keys and values, in modules and exported programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from tests.targets.lossless_twin import distance

WIDTH, HEADS, DIM, KEPT = 32, 4, 8, 2
EXACT, MOVED = 1e-4, 1e-3
Project = Callable[[Tensor, Tensor], Tensor]

BY_HEAD: dict[str, Project] = {
    "einsum": lambda x, w: torch.einsum("bpd,ndh->bnph", x, w),
    "product": lambda x, w: x[:, None] @ w,
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([2], [1])).transpose(1, 2),
    "flattened": lambda x, w: F.linear(x, w.transpose(1, 2).flatten(0, 1)).unflatten(-1, (HEADS, DIM)).transpose(1, 2),
}
PACKED: dict[str, Project] = {
    "einsum": lambda x, w: torch.einsum("btd,cde->cbte", x, w),
    "product": lambda x, w: x[None] @ w[:, None],
    "flattened": lambda x, w: F.linear(x, w.transpose(1, 2).flatten(0, 1)).unflatten(-1, (3, WIDTH)).movedim(-2, 0),
    "indexed": lambda x, w: torch.stack([F.linear(x, part.T) for part in w]),
}


class ByHead(nn.Module):
    """Weights ``[heads, width, features]``, biases ``[heads, features]``; the output sums over heads and features."""

    def __init__(self, project: Project) -> None:
        super().__init__()
        self.project = project
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.randn(HEADS, WIDTH, DIM) / WIDTH**0.5) for _ in "qkv")
        self.b_q, self.b_k, self.b_v = (nn.Parameter(torch.randn(HEADS, DIM)) for _ in "qkv")
        self.w_o = nn.Parameter(torch.randn(HEADS, DIM, WIDTH) / WIDTH**0.5)

    def by_head(self) -> list[Tensor]:
        return [self.w_k, self.w_v, self.b_k, self.b_v]

    def forward(self, x: Tensor) -> Tensor:
        pairs = ((self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, self.b_v))
        q, k, v = (self.project(x, w) + b[:, None] for w, b in pairs)
        mixed = (q @ k.transpose(-1, -2) * DIM**-0.5).softmax(-1) @ v
        return torch.einsum("bqnh,nhd->bqd", mixed.transpose(1, 2), self.w_o)


class Packed(nn.Module):
    """One weight ``[3, width, width]`` for queries, keys and values."""

    def __init__(self, project: Project) -> None:
        super().__init__()
        self.project = project
        self.qkv = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def by_head(self) -> list[Tensor]:
        return [part.view(WIDTH, HEADS, DIM).movedim(1, 0) for part in self.qkv[1:]]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.project(x, self.qkv))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


CASES = [*((ByHead, p) for p in BY_HEAD.values()), *((Packed, p) for p in PACKED.values())]
IDS = [*(f"by head, {n}" for n in BY_HEAD), *(f"packed, {n}" for n in PACKED)]


def built(kind: type[ByHead] | type[Packed], project: Project, perturbed: bool = False) -> nn.Sequential:
    """Two layers whose key and value heads are equal within two groups; `perturbed`: but for one head."""
    torch.manual_seed(0)
    module = nn.Sequential(kind(project), kind(project)).eval()
    with torch.no_grad():
        for view in (v for layer in module for v in layer.by_head()):  # type: ignore[union-attr, operator]
            groups = view.unflatten(0, (KEPT, -1))
            groups.copy_(groups[:, :1].clone().expand_as(groups))
        if perturbed:
            module[1].by_head()[0][-1] += 1.0  # type: ignore[union-attr, operator]
    return module


def features(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


def numbers(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize(("kind", "project"), CASES, ids=IDS)
@torch.no_grad()
def test_weights_with_more_than_two_axes_are_rewritten(kind: type[ByHead] | type[Packed], project: Project) -> None:
    module, x = built(kind, project), features(6)
    saved = 2 * sum(v.numel() for v in module[0].by_head()) // 2  # type: ignore[union-attr, operator]
    small = rewriter.optimize(module, "gqa2", example_inputs=(x,))
    program = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", max=64)},))
    graph = rewriter.optimize(program, "gqa2")
    for held in (small.state_dict(), graph.state_dict):
        assert numbers(held) == numbers(module.state_dict()) - saved
    for length in (6, 9):
        expected = module(features(length))
        assert distance(small(features(length)), expected) < EXACT
        assert distance(graph.module()(features(length)), expected) < EXACT


@torch.no_grad()
def test_heads_of_a_stack_that_differ_are_merged_and_that_shows() -> None:
    module, x = built(ByHead, BY_HEAD["product"], perturbed=True), features(6)
    assert distance(rewriter.optimize(module, "gqa2", example_inputs=(x,))(x), module(x)) > MOVED


@pytest.mark.parametrize("name", ["product", "einsum"])
@torch.no_grad()
def test_a_rewritten_stack_is_saved_and_read(name: str, tmp_path: Path) -> None:
    x = features(6)
    small = rewriter.optimize(built(ByHead, BY_HEAD[name]), "gqa2", example_inputs=(x,))
    rewriter.save(small, tmp_path / "small")
    again = rewriter.load(tmp_path / "small", module=nn.Sequential(*(ByHead(BY_HEAD[name]) for _ in range(2))).eval())
    assert distance(again(x), small(x)) == 0


@torch.no_grad()
def test_an_output_projection_of_bare_parameters_goes_into_the_generated_module() -> None:
    module, x = built(ByHead, BY_HEAD["einsum"]), features(6)
    assert distance(rewriter.optimize(module, "window:64", example_inputs=(x,))(x), module(x)) < EXACT
    merged = rewriter.optimize(module, "gqa2", example_inputs=(x,), calibration=[{"x": features(24)}])
    assert distance(merged(x), module(x)) < MOVED
