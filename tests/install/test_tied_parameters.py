"""Layers that share parameters, each in a module of its own, are refused as modules and rewritten as programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rewriter
from tests.targets.head_norms import Normed
from tests.targets.lossless_twin import distance


def model(*, tied: bool) -> nn.Sequential:
    layers = nn.Sequential(Normed("without-gain"), Normed("without-gain"))
    first, second = layers
    with torch.no_grad():
        for projection in (first.k_proj, first.v_proj):  # type: ignore[union-attr]
            for parameter in projection.parameters():  # type: ignore[union-attr]
                by_group = parameter.view(2, 2, 8, -1)
                by_group[:, 1] = by_group[:, 0]
    second.load_state_dict(first.state_dict())
    if tied:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(second, name).weight = getattr(first, name).weight
    return layers.eval()


def features(tokens: int = 6) -> Tensor:
    return torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(3))


def test_tied_modules_are_refused_and_others_are_not() -> None:
    seen = rewriter.inspect(model(tied=True), example_inputs=(features(),))
    said = ["tied parameters: 0.k_proj.weight, 1.k_proj.weight" in r.reason for r in seen.refusals]
    assert not seen.sites and said == [True, True]
    with pytest.raises(rewriter.NothingToRewrite, match="tied parameters"):
        rewriter.optimize(model(tied=True), "gqa2", example_inputs=(features(),))
    assert len(rewriter.inspect(model(tied=False), example_inputs=(features(),)).sites) == 2


def test_their_program_is_rewritten_once_and_stays_tied() -> None:
    original = model(tied=True)
    sizes = {1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(original, (features(),), dynamic_shapes=(sizes,))
    small = rewriter.optimize(program, "gqa2")
    assert [row.exact for row in small.rewrite_report.sites] == [True, True]
    with torch.no_grad():
        assert distance(original(features(9)), small.module()(features(9))) < 1e-5
    weights = {id(p) for p in small.parameters() if tuple(p.shape) == (16, 32)}
    assert len(weights) == 2  # keys and values, once each
