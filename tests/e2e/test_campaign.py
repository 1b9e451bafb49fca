"""Random architectures through both doors; `python -m benchmarks.campaign` runs hundreds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import campaign
from benchmarks.random_attention import Net, draw, inputs

SEEDS = range(1000, 1030)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SEEDS.start, SEEDS.stop, 5), ids=lambda seed: f"seed {seed}")
def test_architectures_come_through_both_doors_alike(first: int) -> None:
    outcomes = [campaign.run(seed) for seed in range(first, first + 5)]
    assert not [f"{o.problem}: {o.architecture}" for o in outcomes if o.problem]
    assert sum(o.torch.status == "rewritable" for o in outcomes) >= 2, "most architectures are no refusals"


def test_seeds_differ_and_repeat() -> None:
    drawn = [draw(seed) for seed in range(50)]
    assert len({replace(a, seed=0) for a in drawn}) > 45
    assert drawn == [draw(seed) for seed in range(50)]


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_pooled_heads_are_another_function(seed: int) -> None:
    """The control of both comparisons: equal heads compute something else than the original."""
    a = draw(seed)
    given = inputs(a, 2, 9)
    with torch.no_grad():
        plain = Net(a).eval()(**given)
        for mean in (False, True):
            pooled = Net(a).eval().pool(a.pooled_counts()[0], mean=mean)(**given)
            assert (pooled - plain).abs().max() > 100 * campaign.LIMIT * plain.abs().max()


def test_problems_are_told() -> None:
    a = draw(0)
    fine = campaign.Finding("rewritable", "", 1e-7, 1e-7)
    refused = campaign.Finding("refused", "a reason")

    def told(here: campaign.Finding, there: campaign.Finding) -> str:
        return campaign.problem(campaign.Outcome(a, here, there))

    assert told(fine, fine) == told(refused, refused) == ""
    assert "refused" in told(fine, refused) and "another" in told(refused, replace(refused, reason="another"))
    assert "onnx twin" in told(fine, replace(fine, twin=1e-3))
    assert "torch pooled" in told(replace(fine, pooled=float("nan")), fine)
    assert "nothing" in told(*(campaign.Finding("not found", "nothing"),) * 2)
