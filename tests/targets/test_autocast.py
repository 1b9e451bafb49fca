"""Modules that compute in bfloat16 under autocast on weights in float32: recorded as what they are, and rewritten."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from passes.match.attention import find_attention
from rewriter.capture.torch_export import capture, hides_attention
from tests.targets.lossless_twin import distance

WIDTH, HEADS, DIM, KEPT = 32, 4, 8, 2
ROUNDED, MOVED = 1e-2, 5e-2


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], WIDTH))


class Cast(nn.Module):
    """Two residual layers in a region of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attends(), Attends()])

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = x + layer(x)
        return x


def built(perturbed: bool = False) -> Cast:
    torch.manual_seed(0)
    module = Cast().eval()
    with torch.no_grad():
        for layer in module.layers:
            for tensor in (*layer.k.parameters(), *layer.v.parameters()):  # type: ignore[union-attr]
                groups = tensor.view(KEPT, HEADS // KEPT, DIM, *tensor.shape[1:])
                groups.copy_(groups[:, :1].clone().expand_as(groups))
        if perturbed:
            module.layers[0].v.weight[-DIM:] += 1.0  # type: ignore[union-attr, index, operator]
    return module


def features(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "control"])
@pytest.mark.parametrize("door", ["module", "program"])
@torch.no_grad()
def test_attention_under_autocast_is_rewritten(door: str, perturbed: bool) -> None:
    module, x = built(perturbed), features(6)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", max=64)},))
    assert hides_attention(program.graph_module)
    given = module if door == "module" else program
    assert len(rewriter.inspect(given, example_inputs=(x,)).sites) == 2
    small = rewriter.optimize(given, f"gqa{KEPT}", example_inputs=(x,))
    run = small if door == "module" else small.module()
    assert not any("keeps its own attention" in line for line in str(small.rewrite_report).splitlines())
    for tokens in (6, 9):
        moved = distance(run(features(tokens)), module(features(tokens)))
        assert moved > MOVED if perturbed else moved < ROUNDED


@torch.no_grad()
def test_what_is_computed_in_single_precision_is_held_to_it() -> None:
    """A site outside the region, whose values are off by what bfloat16 rounds, is refused as before."""

    class Rounds(Attends):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(q, k.bfloat16().float(), v)
            return self.o(mixed.transpose(1, 2).flatten(2))

    flow = capture(nn.Sequential(Rounds()).eval(), (features(6),), {}).flow
    assert "bfloat16" in flow.dtypes.values()
    (refusal,) = find_attention(flow).refusals
    assert "does not replay" in refusal.reason
