"""The target "auto": sensitivities are what rewriting one site really does, and the plan follows from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes import merging_fit
from passes.budget import Budget
from passes.refine import refitted
from passes.targets import Auto, GroupedQuery
from rewriter.calibration.torch_trial import TorchTrial, straighten
from rewriter.capture.torch_export import placeholders
from rewriter.cli import run
from rewriter.errors import NothingToRewrite, RewriteError, UnknownTarget, UsageError
from tests.targets.fused_files import fused_file
from tests.targets.test_mixing import albert
from tests.zoo.case import Inputs, ZooCase
from tests.zoo.models import ZOO

LENGTH = 12


def batches(case: ZooCase, count: int = 8) -> list[Inputs]:
    return [case.inputs(4, LENGTH, 100 + seed) for seed in range(count)]


def llama(easy: int | None = None) -> nn.Module:
    """Two layers with a head of logits; the heads of layer `easy` are nearly equal in pairs."""
    model = ZOO["llama-sdpa"].build().eval()
    if easy is not None:
        attention: Any = model.get_submodule(f"model.layers.{easy}.self_attn")
        for projection in (attention.k_proj, attention.v_proj):
            heads = projection.weight.data.view(-1, 2, attention.head_dim, projection.weight.shape[1])
            heads[:, 1] = heads[:, 0] + 0.05 * heads[:, 1]
    return model


def auto(model: Any, budget: str | Budget, data: Any, **options: Any) -> Any:
    target = options.pop("target", "auto:gqa2")
    return rewriter.optimize(model, target, budget=budget, calibration=data, **options)


def choice(rewritten: Any) -> dict[str, Any]:
    found: dict[str, Any] = rewritten.rewrite_report.to_dict()["auto"]
    return found


def divergence(before: Tensor, after: Tensor) -> float:
    p, q = (t.double().log_softmax(-1) for t in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def unrefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are refined in no trial; where a prediction must be exact, not in what is installed either."""
    monkeypatch.setattr(merging_fit, "refined", lambda job, m: refitted(job.site, m, job.seen, job.reference))


@pytest.mark.usefixtures("unrefined")
@pytest.mark.parametrize("easy", [0, 1])
def test_the_budget_goes_where_it_costs_least(easy: int) -> None:
    case, model = ZOO["llama-sdpa"], llama(easy)
    small = auto(model, "kv=0.75", batches(case), example_inputs=case.inputs(2, LENGTH, 0))
    changed = [row.name for row in small.rewrite_report.sites if not row.kept]
    assert changed == [f"model.layers.{easy}.self_attn"]
    plan = choice(small)["plan"]
    assert plan["kv"] == pytest.approx(0.75) and plan["measured_drift"] == pytest.approx(plan["predicted_drift"])
    kv = small.rewrite_report.kv_bytes_per_token
    assert kv.after / kv.before == pytest.approx(0.75)
    fresh = case.inputs(2, LENGTH, 1)
    assert divergence(case.run(model, fresh), case.run(small, fresh)) < 0.1 * divergence(
        case.run(model, fresh),
        case.run(auto(llama(1 - easy), "kv=0.75", batches(case), example_inputs=fresh), fresh),
    )


@pytest.mark.usefixtures("unrefined")
def test_a_sensitivity_is_the_drift_of_rewriting_that_site() -> None:
    """By hand: fitted on the same batches, installed, run on those held out."""
    case, model = ZOO["llama-sdpa"], llama()
    data, example = batches(case), case.inputs(2, LENGTH, 0)
    measured = {
        e["sites"][0]: e["drift"] for e in choice(auto(model, "kv=0.5", data, example_inputs=example))["sensitivity"]
    }
    held = [3, 7]
    fitted = [b for i, b in enumerate(data) if i not in held]
    by_hand = {}
    for layer in (0, 1):
        alone = rewriter.optimize(model, "gqa2", layers=str(layer), calibration=fitted, example_inputs=example)
        moved = [divergence(_rows(case, model, data[i]), _rows(case, alone, data[i])) for i in held]
        by_hand[f"model.layers.{layer}.self_attn"] = sum(moved) / len(moved)
    assert measured == pytest.approx(by_hand, rel=0.02)
    first, second = by_hand.values()
    assert abs(first - second) > 0.1 * first, "control: the two sites differ by more than the tolerance"


