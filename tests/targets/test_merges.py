"""Aligned and joint merging through all doors: twins with turned heads are recovered, which averaging cannot do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import rewriter
from passes.targets import GroupedQuery
from tests.covering import covering
from tests.targets.lossless_twin import distance, legal_pool, run_file, twin_file
from tests.targets.turned_twin import turned
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO
from tests.zoo.through import through

NAMES = (
    "bert-sdpa", "vit-sdpa", "gpt2-sdpa", "llama-sdpa", "llama-gqa-eager", "phi-sdpa",
    "qwen3-sdpa", "t5-sdpa", "whisper-sdpa", "bart-sdpa", "albert-sdpa",
)  # fmt: skip
IN_FILES = ("bert-sdpa", "llama-sdpa", "gptj-eager", "gpt2-sdpa", "t5-sdpa", "bart-sdpa", "vit-sdpa")
FILES = [pytest.param(c, e, id=f"{c.name}-{e}") for c, e in through(ZOO[n] for n in IN_FILES)]
LARGE = ("t5-sdpa", "bart-sdpa")
"""Models of six attentions; whisper is another, and t5 has its control as a graph."""
MERGES = pytest.mark.parametrize("merge", ["aligned", "joint"])
EXACT, LOSSY = 1e-3, 1e-2


@cache
def twin(name: str, perturbed: bool = False) -> nn.Module:
    return turned(ZOO[name], perturbed=perturbed)


def target(case: ZooCase, merge: str) -> GroupedQuery:
    return GroupedQuery(legal_pool(case), merge)  # type: ignore[arg-type]


def through_torch(case: ZooCase, model: nn.Module, merge: str) -> tuple[float, rewriter.RewriteReport]:
    """(largest difference of outputs at sizes that were not captured, report)."""
    fresh = case.inputs(3, 7, 4)
    small = rewriter.optimize(model, target(case, merge), example_inputs=case.inputs(2, 9, 0))
    return distance(case.run(model, fresh), case.run(small, fresh)), small.rewrite_report


@pytest.mark.parametrize(("case", "merge"), covering([ZOO[n] for n in NAMES if n in ZOO], ("joint", "aligned")))
def test_a_module_with_turned_heads_is_recovered(case: ZooCase, merge: str) -> None:
    moved, report = through_torch(case, twin(case.name), merge)
    assert moved < EXACT
    assert len(report.sites) == case.sites and not report.refused
    assert {row.merge for row in report.sites} == {merge}
    normed = case.name.startswith("qwen3")
    assert all(any("keys are averaged" in n for n in row.notes) is normed for row in report.sites)
    assert all(row.exact is not normed for row in report.sites)
    assert all(row.error is None or row.error < 1e-4 for row in report.sites)


@pytest.mark.parametrize(
    "case",
    [pytest.param(ZOO[n], id=n, marks=[pytest.mark.exhaustive] if n in LARGE else []) for n in NAMES if n in ZOO],
)
def test_controls_averaging_it_or_perturbing_it_is_seen(case: ZooCase) -> None:
    assert through_torch(case, twin(case.name), "mean")[0] > LOSSY
    for merge in ("aligned", "joint"):
        moved, report = through_torch(case, twin(case.name, perturbed=True), merge)
        assert moved > LOSSY and not all(row.exact for row in report.sites)


@pytest.mark.parametrize("name", ["bert-sdpa", "llama-sdpa", "gpt2-sdpa", "t5-sdpa"])
@MERGES
def test_a_graph_with_turned_heads_is_recovered(name: str, merge: str) -> None:
    case = ZOO[name]
    cached = {} if name.startswith("bert") else {"use_cache": False}
    fresh, first = ({**case.inputs(2, 9, seed), **cached} for seed in (4, 0))
    for perturbed in (False, True):
        model = twin(name, perturbed)
        program = torch.export.export(model, (), first, strict=False)
        small = rewriter.optimize(program, target(case, merge))
        with torch.no_grad():
            moved = distance(case.run(model, fresh), case.run(small.module(), fresh))
        assert moved > LOSSY if perturbed else moved < EXACT
        assert all(row.exact for row in small.rewrite_report.sites) is not perturbed


@pytest.mark.parametrize(("case", "exporter"), FILES)
def test_a_file_with_turned_heads_is_recovered(
    case: ZooCase, exporter: str, zoo_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    source, inputs = zoo_onnx(case, exporter), case.inputs(2, 7, 3)
    path = twin_file(case, source, tmp_path / "turned.onnx", module=twin(case.name))
    before = run_file(path, inputs)
    for merge in ("mean", "aligned", "joint"):
        done = rewriter.optimize(path, target(case, merge))
        done.save(tmp_path / f"{merge}.onnx")
        moved = distance(before, run_file(tmp_path / f"{merge}.onnx", inputs))
        assert moved > LOSSY if merge == "mean" else moved < EXACT
        assert all(row.exact is (merge != "mean") for row in done.rewrite_report.sites)
    assert rewriter.verify(tmp_path / "joint.onnx", path).ok
    wrong = twin_file(case, source, tmp_path / "wrong.onnx", module=twin(case.name, True))
    rewriter.optimize(wrong, target(case, "joint")).save(tmp_path / "wrong-joint.onnx")
    assert distance(run_file(wrong, inputs), run_file(tmp_path / "wrong-joint.onnx", inputs)) > LOSSY


def test_a_tied_twin_keeps_its_queries_and_its_output_bit_for_bit() -> None:
    """Equal heads need no turning: nothing but keys and values changes, whatever the merge."""
    from tests.targets.lossless_twin import tied

    case = ZOO["llama-sdpa"]
    model = tied(case)
    small = rewriter.optimize(model, target(case, "joint"), example_inputs=case.inputs(2, 9, 0))
    old, new = model.state_dict(), small.state_dict()
    kept = [n for n in old if "q_proj" in n or "o_proj" in n]
    assert kept and all(torch.equal(old[n], new[n]) for n in kept)
    assert all(row.exact for row in small.rewrite_report.sites)


def test_old_output_weights_leave_the_file(zoo_onnx: Callable[..., Path], tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    path = twin_file(case, zoo_onnx(case, "dynamo18"), tmp_path / "turned.onnx", module=twin(case.name))
    rewriter.optimize(path, target(case, "joint")).save(tmp_path / "small.onnx")
    old, new = ({t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer}
                for p in (path, tmp_path / "small.onnx"))  # fmt: skip
    assert sum(a.size for a in new.values()) < sum(a.size for a in old.values())
    read = {i for n in onnx.load(tmp_path / "small.onnx").graph.node for i in n.input}
    assert set(new) <= read, "an initializer is left that nothing reads"
    shapes = [a.shape for a in new.values()]
    assert shapes.count((32, 32)) >= 2 or any(np.ndim(a) == 2 for a in new.values())
