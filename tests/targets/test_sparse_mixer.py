"""The Sparse Mixer targets: experts in dense blocks' places, exact where all of them work, beside mixing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

import rewriter
from codegen.ops.mixture_of_experts.reference import mixture_of_experts
from codegen.spec import Routing
from passes.targets.catalogue import find
from passes.targets.experts import Experts
from passes.targets.linear_mixing import LinearMixer
from passes.targets.sparse_mixer import SparseMixer
from rewriter.cli import run
from rewriter.errors import NothingToRewrite
from rewriter.install.expert_mixer import ExpertMixer, expert_mixers
from tests.covering import covering
from tests.zoo.feeds import INNER, WIDTH, text
from tests.zoo.models import ZOO
from tests.zoo.randomize import randomize

ZooOnnx = Callable[..., Path]
EXACT = 2e-5


def blocks_only(experts: int = 4, work: float = 1.0, **more: Any) -> SparseMixer:
    """Experts everywhere, and every attention stays."""
    return SparseMixer(mixing=LinearMixer(keep=99), blocks=Experts(experts, work, **more))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def changed(report: Any) -> dict[str, str]:
    return {row.name: row.after for row in report.sites if row.before != row.after}


# ------------------------------------------------------------------ modules


@pytest.mark.parametrize("name", ["bert-sdpa", "vit-sdpa", "modernbert-sdpa", "mlp"])
def test_experts_that_all_work_compute_what_the_block_did(name: str) -> None:
    case = ZOO[name]
    if name == "mlp":  # without any attention there is nothing that the target starts from
        with pytest.raises(NothingToRewrite):
            rewriter.optimize(case.build(), blocks_only(), example_inputs=case.inputs(2, 7, 0))
        return
    model, given, other = case.build(), case.inputs(2, 9, 0), case.inputs(3, 11, 1)
    done = rewriter.optimize(model, blocks_only(), example_inputs=given)
    rows = [row for row in done.rewrite_report.sites if row.before != row.after]
    assert [(row.before, row.after, row.exact) for row in rows] == [(f"ffn{INNER}", "moe4", True)] * 2
    assert all(row.error is not None and row.error < EXACT for row in rows) and len(expert_mixers(done)) == 2
    assert distance(case.run(done, other), case.run(model, other)) < EXACT
    half = rewriter.optimize(model, blocks_only(work=0.5), example_inputs=given)
    assert not any(row.exact for row in half.rewrite_report.sites if row.before != row.after)
    assert distance(case.run(half, other), case.run(model, other)) > 1e-3


@pytest.mark.parametrize("routing", Routing, ids=lambda r: r.value)
def test_a_replaced_block_is_the_oracle(routing: Routing) -> None:
    case = ZOO["vit-sdpa"]
    target = blocks_only(work=0.5, routing=routing)
    mixer = next(iter(expert_mixers(rewriter.optimize(case.build(), target)).values()))
    x = torch.randn(2, 17, WIDTH, generator=torch.Generator().manual_seed(0))
    parameters = {n: p.detach().numpy() for n, p in mixer.named_parameters()}
    with torch.no_grad():
        flat = mixer(x.reshape(-1, WIDTH)).reshape(x.shape)
        assert distance(mixer(x), flat) < 1e-6, "tokens may come without a batch"
        expected = mixture_of_experts(mixer.spec, x.numpy(), **parameters).output
        assert distance(mixer(x).double(), torch.from_numpy(expected)) < 1e-5
        mixer.router_weight.add_(torch.randn(mixer.router_weight.shape))
        assert distance(mixer(x).double(), torch.from_numpy(expected)) > 1e-3


def encoder(layers: int) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return randomize(transformers.BertModel._from_config(config, attn_implementation="sdpa"))


def test_the_whole_recipe() -> None:
    model = encoder(6)
    done = rewriter.optimize(model, "sparse-mixer")
    assert changed(done.rewrite_report) == {
        **{f"encoder.layer.{i}.attention.self": "linear-mixer" for i in (0, 1)},
        **{f"encoder.layer.{i}.feed_forward": "moe16" for i in (1, 2, 3, 4)},
    }
    assert done.rewrite_report.refused == () and done.rewrite_report.target == "sparse-mixer"
    fast = rewriter.optimize(model, "fast-sparse-mixer")
    specs = [next(iter(expert_mixers(m).values())).spec for m in (done, fast)]
    assert [s.capacity_factor for s in specs] == [8.0, 4.0] and {s.expert_hidden for s in specs} == {INNER // 16}
    assert fast.rewrite_report.flops.after < done.rewrite_report.flops.after < done.rewrite_report.flops.before
    counted = sum(p.numel() for p in done.parameters())
    assert done.rewrite_report.parameters.after == counted
    inputs = text(2, 9, 3)
    assert not torch.equal(done(**inputs).last_hidden_state, fast(**inputs).last_hidden_state)


def test_layers_select_blocks_too() -> None:
    done = rewriter.optimize(encoder(3), blocks_only(), layers="1-2")
    assert list(changed(done.rewrite_report)) == ["encoder.layer.1.feed_forward", "encoder.layer.2.feed_forward"]


def test_calibration_fits_router_and_scales() -> None:
    case = ZOO["bert-sdpa"]
    given = [case.inputs(8, 24, seed) for seed in range(4)]
    plain, fitted = (
        rewriter.optimize(case.build(), blocks_only(work=0.5), example_inputs=given[0], calibration=c)
        for c in (None, given)
    )
    for before, after in zip(plain.rewrite_report.sites, fitted.rewrite_report.sites, strict=True):
        if before.before != before.after:
            assert (before.merge, after.merge) == ("split", "split, fitted")
            assert after.error is not None and before.error is not None and after.error < before.error
            assert after.error < 1 and any("of the output's energy" in note for note in after.notes)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    done = rewriter.optimize(case.build(), blocks_only(work=0.5))
    rewriter.save(done, tmp_path / "mixed")
    again = rewriter.load(tmp_path / "mixed")
    inputs = case.inputs(2, 9, 1)
    assert torch.equal(case.run(again, inputs), case.run(done, inputs))
    with pytest.raises(Exception, match="rewriter"):
        type(case.build()).from_pretrained(tmp_path / "mixed")


def test_rewritten_models_are_exported_and_compiled() -> None:
    case = ZOO["bert-sdpa"]
    done = rewriter.optimize(case.build(), blocks_only(work=0.5))
    given, other = case.inputs(2, 9, 0), case.inputs(3, 14, 1)
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("tokens", min=2, max=32)}
    program = torch.export.export(done, (), given, dynamic_shapes=dict.fromkeys(given, sizes), strict=False)
    compiled = torch.compile(done, backend="eager", fullgraph=True)
    expected = case.run(done, other)
    assert distance(case.run(program.module(), other), expected) < 1e-6
    assert distance(case.run(compiled, other), expected) < 1e-6
    assert distance(case.run(done, given).mean(), expected.mean()) > 1e-4, "the control: another input, another answer"


def test_the_routers_losses_can_be_trained_on() -> None:
    case = ZOO["vit-sdpa"]
    done = rewriter.optimize(case.build(), blocks_only(work=0.5, routing=Routing.TOKENS_CHOOSE))
    mixer: ExpertMixer = next(iter(expert_mixers(done).values()))
    case.run(done, case.inputs(2, 9, 0))
    assert mixer.last is None, "nothing is held in evaluation"
    done.train()
    output = done(**case.inputs(2, 9, 0)).last_hidden_state
    assert mixer.last is not None and float(mixer.last.loss.detach()) > 0
    (output.square().mean() + mixer.last.loss).backward()
    assert mixer.router_weight.grad is not None and bool(mixer.router_weight.grad.abs().max() > 0)
    assert mixer.up_weight.grad is not None and bool(mixer.up_weight.grad.abs().max() > 0)


# ------------------------------------------------------------------ files


def answer(model: Any, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0])


@pytest.mark.parametrize("exporter", ["dynamo18", "torchscript17"])
def test_files_get_the_same_experts(exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    source = zoo_onnx(case, exporter)
    feeds = {n: t.numpy() for n, t in case.inputs(3, 11, 1).items()}
    for name, target in (("whole", blocks_only()), ("half", blocks_only(work=0.5))):
        done = rewriter.optimize(source, target)
        done.save(tmp_path / f"{name}.onnx")
        assert list(changed(done.rewrite_report).values()) == ["moe4"] * 2 and done.rewrite_report.refused == ()
    original = answer(source, feeds)
    whole, half = (answer(tmp_path / f"{name}.onnx", feeds) for name in ("whole", "half"))
    assert np.abs(whole - original).max() < EXACT * np.abs(original).max()
    module = rewriter.optimize(case.build(), blocks_only(work=0.5), example_inputs=case.inputs(2, 9, 0))
    twin = case.run(module, case.inputs(3, 11, 1)).numpy()
    assert np.abs(half - twin).max() < 1e-4 * np.abs(twin).max(), "both doors give the same weights"
    assert np.abs(half - original).max() > 1e-3 * np.abs(original).max()
    seen = rewriter.inspect(tmp_path / "half.onnx")
    assert len(seen.sites) == 2 and seen.refusals == () and seen.feed_forward.sites == ()
    assert {r.reason for r in seen.feed_forward.refusals} == {"it is a mixture of experts already"}
    checked = rewriter.verify(tmp_path / "whole.onnx", source)
    assert checked.ok and any(check.name == "exact" for check in checked.checks)


TOKENS_CHOOSE: dict[str, dict[str, Any]] = {
    "split": {},
    "split, all served": {"capacity_factor": 4.0},
    "copies": {"method": "copies", "work": 1.0},
    "copies, all served": {"method": "copies", "work": 1.0, "capacity_factor": 4.0},
}


@pytest.mark.parametrize(("how", "exporter"), covering(tuple(TOKENS_CHOOSE), ("dynamo18", "torchscript17")))
def test_tokens_choose_in_files_as_in_modules(how: str, exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case, out = ZOO["bert-sdpa"], tmp_path / "out.onnx"
    target = blocks_only(**{"work": 0.5, "routing": Routing.TOKENS_CHOOSE} | TOKENS_CHOOSE[how])
    done = rewriter.optimize(zoo_onnx(case, exporter), target)
    done.save(out)
    assert {row.merge for row in done.rewrite_report.sites if row.before != row.after} == {how.split(",")[0]}
    module = rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 9, 0))
    spec = next(iter(expert_mixers(module).values())).spec
    assert spec.selected == (1 if "copies" in how else 2) and spec.drops_nothing == ("all" in how)
    inputs = case.inputs(3, 11, 1)
    twin, found = case.run(module, inputs).numpy(), answer(out, {n: t.numpy() for n, t in inputs.items()})
    assert np.abs(found - twin).max() < 1e-4 * np.abs(twin).max()
    chosen = rewriter.optimize(case.build(), replace(target, blocks=blocks_only(work=0.5).blocks))
    other = case.run(chosen, inputs).numpy()
    assert np.abs(found - other).max() > 1e-3 * np.abs(other).max(), "the control: experts choose"


def test_files_call_the_runtimes_own_operator_where_it_fits(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """torch's encoder applies relu, BERT the exact gelu, which the operator does not have."""
    chosen = {"work": 0.5, "routing": Routing.TOKENS_CHOOSE, "capacity_factor": 4.0}
    for name, told in (
        ("torch-encoder", "onnxruntime alone"),
        ("bert-sdpa", "does not fit: it has no activation gelu"),
    ):
        case, own = ZOO[name], tmp_path / f"{name}.onnx"
        source, given = zoo_onnx(case, "dynamo18"), case.inputs(3, 11, 1)
        feeds = {n: t.numpy() for n, t in given.items()}
        done = rewriter.optimize(source, blocks_only(**chosen, contrib=True))
        done.save(own)
        rows = [row for row in done.rewrite_report.sites if row.before != row.after]
        assert len(rows) == 2 and all(told in row.notes[-1] for row in rows)
        calls = [n.op_type for f in onnx.load(own).functions for n in f.node if n.domain == "com.microsoft"]
        assert calls == (["MoE"] if name == "torch-encoder" else [])
        rewriter.optimize(source, blocks_only(**chosen)).save(tmp_path / "standard.onnx")
        expected = answer(tmp_path / "standard.onnx", feeds)
        assert np.abs(answer(own, feeds) - expected).max() < 1e-5 * np.abs(expected).max()
        original = answer(source, feeds)
        assert np.abs(expected - original).max() > 1e-3 * np.abs(original).max(), "the control: something was changed"
        assert rewriter.verify(own, source).ok
        reasons = {r.reason for r in rewriter.inspect(own).feed_forward.refusals}
        assert reasons == {"it is a mixture of experts already"}


