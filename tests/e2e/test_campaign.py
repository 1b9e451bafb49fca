"""Random architectures through both doors; `python -m benchmarks.campaign` runs hundreds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import rewriter
from benchmarks import campaign
from benchmarks.campaign import export
from benchmarks.random_attention import Net, draw, inputs

SEEDS = range(1000, 1030)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SEEDS.start, SEEDS.stop, 5), ids=lambda seed: f"seed {seed}")
def test_architectures_come_through_both_doors_alike(first: int) -> None:
    outcomes = [campaign.run(seed) for seed in range(first, first + 5)]
    assert not [f"{o.problem}: {o.architecture}" for o in outcomes if o.problem]
    assert sum(o.torch.status == "rewritable" for o in outcomes) >= 2, "most architectures are no refusals"


@pytest.mark.parametrize("seed", [358, 405])
def test_numbers_behind_a_norm_that_are_alike_for_all_heads_become_those_of_one(seed: int) -> None:
    """A gain [heads, dim] of equal rows stayed as it was in files, and made as many heads again of one."""
    outcome = campaign.run(seed)
    assert outcome.architecture.norm == "own rms" and outcome.onnx.status == "rewritable" and not outcome.problem


@pytest.mark.parametrize(("seed", "odd"), [(6, "content"), (7, "mixed")])
def test_both_doors_refuse_alike(seed: int, odd: str) -> None:
    outcome = campaign.run(seed)
    assert outcome.architecture.odd == odd and outcome.torch.status == "refused" and not outcome.problem
    plain = replace(outcome.architecture, odd="")
    assert campaign.in_torch(plain).status == campaign.in_file(plain).status == "rewritable"
    taken = replace(
        outcome, torch=campaign.Finding("rewritable", "", 0.0, 0.0), onnx=campaign.Finding("rewritable", "", 0.0, 0.0)
    )
    assert "odd" in campaign.problem(taken)


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
            plain, pooled = (y if isinstance(y, torch.Tensor) else y[0] for y in (plain, pooled))
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


def test_scores_that_sinks_were_expanded_after_do_not_stay(tmp_path: Path) -> None:
    """Seed 43 reads the shape of its scores for its sinks; with a narrower cache the old scores do not even run."""
    a = replace(draw(43), odd="")
    assert a.sinks and a.cached
    export(a, Net(a).eval(), tmp_path / "in.onnx")
    rewriter.optimize(tmp_path / "in.onnx", "mqa").save(tmp_path / "out.onnx")

    def fed(path: Path) -> int:
        """Products of two computed values."""
        graph = onnx.load(path).graph
        constants = {t.name for t in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
        return sum(n.op_type == "MatMul" and not constants.intersection(n.input) for n in graph.node)

    assert (fed(tmp_path / "in.onnx"), fed(tmp_path / "out.onnx")) == (4, 0)