def _rows(case: ZooCase, model: nn.Module, inputs: Inputs) -> Tensor:
    """Answers of tokens that are no padding, equally many of each batch."""
    answer, mask = case.run(model, inputs), inputs.get("attention_mask")
    return answer.reshape(-1, answer.shape[-1]) if mask is None else answer[mask.bool()]


@pytest.mark.parametrize("exporter", ["torchscript17"])
def test_a_file_is_measured_like_the_module(exporter: str, zoo_onnx: Callable[..., Path]) -> None:
    case = ZOO["llama-sdpa"]
    data = batches(case)
    file = auto(zoo_onnx(case, exporter), "kv=0.75", data)
    module = auto(case.build().eval(), "kv=0.75", data, example_inputs=case.inputs(2, LENGTH, 0))
    mine, theirs = ([e["drift"] for e in choice(m)["sensitivity"]] for m in (file, module))
    assert mine == pytest.approx(theirs, rel=0.05)
    assert [r.after for r in file.rewrite_report.sites] == [r.after for r in module.rewrite_report.sites]


def test_an_exported_program_is_measured_like_the_module() -> None:
    case = ZOO["llama-sdpa"]
    data = [{**b, "use_cache": False} for b in batches(case)]
    program = torch.export.export(llama(0), (), data[0], strict=False)
    found, wanted = (choice(auto(m, "kv=0.75", data, example_inputs=data[0])) for m in (program, llama(0)))
    assert found["plan"]["measured_drift"] == pytest.approx(wanted["plan"]["measured_drift"], rel=1e-3)
    assert [*found["plan"]["targets"].values()] == ["gqa2", "keep"]


def test_fused_operators_that_stay_are_not_written_out(tmp_path: Path) -> None:
    path = fused_file("mha-heads-bias", tmp_path, tied=False)
    ids = np.random.default_rng(0).integers(0, 16, (24, 9))
    small = auto(path, "kv=0.7", ids, target=Auto(candidates=(GroupedQuery(1),), merge="mean"))
    plan = choice(small)["plan"]
    changed = [row.name for row in small.rewrite_report.sites]
    kinds = [node.op_type for node in small.model.graph]
    assert kinds.count("MultiHeadAttention") == 1, "one of two layers keeps its operator"
    assert [name for name, target in plan["targets"].items() if target != "keep"] == changed and len(changed) == 1
    with pytest.raises(UsageError, match="needs calibration"):
        rewriter.optimize(path, "auto", budget="kv=0.8")


def test_layers_that_share_weights_are_one_unit() -> None:
    data = [{k: v for k, v in b.items() if k != "token_type_ids"} for b in batches(ZOO["bert-sdpa"])]
    small = auto(albert(), "kv=0.5", data, example_inputs=data[0])
    (effect,) = choice(small)["sensitivity"]
    assert len(effect["sites"]) == len(small.rewrite_report.sites) == 3
    assert choice(small)["drift_is"] == "1 - cosine"
    with pytest.raises(NothingToRewrite, match="which is not selected"):
        auto(albert(), "kv=1", data, example_inputs=data[0], layers=f"^{small.rewrite_report.sites[0].name}$")


def test_more_candidates_and_other_costs() -> None:
    case = ZOO["bert-sdpa"]
    model, data, example = case.build().eval(), batches(case), case.inputs(2, LENGTH, 0)
    many = auto(model, "kv=0.4", data, target="auto", example_inputs=example)
    tried = {e["target"] for e in choice(many)["sensitivity"]}
    assert tried == {"gqa2", "mqa"}
    assert choice(many)["plan"]["kv"] <= 0.4
    mixed = auto(model, "speed=1.05", data, target="auto:fnet+gqa2", example_inputs=example)
    assert {e["target"] for e in choice(mixed)["sensitivity"]} == {"fnet", "gqa2"}
    assert choice(mixed)["plan"]["speed"] >= 1.05
    flops = mixed.rewrite_report.flops
    assert flops.before / flops.after == pytest.approx(choice(mixed)["plan"]["speed"])


def test_a_drift_budget_is_kept_as_measured() -> None:
    case, model = ZOO["llama-sdpa"], llama(0)
    data, example = batches(case), case.inputs(2, LENGTH, 0)
    alone = choice(auto(model, "kv=0.5", data, example_inputs=example))
    cheap = min(e["drift"] for e in alone["sensitivity"])
    small = auto(model, Budget(drift=2 * cheap), data, example_inputs=example)
    assert choice(small)["plan"]["measured_drift"] <= 2 * cheap
    assert choice(small)["plan"]["kv"] == pytest.approx(0.75)
    with pytest.raises(NothingToRewrite, match="every site stays"):
        auto(model, Budget(drift=0.1 * cheap), data, example_inputs=example)


