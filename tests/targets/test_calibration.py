"""Merging with calibration through all doors: twins stay exact, other models come closer on inputs not seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rewriter
from passes.targets import GroupedQuery
from rewriter.calibration import torch_probe
from rewriter.calibration.torch_trial import TorchTrial, straighten
from rewriter.capture.torch_export import placeholders
from rewriter.errors import UsageError
from tests.targets.lossless_twin import distance, legal_pool, run_file, session
from tests.targets.turned_twin import turned
from tests.zoo.case import Inputs, ZooCase
from tests.zoo.models import ZOO
from tests.zoo.through import QUICK, through

NAMES = ("bert-sdpa", "llama-sdpa", "gpt2-sdpa", "phi-sdpa", "t5-sdpa", "whisper-sdpa", "vit-sdpa", "albert-sdpa")
ALIKE = ("phi-sdpa", "gpt2-sdpa")
"""What llama and bert stand for, in calibration."""
CASES = [pytest.param(ZOO[n], id=n, marks=[pytest.mark.exhaustive] if n in ALIKE else []) for n in NAMES if n in ZOO]
IN_FILES = [ZOO[n] for n in ("bert-sdpa", "llama-sdpa", "t5-sdpa", "bart-sdpa")]
FILES = [pytest.param(c, e, id=f"{c.name}-{e}") for c, e in through(IN_FILES) if e in ("dynamo18", QUICK)]
LENGTH = 12


def batches(case: ZooCase, count: int = 24) -> list[Inputs]:
    return [case.inputs(4, LENGTH, 100 + seed) for seed in range(count)]


def relative(case: ZooCase, before: nn.Module, after: nn.Module) -> float:
    """Relative root-mean-square difference on inputs that calibration has not seen, padding left out."""
    total, size = 0.0, 0.0
    for seed in range(4):
        inputs = case.inputs(4, LENGTH, 900 + seed)
        a, b = case.run(before, inputs), case.run(after, inputs)
        keep = inputs.get("attention_mask")
        rows = keep.bool() if keep is not None and keep.shape == a.shape[:-1] else ...
        total += float((a - b)[rows].square().sum())
        size += float(a[rows].square().sum())
    return float((total / size) ** 0.5)


def calibrated(case: ZooCase, model: nn.Module, merge: Any = None, count: int = 24) -> Any:
    to = GroupedQuery(legal_pool(case), merge)
    return rewriter.optimize(model, to, calibration=batches(case, count), example_inputs=case.inputs(2, LENGTH, 0))


@pytest.mark.parametrize("case", CASES)
def test_a_twin_with_turned_heads_stays_exact(case: ZooCase) -> None:
    model, fresh = turned(case), case.inputs(3, LENGTH, 4)
    small = calibrated(case, model, count=3)
    assert {row.merge for row in small.rewrite_report.sites} == {"joint"}
    assert all(row.exact for row in small.rewrite_report.sites)
    assert distance(case.run(model, fresh), case.run(small, fresh)) < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_calibration_brings_a_model_closer_on_new_inputs(case: ZooCase) -> None:
    model = case.build().eval()
    before = copy.deepcopy(model.state_dict())
    mean = rewriter.optimize(model, GroupedQuery(legal_pool(case)), example_inputs=case.inputs(2, LENGTH, 0))
    errors = {"mean": relative(case, model, mean)}
    errors |= {merge: relative(case, model, calibrated(case, model, merge)) for merge in ("joint",)}
    assert errors["joint"] < 0.9 * errors["mean"], errors
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "the original changed"


def test_the_refit_helps_whatever_the_merge() -> None:
    case = ZOO["llama-sdpa"]
    model = case.build().eval()
    for merge in ("mean", "aligned"):
        plain = rewriter.optimize(model, GroupedQuery(2, merge), example_inputs=case.inputs(2, LENGTH, 0))
        fitted = calibrated(case, model, merge)
        assert relative(case, model, fitted) < relative(case, model, plain)


def test_wrong_text_is_no_help() -> None:
    """Control: statistics of one repeated token fit nothing else."""
    case = ZOO["llama-sdpa"]
    model = case.build().eval()
    narrow = [{k: torch.full_like(v, 3) if k == "input_ids" else v for k, v in b.items()} for b in batches(case)]
    to = GroupedQuery(2)
    bad = rewriter.optimize(model, to, calibration=narrow, example_inputs=case.inputs(2, LENGTH, 0))
    assert relative(case, model, bad) > 1.05 * relative(case, model, calibrated(case, model))


@pytest.mark.parametrize(("case", "exporter"), FILES)
def test_both_doors_give_the_same_weights(
    case: ZooCase, exporter: str, zoo_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    path, fresh = zoo_onnx(case, exporter), case.inputs(2, LENGTH, 5)
    if _is_fixed(path):
        pytest.skip("the exporter fixed the sizes")
    data = batches(case, 12)
    small = rewriter.optimize(path, GroupedQuery(legal_pool(case)), calibration=data)
    small.save(tmp_path / "small.onnx")
    model = case.build().eval()
    twin = rewriter.optimize(
        model, GroupedQuery(legal_pool(case)), calibration=data, example_inputs=case.inputs(2, LENGTH, 0)
    )
    mine, theirs = run_file(tmp_path / "small.onnx", fresh), case.run(twin, fresh).numpy()
    moved = float(np.abs(mine - case.run(model, fresh).numpy()).max())
    assert float(np.abs(mine - theirs).max()) < 0.03 * moved
    assert rewriter.verify(tmp_path / "small.onnx", path).ok


def _is_fixed(path: Path) -> bool:
    return all(isinstance(d, int) for i in session(path).get_inputs() for d in i.shape)


def test_an_exported_program_is_calibrated_like_the_module() -> None:
    case = ZOO["llama-sdpa"]
    model, data, fresh = case.build().eval(), batches(case, 6), case.inputs(4, LENGTH, 5)
    data = [{**b, "use_cache": False} for b in data]
    program = torch.export.export(model, (), data[0], strict=False)
    small = rewriter.optimize(program, "gqa2", calibration=data)
    twin = rewriter.optimize(model, "gqa2", calibration=data, example_inputs=data[0])
    with torch.no_grad():
        assert distance(case.run(small.module(), {**fresh, "use_cache": False}), case.run(twin, fresh)) < 1e-3
    assert distance(case.run(model, fresh), case.run(twin, fresh)) > 1e-2
    with pytest.raises(UsageError, match="does not take a calibration batch"):
        rewriter.optimize(program, "gqa2", calibration=[{**case.inputs(4, LENGTH + 1, 0), "use_cache": False}])


def test_graph_modules_and_wrong_calibrations_are_refused() -> None:
    case = ZOO["llama-sdpa"]
    model = case.build().eval()
    inputs = {**case.inputs(2, LENGTH, 0), "use_cache": False}
    graph = torch.export.export(model, (), inputs, strict=False).module()
    with pytest.raises(UsageError, match="graph module"):
        rewriter.optimize(graph, "gqa2", calibration=[inputs], example_inputs=inputs)
    for wrong, said in ((["a text"], "tokenizer"), ([], "no tokens"), (3, "is a int"), ([{"x": 1}], "lack the input")):
        with pytest.raises(UsageError, match=said):
            rewriter.optimize(model, "gqa2", calibration=wrong)
    with pytest.raises(UsageError, match="index out of range") as foreign:
        rewriter.optimize(model, "gqa2", calibration=inputs["input_ids"] + 10**6)
    assert "tokenizer" in foreign.value.hint
    with pytest.raises(UsageError, match="16 shapes"):
        rewriter.optimize(model, "gqa2", calibration=[case.inputs(1, n, 0) for n in range(3, 21)])


def test_token_ids_alone_are_enough() -> None:
    case = ZOO["llama-sdpa"]
    model, ids = case.build().eval(), case.inputs(4, 40, 1)["input_ids"]
    small = [rewriter.optimize(model, "gqa2", calibration=c) for c in (ids, ids.numpy(), [{"input_ids": ids}])]
    outputs = [case.run(m, case.inputs(2, 9, 2)) for m in small]
    assert distance(outputs[0], outputs[1]) == 0.0
    assert distance(outputs[0], outputs[2]) < 1e-3, "one batch of rows, or row by row"


def test_batches_of_the_shape_that_was_captured_are_run_by_that_program(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = ZOO["bert-sdpa"], []
    export = torch_probe.exported
    monkeypatch.setattr(torch_probe, "exported", lambda *call: made.append(call) or export(*call))
    results = []
    for length, first in ((LENGTH, 100), (7, 100), (LENGTH, 200)):
        data = [case.inputs(2, LENGTH, first + seed) for seed in range(3)]
        small = rewriter.optimize(case.build(), "mqa", calibration=data, example_inputs=case.inputs(2, length, 0))
        results.append(case.run(small, case.inputs(3, 9, 1)))
        assert len(made) == (0 if length == LENGTH and first == 100 else 1)
    assert distance(results[0], results[1]) < 1e-4 < 1e-2 < distance(results[0], results[2]), "and the same comes of it"


def test_a_run_holds_only_what_is_still_read() -> None:
    case = ZOO["llama-sdpa"]
    model, inputs = case.build().eval(), case.inputs(2, LENGTH, 0)
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    straight = straighten(program.graph_module)
    bound = placeholders(program, (), {**inputs, "use_cache": False})
    run = TorchTrial(straight, bound)
    middle = straight.calls[len(straight.calls) // 2].name
    run.advance(middle, {middle})
    position = straight.index[middle]
    held = set(run._held) - set(bound) - set(straight.constants)
    assert held and all(straight.last.get(n, -1) > position or n == middle for n in held)
    computed = [c.name for c in straight.calls[: position + 1]]
    assert len(held) < len(computed) / 3


def test_what_is_put_is_read_by_everything_after() -> None:
    case = ZOO["bert-sdpa"]
    model, inputs = case.build().eval(), case.inputs(2, LENGTH, 0)
    program = torch.export.export(model, (), inputs, strict=False)
    straight, bound = straighten(program.graph_module), placeholders(program, (), inputs)
    norms = [c.name for c in straight.calls if "layer_norm" in c.name]
    plain, changed = TorchTrial(straight, bound), TorchTrial(straight, bound)
    for run in (plain, changed):
        seen = run.advance(norms[0], {norms[0]})[norms[0]]
    changed.put(norms[0], np.zeros_like(seen))
    last = [run.advance(norms[-1], {norms[-1]})[norms[-1]] for run in (plain, changed)]
    expected = case.run(model, inputs).numpy()
    assert np.abs(last[0] - expected).max() < 1e-5 < np.abs(last[1] - expected).max()
    with pytest.raises(KeyError):
        plain.advance(norms[-1], {"no such value"})
