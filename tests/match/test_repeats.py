"""Layers that repeat are read once: renamed descriptions are those read anew, and only where they may be."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from passes.dataflow import Flow
from passes.match import feed_forward_activation, repeats
from passes.match.attention import find_attention, match_anchor
from passes.match.feed_forward import find_feed_forward
from passes.provenance import Tracer
from passes.site import AttentionSite, Operand, Projection
from rewriter.capture import torch_export
from tests.match.doors import through_torch
from tests.zoo.models import ZOO

REPEATING = ("llama-sdpa", "gpt2-sdpa", "bert-sdpa", "t5-eager", "gpt-neox-sdpa")
"""Rotary, packed, separate, two stacks, interleaved: each has two layers of a kind."""


@pytest.mark.parametrize("name", REPEATING)
def test_a_renamed_description_is_what_is_read_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _counted(monkeypatch, repeats, "trace_operand")
    seen = through_torch(ZOO[name])
    assert len(calls) < 3 * len(seen.matches.sites), "nothing was taken from another layer"
    assert len(seen.matches.sites) == ZOO[name].sites
    for site in seen.matches.sites:
        anchor = seen.flow.nodes[site.anchor]
        anew, _ = match_anchor(Tracer(seen.flow), anchor, site.name, site.layer)
        assert _same(site, anew)


def test_the_comparison_sees_a_name_a_column_and_a_node() -> None:
    site = through_torch(ZOO["llama-sdpa"]).matches.sites[0]
    assert _same(site, replace(site))
    for other in (
        replace(site.k, stem="another"),
        replace(site.k, columns=site.k.columns[:, ::-1]),
        replace(site.k, path=site.k.path[1:]),
    ):
        assert not _same(site, replace(site, k=other))


class _Layers(nn.Module):
    """Attentions; `orders` is how features of queries and keys are arranged in each, `angles` what turns them."""

    def __init__(self, orders: list[list[int]], angles: list[float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.orders, self.angles = orders, angles
        self.packed = nn.ModuleList(nn.Linear(16, 48) for _ in angles)
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in angles)

    def forward(self, x: Tensor) -> Tensor:
        for packed, out, order, angle in zip(self.packed, self.out, self.orders, self.angles, strict=True):
            q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in packed(x).chunk(3, -1))
            q, k = (self._turned(t, angle)[..., order] for t in (q, k))
            x = x + out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x

    def _turned(self, x: Tensor, angle: float) -> Tensor:
        turn = angle * torch.arange(x.shape[-2])[:, None] / torch.tensor([1.0, 3.0])
        cos, sin = turn.cos().repeat(1, 2), turn.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin


ORDER, OTHER_ORDER = [0, 1, 2, 3], [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("orders", "angles", "read"),
    [
        pytest.param([ORDER, ORDER], [1.0, 1.0], 3, id="alike"),
        pytest.param([ORDER, OTHER_ORDER], [1.0, 1.0], 5, id="rearranged"),
        pytest.param([ORDER, ORDER], [1.0, 0.5], 5, id="turned-by-other-angles"),
    ],
)
def test_layers_that_differ_are_read_each_by_itself(
    orders: list[list[int]], angles: list[float], read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are alike everywhere; queries and keys are where arrangement and angles are."""
    flow = _flow(_Layers(orders, angles))
    calls = _counted(monkeypatch, repeats, "trace_operand")
    sites = find_attention(flow).sites
    assert len(sites) == 2
    assert len(calls) == read
    for site in sites:
        anew, _ = match_anchor(Tracer(flow), flow.nodes[site.anchor], site.name, site.layer)
        assert _same(site, anew)


class _Blocks(nn.Module):
    def __init__(self, slopes: tuple[float, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.slopes = slopes
        self.up = nn.ModuleList(nn.Linear(8, 24) for _ in slopes)
        self.down = nn.ModuleList(nn.Linear(24, 8) for _ in slopes)

    def forward(self, x: Tensor) -> Tensor:
        for up, down, slope in zip(self.up, self.down, self.slopes, strict=True):
            h = up(x)
            x = x + down(h * torch.sigmoid(slope * h))
        return x


@pytest.mark.parametrize(
    ("slopes", "names", "read"),
    [
        pytest.param((1.0, 1.0, 1.0), ["silu"] * 3, 1, id="alike"),
        pytest.param((1.0, 1.702, 1.0), ["silu", "gelu_quick", "silu"], 2, id="another-constant"),
    ],
)
def test_an_activation_is_read_once_for_blocks_that_are_alike(
    slopes: tuple[float, ...], names: list[str], read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = _flow(_Blocks(slopes), width=8)
    calls = _counted(monkeypatch, feed_forward_activation, "_read_activation")
    found = find_feed_forward(flow)
    assert [s.activation.name for s in found.sites] == names
    assert len(calls) == read


def test_an_activation_without_a_name_is_each_blocks_own() -> None:
    flow = _flow(_Blocks((0.3, 0.3)), width=8)
    sites = find_feed_forward(flow).sites
    x = np.linspace(-3, 3, 7, dtype=np.float32)
    assert [s.activation.name for s in sites] == [None, None]
    for site in sites:
        assert site.activation.of is not None
        assert np.allclose(site.activation.of(x), x / (1 + np.exp(-0.3 * x)), atol=1e-6)


def _flow(module: nn.Module, width: int = 16) -> Flow:
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    return torch_export.capture(module.eval(), (x,), {}).flow


def _counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    calls: list[str] = []
    real = getattr(module, name)

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(name)
        return real(*args, **more)

    monkeypatch.setattr(module, name, counted)
    return calls


def _same(a: Any, b: Any) -> bool:
    """Equal in every field, arrays by their numbers."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, (AttentionSite, Operand, Projection)):
        return type(a) is type(b) and all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)