def test_the_frontier_is_predicted_for_every_budget() -> None:
    case = ZOO["llama-sdpa"]
    found = choice(auto(llama(0), "kv=0.5", batches(case), target="auto", example_inputs=case.inputs(2, LENGTH, 0)))
    points = found["frontier"]
    assert [p["kv"] for p in points] == sorted((p["kv"] for p in points), reverse=True)
    assert [p["predicted_drift"] for p in points] == sorted(p["predicted_drift"] for p in points)
    alone = {(e["sites"][0], e["target"]): e["drift"] for e in found["sensitivity"]}
    for p in points:
        assert p["predicted_drift"] == pytest.approx(sum(alone.get(pair, 0.0) for pair in p["targets"].items()))


def test_wrong_usage_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = ZOO["llama-sdpa"], llama()
    data = batches(case, 4)
    for options, said in (
        ({"target": "auto", "calibration": data}, "needs a budget"),
        ({"target": "auto", "budget": "kv=0.5"}, "needs calibration"),
        ({"target": "gqa2", "budget": "kv=0.5", "calibration": data}, "only the target auto"),
        ({"target": "auto", "budget": "kv=none", "calibration": data}, "cannot read"),
        ({"target": "auto", "budget": "kv=0.01", "calibration": data}, "no plan meets"),
        ({"target": {"0": "auto", "1": "gqa2"}, "calibration": data}, "one target among others"),
        ({"target": "auto", "budget": "kv=0.5", "calibration": data, "layers": "77"}, "selects no"),
    ):
        with pytest.raises(UsageError, match=said):
            rewriter.optimize(model, **options)
    for name in ("auto:", "auto:gru", "auto:gqa0", "auto:gqa2++mqa", "auto:auto"):
        with pytest.raises(UnknownTarget):
            rewriter.optimize(model, name, budget="kv=0.5", calibration=data)
    with pytest.raises(ValueError, match="unknown merge"):
        Auto(merge="median")  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(RewriteError, match="scipy") as caught:
        auto(model, "kv=0.75", data)
    assert "rewriter[auto]" in caught.value.hint


def test_the_command_line_prints_plan_and_frontier(
    tmp_path: Path, zoo_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    case = ZOO["llama-sdpa"]
    path, ids = tmp_path / "ids.npy", case.inputs(24, LENGTH, 1)["input_ids"].numpy()
    np.save(path, ids)
    command = ["rewrite", str(zoo_onnx(case, "torchscript17")), str(tmp_path / "out.onnx"), "--target", "auto"]
    command += ["--budget", "kv=0.75", "--calibration", str(path)]
    assert run([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["auto"]["budget"] == {"kv": 0.75} and (tmp_path / "out.onnx").exists()
    assert shown["kv_bytes_per_token"]["after"] <= 0.75 * shown["kv_bytes_per_token"]["before"]
    assert run([*command, "--dry-run", "--progress"]) == 0
    printed, told = capsys.readouterr()
    assert "predicted drift" in printed and "measured on 6 of 24 batches" in printed
    assert "measuring: 1 of 2 sites" in told, "trials take longest, and say how far they are"


def test_a_fork_goes_on_by_itself() -> None:
    case = ZOO["bert-sdpa"]
    model, inputs = case.build().eval(), case.inputs(2, LENGTH, 0)
    program = torch.export.export(model, (), inputs, strict=False)
    straight = straighten(program.graph_module)
    norms = [c.name for c in straight.calls if "layer_norm" in c.name]
    parent = TorchTrial(straight, placeholders(program, (), inputs))
    seen = parent.advance(norms[0], {norms[0]})[norms[0]]
    fork = parent.fork()
    fork.put(norms[0], np.zeros_like(seen))
    changed, plain = (t.advance(norms[-1], {norms[-1]})[norms[-1]] for t in (fork, parent))
    assert np.abs(plain - case.run(model, inputs).numpy()).max() < 1e-5 < np.abs(changed - plain).max()


def test_merges_can_be_chosen_for_all_candidates() -> None:
    case = ZOO["llama-sdpa"]
    small = auto(
        llama(),
        Budget(kv=0.5),
        batches(case, 4),
        target=Auto(merge="aligned"),
        example_inputs=case.inputs(2, LENGTH, 0),
    )
    assert {row.merge for row in small.rewrite_report.sites} == {"aligned"}