def test_the_command_line_makes_a_sparse_mixer(
    zoo_onnx: ZooOnnx, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(zoo_onnx(ZOO["bert-sdpa"], "dynamo18")), str(tmp_path / "out.onnx")
    assert run(["rewrite", source, out, "--target", "sparse-mixer", "--strict", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [(s["from"], s["to"], s["merge"]) for s in written["sites"]] == [
        ("mha4", "mha4", "none"),
        (f"ffn{INNER}", "moe16", "split"),
    ] * 2
    assert run(["verify", out, "--against", source]) == 0
    capsys.readouterr()
    assert run(["inspect", source, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sites"]
    assert not any("sparse-mixer" in row["targets"] for row in rows if row["kind"] == "attention"), "both are kept"
    assert [row["targets"] for row in rows if row["kind"] == "feed_forward"] == [
        ["sparse-mixer", "fast-sparse-mixer", "gau:pair", "flash-quad:pair", "flash:pair", "colt5"]
    ] * 2


# ------------------------------------------------------------------ what is refused, and the target itself


def test_causal_models_are_refused() -> None:
    with pytest.raises(NothingToRewrite, match="causal"):
        rewriter.optimize(ZOO["gpt2-sdpa"].build(), "sparse-mixer")
    blocks = rewriter.inspect(ZOO["gpt2-sdpa"].build()).to_dict()["sites"]
    assert not any("sparse-mixer" in row["targets"] for row in blocks)


def test_what_experts_cannot_divide_is_refused() -> None:
    case = ZOO["bert-sdpa"]
    with pytest.raises(NothingToRewrite, match="7 experts do not divide its 48 hidden features"):
        rewriter.optimize(case.build(), blocks_only(experts=7))


def test_a_block_that_is_no_module_is_refused_where_modules_are_edited() -> None:
    case = ZOO["torch-encoder"]
    inputs = case.inputs(2, 7, 0)
    target = SparseMixer(mixing=LinearMixer(), blocks=Experts(4, 0.5))
    report = rewriter.optimize(case.build(), target, example_inputs=inputs).rewrite_report
    assert set(changed(report).values()) == {"linear-mixer"}
    assert [r.name for r in report.refused] == ["encoder.layers.0.feed_forward", "encoder.layers.1.feed_forward"]
    assert all("no module of its own" in r.reason for r in report.refused)


def test_inspection_of_graphs_lists_what_that_of_modules_does() -> None:
    case = ZOO["vit-sdpa"]
    given = case.inputs(2, 7, 0)
    program = torch.export.export(case.build(), (), given, strict=False)
    units, of_modules = {"gau", "flash", "gau:pair"}, {"dha"}
    for model, others in ((program, set()), (program.module(), set()), (case.build(), of_modules)):
        rows = rewriter.inspect(model, example_inputs=given).to_dict()["sites"]
        listed = {name for row in rows for name in row["targets"]}
        assert units <= listed and listed & {"dha"} == others
        blocks = [row for row in rows if row["kind"] == "feed_forward"]
        assert len(blocks) == 2 and all(row["status"] == "rewritable" and "colt5" in row["targets"] for row in blocks)


def test_the_targets_names_and_layers() -> None:
    sparse, fast = find("sparse-mixer"), find("Fast-Sparse-Mixer ")
    assert isinstance(sparse, SparseMixer) and isinstance(fast, SparseMixer)
    assert (sparse.blocks.work, fast.blocks.work) == (0.5, 0.25) and (sparse.name, fast.name) != (
        fast.name,
        sparse.name,
    )
    numbers: Any = list(range(14))
    assert sparse.blocks.chosen(numbers) == (5, 6, 7, 8) and sparse.blocks.chosen(numbers[:6]) == (1, 2, 3, 4)
    assert sparse.blocks.chosen(numbers[:3]) == (0, 1, 2)
    room = {"capacity_factor": 0.0, "routing": Routing.TOKENS_CHOOSE}
    for broken in (
        {"experts": 1}, {"work": 0.0}, {"work": 1.5}, {"method": "halves"}, {"capacity_factor": 2.0}, room
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            Experts(**broken)  # type: ignore[arg-type]


def test_copies_start_as_the_whole_block() -> None:
    case = ZOO["vit-sdpa"]
    done = rewriter.optimize(case.build(), blocks_only(method="copies"))
    mixer = next(iter(expert_mixers(done).values()))
    assert mixer.spec.expert_hidden == INNER and mixer.spec.capacity_factor == 1.0 and mixer.spec.selected == 1
    assert all(torch.equal(mixer.up_weight[0], expert) for expert in mixer.up_weight)
    assert {row.merge for row in done.rewrite_report.sites if row.before != row.after} == {"copies"}
    assert done.rewrite_report.parameters.after > done.rewrite_report.parameters.before


def test_experts_of_integers_are_stored_as_floats_and_rows_say_so(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    source, small = zoo_onnx(ZOO["bert-sdpa"], "torchscript17"), tmp_path / "int8.onnx"
    quantize_dynamic(source, small, weight_type=QuantType.QInt8)
    for path, told in ((source, False), (small, True)):
        rows = rewriter.optimize(path, blocks_only(work=0.5)).rewrite_report.sites
        assert [any("stored as integers" in n for n in r.notes) for r in rows if r.before != r.after] == [told] * 2
