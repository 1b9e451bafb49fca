"""Key/value heads grouped by similarity: twins whose equal heads are no neighbours, through both doors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import rewriter
from passes.targets import GroupedQuery
from rewriter.cli import run
from tests.targets.lossless_twin import distance, legal_pool, run_file, twin_file
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

SIMILAR = GroupedQuery(2, "joint", "similar")
NEIGHBOURS = GroupedQuery(2, "joint")
NAMES = ("bert-sdpa", "gpt2-sdpa", "llama-sdpa", "whisper-sdpa")


def scattered(case: ZooCase) -> nn.Module:
    """Key/value heads A B A B: equal in pairs that are no neighbours."""
    module = case.build().eval()
    assert case.kv_heads == 4
    case.tie(module, legal_pool(case))
    with torch.no_grad():
        for view in case.head_views(module):
            view[[1, 2]] = view[[2, 1]]
    return module


@pytest.mark.parametrize("name", NAMES)
def test_equal_heads_find_each_other(name: str) -> None:
    case = ZOO[name]
    model, example, fresh = scattered(case), case.inputs(2, 9, 0), case.inputs(3, 7, 4)
    before = case.run(model, fresh)
    small = rewriter.optimize(model, SIMILAR, example_inputs=example)
    assert all(row.exact for row in small.rewrite_report.sites)
    assert distance(before, case.run(small, fresh)) < 1e-4
    control = rewriter.optimize(model, NEIGHBOURS, example_inputs=example)
    assert not any(row.exact for row in control.rewrite_report.sites)
    assert distance(before, case.run(control, fresh)) > 1e-2


@pytest.mark.parametrize("name", ["bert-sdpa", "llama-sdpa"])
def test_a_file_keeps_what_it_computes(name: str, zoo_onnx: Callable[..., Path], tmp_path: Path) -> None:
    case, fresh = ZOO[name], ZOO[name].inputs(2, 8, 3)
    twin = twin_file(case, zoo_onnx(case, "torchscript17"), tmp_path / "twin.onnx", module=scattered(case))
    command = ["rewrite", str(twin), str(tmp_path / "small.onnx"), "-t", "gqa2", "--merge", "joint"]
    assert run([*command, "--grouping", "similar"]) == 0
    before = run_file(twin, fresh)
    assert distance(torch.tensor(before), torch.tensor(run_file(tmp_path / "small.onnx", fresh))) < 1e-4
    assert rewriter.verify(tmp_path / "small.onnx", twin).ok
    assert run([*command, "--grouping", "contiguous"]) == 0
    assert distance(torch.tensor(before), torch.tensor(run_file(tmp_path / "small.onnx", fresh))) > 1e-2


def test_calibration_finds_heads_that_are_nearly_alike() -> None:
    case = ZOO["bert-sdpa"]
    model, example, fresh = scattered(case), case.inputs(2, 9, 0), case.inputs(3, 9, 4)
    with torch.no_grad():
        for view in case.head_views(model):
            view += 0.02 * torch.randn(view.shape, generator=torch.Generator().manual_seed(1))
    before = case.run(model, fresh)
    data = [case.inputs(4, 9, 100 + seed) for seed in range(6)]
    moved = [
        distance(before, case.run(rewriter.optimize(model, t, calibration=data, example_inputs=example), fresh))
        for t in (SIMILAR, NEIGHBOURS)
    ]
    assert moved[0] < 0.3 * moved[1]


@pytest.mark.parametrize(
    ("name", "reason"), [("t5-sdpa", "a bias or a mask for each head"), ("qwen3-sdpa", "a norm stands between")]
)
def test_heads_that_cannot_change_places_stay_with_their_neighbours(name: str, reason: str) -> None:
    case = ZOO[name]
    count = legal_pool(case)
    if count == 1:
        pytest.skip("one group has no other grouping")
    example = case.inputs(2, 9, 0)
    found = rewriter.optimize(case.build().eval(), GroupedQuery(count, "joint", "similar"), example_inputs=example)
    plain = rewriter.optimize(case.build().eval(), GroupedQuery(count, "joint"), example_inputs=example)
    assert any(reason in note for row in found.rewrite_report.sites for note in row.notes)
    assert torch.equal(case.run(found, example), case.run(plain, example))


def test_an_unknown_grouping_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown grouping"):
        GroupedQuery(2, "joint", "random")  # type: ignore[arg-type]
