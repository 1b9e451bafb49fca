"""Sparse attention through every door: a rewritten model is the original with a mask of the pattern."""

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
from numpy.typing import NDArray
from torch import Tensor, nn

import rewriter
from codegen.sight import visible
from passes.activations import narrowed
from passes.targets import GroupedQuery, SparseFixed, SparseStrided, Window
from passes.targets.catalogue import find
from rewriter.errors import NothingToRewrite, UnknownTarget
from rewriter.install.torch_module import mixers
from tests.match.doors import through_torch
from tests.targets.fused_files import fused_file
from tests.targets.lossless_twin import distance, run_file
from tests.zoo.case import Inputs, ZooCase
from tests.zoo.models import ZOO

Array = NDArray[Any]
ZooOnnx = Callable[..., Path]
CLOSE = 2e-5
"""Relative to the largest number of the answer."""

WINDOW, FIXED, BY_HEAD = Window(3, 1), SparseFixed(4, 1), SparseFixed(4, 1, "heads")
STRIDED, TURNS = SparseStrided(3), SparseFixed(4, 1, "alternating")


def pairs(*chosen: tuple[str, Any]) -> list[Any]:
    return [pytest.param(ZOO[name], target, id=f"{name}-{target.name}") for name, target in chosen]


BERT, GPT2, LLAMA = "bert-sdpa", "gpt2-sdpa", "llama-sdpa"
ALIKE = pairs((BERT, WINDOW), (BERT, BY_HEAD), (BERT, STRIDED), (LLAMA, WINDOW), (LLAMA, FIXED), (GPT2, WINDOW))
DECODING = pairs((LLAMA, WINDOW), (LLAMA, BY_HEAD), (LLAMA, FIXED), (GPT2, TURNS))
GRAPHS = pairs((BERT, BY_HEAD), (LLAMA, TURNS), (GPT2, WINDOW))
SEVERAL = [pytest.param(ZOO[name], id=name) for name in (BERT, LLAMA)]


def rewritten(case: ZooCase, target: Any, **options: Any) -> Any:
    return rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 9, 0), **options)


def relative(a: Any, b: Tensor) -> float:
    a = a.detach() if isinstance(a, Tensor) else torch.from_numpy(np.asarray(a))
    return distance(a, b.detach()) / max(float(b.detach().abs().max()), 1e-30)


def unpadded(inputs: Inputs) -> Inputs:
    """A padded query may see padding alone, and programs differ in what they give there."""
    return {n: torch.ones_like(v) if n == "attention_mask" else v for n, v in inputs.items()}


def masked_original(case: ZooCase, target: Any, inputs: Inputs) -> Tensor:
    """The original, told by a mask of its own what its queries see: [1, heads, S, S], added to the scores."""
    sites = through_torch(case).matches.sites
    (pattern,) = {target.pattern(site) for site in sites}
    length = inputs["input_ids"].shape[1]
    sights = [
        np.broadcast_to(visible(s, np.arange(length)[:, None], np.arange(length)), (length, length)) for s in pattern
    ]
    shown = np.stack([sights[head % len(sights)] for head in range(case.heads)])[None]
    if case.causal:
        shown = shown & np.tri(length, dtype=bool)
    mask = torch.zeros(shown.shape).masked_fill(~torch.from_numpy(shown), torch.finfo(torch.float32).min)
    mask = mask.expand(inputs["input_ids"].shape[0], -1, -1, -1)
    return case.run(case.build(), {**inputs, "attention_mask": mask})


# ------------------------------------------------------------------ names


def test_names() -> None:
    named = {
        "window": Window(),
        "window:64": Window(64),
        "window:64,0": Window(64, 0),
        "sparse-fixed": SparseFixed(),
        "sparse-fixed:256,16": SparseFixed(256, 16),
        "sparse-fixed:256,16,heads": SparseFixed(256, 16, "heads"),
        "sparse-fixed:alternating": SparseFixed(form="alternating"),
        "sparse-strided:64": SparseStrided(64),
        "sparse-strided:64,heads": SparseStrided(64, "heads"),
    }
    for name, target in named.items():
        assert find(name) == target
        assert find(target.name) == target
    for wrong in (
        "window:",
        "window:0",
        "window:3,",
        "window:1,2,3",
        "window:heads",
        "sparse-fixed:8,9",
        "sparse-fixed:4,0",
    ):
        assert find(wrong) is None, wrong
    with pytest.raises(UnknownTarget, match="sparse-fixed:8,9"):
        rewriter.optimize(nn.Linear(2, 2), "sparse-fixed:8,9", example_inputs=(torch.ones(1, 2),))
    for made in (lambda: Window(0), lambda: SparseFixed(8, 9), lambda: SparseStrided(4, "other")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"width|summary|form"):
            made()


def test_layers_take_turns() -> None:
    sites = through_torch(ZOO["gpt2-sdpa"]).matches.sites
    first, second = (SparseFixed(form="alternating").pattern(s)[0] for s in sites[:2])
    assert (first.block, first.columns, second.block, second.columns) == (128, False, 1, True)
    first, second = (SparseStrided(form="alternating").pattern(s)[0] for s in sites[:2])
    assert (first.reach, first.strided, second.reach, second.strided) == (129, False, 1, True)


# ------------------------------------------------------------------ modules


@pytest.mark.parametrize(("case", "target"), ALIKE)
def test_a_module_is_the_original_with_a_mask(case: ZooCase, target: Any) -> None:
    model = rewritten(case, target)
    for length in (1, 9, 50):
        inputs = unpadded(case.inputs(2, length, 1))
        expected = masked_original(case, target, inputs)
        assert relative(case.run(model, inputs), expected) < CLOSE
    assert relative(case.run(case.build(), inputs), expected) > 1e-2  # the control
    report = model.rewrite_report
    assert [(row.after, row.exact, row.merge) for row in report.sites] == [(target.name, False, "none")] * 2
    assert all(row.error is not None and 0 < row.error < 2 and "are left" in row.notes[0] for row in report.sites)
    assert report.parameters.before == report.parameters.after == sum(p.numel() for p in model.parameters())
    assert report.kv_bytes_per_token.before == report.kv_bytes_per_token.after


@pytest.mark.parametrize("case", SEVERAL)
def test_no_weight_changes_with_or_without_calibration(case: ZooCase) -> None:
    batches = [case.inputs(4, 9, 100 + seed) for seed in range(2)]
    plain, calibrated = rewritten(case, Window(3, 1)), rewritten(case, Window(3, 1), calibration=batches)
    energies = [
        sum(float(p.detach().double().square().sum()) for p in m.parameters())
        for m in (case.build(), plain, calibrated)
    ]
    np.testing.assert_allclose(energies, energies[0], rtol=1e-12)
    inputs = case.inputs(2, 9, 5)
    assert torch.equal(case.run(plain, inputs), case.run(calibrated, inputs))


def test_layers_above_are_merged_by_what_the_pattern_leaves() -> None:
    case = ZOO["bert-sdpa"]
    batches = [case.inputs(4, 9, 100 + seed) for seed in range(4)]
    both = rewritten(case, {"0": Window(1, 0), "1": GroupedQuery(2)}, calibration=batches)
    alone = rewritten(case, {"1": GroupedQuery(2)}, calibration=batches)
    assert [row.after for row in both.rewrite_report.sites] == ["window:1,0", "gqa2"]
    weights = [m.state_dict()["encoder.layer.1.attention.self.q_proj.weight"] for m in (both, alone)]
    assert not torch.allclose(*weights, rtol=1e-3)


def test_narrowed_weights_are_a_softmax_over_fewer_keys() -> None:
    rng = np.random.default_rng(0)
    scores, sinks = rng.standard_normal((2, 4, 7, 7)), rng.standard_normal((2, 4, 7, 1))
    site = through_torch(ZOO["bert-sdpa"]).matches.sites[0]
    for pattern in (Window(2, 1).pattern(site), SparseFixed(3, 1, "heads").pattern(site)):
        for wide in (scores, np.concatenate([scores, sinks], axis=-1)):
            weights = torch.softmax(torch.from_numpy(wide), -1).numpy()[..., :7]
            shown = np.stack(
                [visible(pattern[h % len(pattern)], np.arange(7)[:, None], np.arange(7)) for h in range(4)]
            )
            hidden = np.concatenate([~shown, np.zeros((4, 7, wide.shape[-1] - 7), bool)], axis=-1)
            expected = torch.softmax(torch.from_numpy(np.where(hidden, -np.inf, wide)), -1).numpy()[..., :7]
            np.testing.assert_allclose(narrowed(weights, pattern), expected, rtol=1e-6, atol=1e-9)


def test_the_report_says_when_the_recorded_tokens_are_too_few() -> None:
    model = rewritten(ZOO["gpt2-sdpa"], "window")
    row = model.rewrite_report.sites[0]
    assert row.error == pytest.approx(0, abs=1e-6) and not row.exact
    assert "lie within the pattern" in row.notes[0]


def test_flops_count_what_is_computed() -> None:
    case = ZOO["gpt2-sdpa"]
    inputs = case.inputs(1, 60, 0)
    small = rewriter.optimize(case.build(), SparseFixed(4, 1), example_inputs=inputs).rewrite_report.flops
    same = rewriter.optimize(case.build(), SparseStrided(4), example_inputs=inputs).rewrite_report.flops
    assert small.after < small.before and same.after == same.before  # strides are computed as a mask over all
    report = rewriter.optimize(case.build(), "window", example_inputs=inputs).rewrite_report
    work = {w.tokens: w.mixing for w in report.arithmetic.curve}
    assert work[128][0] == work[128][1] and work[32768][1] < work[32768][0] / 50  # as the report's curve has it


# ------------------------------------------------------------------ caches


@pytest.mark.parametrize(("case", "target"), DECODING)
def test_decoding_with_a_cache_is_the_whole_at_once(case: ZooCase, target: Any) -> None:
    from transformers import StaticCache

    model = rewritten(case, target)
    ids = case.inputs(2, 40, 3)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        prefix = model(input_ids=ids[:, :17], use_cache=False).logits
        grown = model(input_ids=ids[:, :17], use_cache=True)
        fixed = StaticCache(config=model.config, max_cache_len=64)
        still = model(input_ids=ids[:, :17], past_key_values=fixed, use_cache=True)
        assert relative(prefix, whole[:, :17]) < CLOSE
        for cache, first in ((grown.past_key_values, grown), (fixed, still)):
            answers = [first.logits]
            for start, stop in ((17, 18), (18, 25), (25, 26), (26, 40)):
                answers.append(model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
            assert relative(torch.cat(answers, dim=1), whole) < CLOSE
        original = case.build()(input_ids=ids, use_cache=False).logits
    assert relative(original, whole) > 1e-2  # the control


@pytest.mark.parametrize(("case", "target"), pairs((LLAMA, Window(5, 2)), (GPT2, Window(4, 0)), (LLAMA, Window(1, 3))))
def test_a_bounded_cache_answers_as_a_whole_one(case: ZooCase, target: Any) -> None:
    """With padding on the left too, several tokens at a time, and never more than the window and its sinks held."""
    model = rewritten(case, target)
    ids = case.inputs(2, 40, 3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for given in ({}, {"attention_mask": mask}):
        wholes = []
        for cache in (None, rewriter.bounded_cache(model)):
            answers = []
            for start, stop in ((0, 17), (17, 18), (18, 25), (25, 26), (26, 40)):
                part = {name: value[:, :stop] for name, value in given.items()}
                with torch.no_grad():
                    out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **part)
                cache = out.past_key_values
                answers.append(out.logits)
            wholes.append(torch.cat(answers, dim=1))
            held = {layer.keys.shape[2] for layer in cache.layers}
            assert cache.get_seq_length() == 40
        assert held == {target.width - 1 + target.sinks}
        real = torch.ones(2, 40, dtype=torch.bool) if not given else mask.bool()
        assert relative(wholes[1][real], wholes[0][real]) < CLOSE
    with pytest.raises(rewriter.UsageError, match="cropped"):
        cache.layers[0].crop(-1)


def test_a_bounded_cache_generates(tmp_path: Path) -> None:
    case = ZOO[LLAMA]
    model = rewritten(case, Window(4, 1))
    ids = case.inputs(2, 6, 3)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}):
        plain = model.generate(ids, **options, **more)
        assert torch.equal(model.generate(ids, past_key_values=rewriter.bounded_cache(model), **options, **more), plain)
    assert not torch.equal(case.build().generate(ids, **options), plain)  # the control
    for other in (case.build(), rewritten(case, SparseFixed(4, 1))):
        with pytest.raises(rewriter.UsageError, match="causal window"):
            rewriter.bounded_cache(other)


def test_a_bounded_cache_that_lies_is_noticed() -> None:
    """The control: with one key fewer than the window the answers differ."""
    from rewriter.install.bounded_cache import BoundedLayer

    model = rewritten(ZOO[LLAMA], Window(5, 2))
    ids = ZOO[LLAMA].inputs(2, 30, 3)["input_ids"]
    short = rewriter.bounded_cache(model)
    short.layers = [BoundedLayer(4, 2) for _ in short.layers]
    answers = []
    for cache in (rewriter.bounded_cache(model), short):
        with torch.no_grad():
            model(input_ids=ids[:, :25], past_key_values=cache, use_cache=True)
            answers.append(model(input_ids=ids[:, 25:], past_key_values=cache, use_cache=True).logits)
    assert relative(answers[1], answers[0]) > 1e-3


def test_generation_goes_on() -> None:
    case = ZOO["llama-sdpa"]
    model = rewritten(case, SparseFixed(4, 1))
    ids = case.inputs(1, 6, 3)["input_ids"]
    made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        for n in range(6, 18):  # by whole sequences
            assert int(model(input_ids=made[:, :n], use_cache=False).logits[0, -1].argmax()) == int(made[0, n])


def test_a_sliding_cache_keeps_its_positions() -> None:
    """Mistral's own cache drops old keys; sinks that have gone must not be taken for the first ones that are left."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, num_hidden_layers=2, sliding_window=8, **sizes)
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 30))
    for target in (Window(4, 2), SparseFixed(4, 1)):
        fast = rewriter.optimize(model, target, example_inputs={"input_ids": ids[:, :12]})
        with torch.no_grad():
            whole = fast(input_ids=ids, use_cache=False).logits
            out = fast(input_ids=ids[:, :12], use_cache=True)
            answers = [out.logits]
            for n in range(12, 30):
                out = fast(input_ids=ids[:, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
                answers.append(out.logits)
        assert relative(torch.cat(answers, dim=1), whole) < CLOSE


# ------------------------------------------------------------------ what else a module does


def test_a_rewritten_module_trains_compiles_and_exports() -> None:
    case = ZOO["llama-sdpa"]
    model = rewritten(case, SparseFixed(4, 1, "heads"))
    inputs = {"input_ids": case.inputs(2, 40, 0)["input_ids"], "use_cache": False}
    model.train()(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
    model.eval()
    expected = case.run(model, inputs)
    program = torch.export.export(model, (), inputs, strict=False)
    assert relative(program.module()(**inputs).logits, expected) < CLOSE
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(**inputs).logits, expected) < CLOSE
    torch._dynamo.reset()


def test_a_rewritten_model_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case = ZOO["llama-sdpa"]
    model = rewritten(case, {"0": SparseFixed(4, 1, "heads"), "1": "gqa1"})
    model.save_pretrained(tmp_path / "sparse")
    again = rewriter.load(tmp_path / "sparse")
    inputs = case.inputs(2, 40, 1)
    assert torch.equal(case.run(again, inputs), case.run(model, inputs))
    assert relative(case.run(rewritten(case, {"1": "gqa1"}), inputs), case.run(model, inputs)) > 1e-2  # the control
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    manifest = json.loads((tmp_path / "sparse" / "rewrite.json").read_text())
    del manifest["owners"]["model.layers.0.self_attn"]["spec"]["pattern"]  # as older versions wrote it
    (tmp_path / "sparse" / "rewrite.json").write_text(json.dumps(manifest))
    assert not any(m.spec.pattern for m in mixers(rewriter.load(tmp_path / "sparse")).values())


def test_rewriting_again() -> None:
    case = ZOO["gpt2-sdpa"]
    inputs = case.inputs(2, 9, 0)
    window_first = rewriter.optimize(rewritten(case, Window(3, 1)), "gqa2", example_inputs=inputs)
    window_last = rewriter.optimize(rewritten(case, "gqa2"), Window(3, 1), example_inputs=inputs)
    more = case.inputs(2, 30, 2)
    assert relative(case.run(window_first, more), case.run(window_last, more)) < CLOSE
    assert relative(case.run(rewritten(case, "gqa2"), more), case.run(window_last, more)) > 1e-2  # the control
    assert {(m.spec.kv_heads, len(m.spec.pattern)) for m in mixers(window_first).values()} == {(2, 1)}
    with pytest.raises(NothingToRewrite, match="follows a sparse pattern already"):
        rewriter.optimize(window_last, "sparse-fixed", example_inputs=inputs)
    found = rewriter.inspect(window_last, example_inputs=inputs)
    assert len(found.sites) == 2 and all("mask" in [m.kind for m in s.modifiers] or s.causal for s in found.sites)


def test_kernels_that_do_not_exist_are_refused() -> None:
    from rewriter.errors import UsageError

    with pytest.raises(UsageError, match="sparse"):
        rewritten(ZOO["bert-sdpa"], Window(3, 1), kernels="cuda")
    assert rewritten(ZOO["bert-sdpa"], Window(3, 1), kernels="off") is not None


# ------------------------------------------------------------------ refusals


def test_cross_attention_is_refused_and_the_rest_is_not() -> None:
    model = rewritten(ZOO["t5-sdpa"], Window(3, 1))
    report = model.rewrite_report
    assert report.sites and all("positions of two sequences" in r.reason for r in report.refused)
    assert all("EncDec" in r.name for r in report.refused) and not any("EncDec" in row.name for row in report.sites)


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "vocab_size": 64}
    model: nn.Module = AlbertModel(AlbertConfig(num_attention_heads=4, num_hidden_layers=3, **sizes)).eval()
    return model


def test_layers_that_are_one_module_see_the_same() -> None:
    inputs = {"input_ids": ZOO["bert-sdpa"].inputs(2, 9, 3)["input_ids"]}
    model = rewriter.optimize(albert(), SparseFixed(4, 1), example_inputs=inputs)
    assert len(mixers(model)) == 1 and len(model.rewrite_report.sites) == 3
    with pytest.raises(NothingToRewrite, match="cannot take turns"):
        rewriter.optimize(albert(), SparseFixed(4, 1, "alternating"), example_inputs=inputs)


def test_a_forward_that_is_kept_cannot_be_told() -> None:
    class Rotating(nn.Module):
        """Attention that turns its queries in a way of its own, which no mixer reproduces."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, hidden_states: Tensor) -> Tensor:
            q, k, v = (p(hidden_states).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
            angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1])
            q, k = (self.turned(x, angle) for x in (q, k))
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(attended.transpose(1, 2).flatten(2))

        def turned(self, x: Tensor, angle: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    torch.manual_seed(0)
    model, x = nn.Sequential(Rotating()).eval(), torch.randn(2, 9, 16)
    with pytest.raises(NothingToRewrite, match="could not be reproduced with its own weights"):
        rewriter.optimize(model, Window(3, 1), example_inputs=(x,))
    program = rewriter.optimize(torch.export.export(model, (x,)), Window(3, 1))
    assert relative(program.module()(x), model(x)) > 1e-3


# ------------------------------------------------------------------ graphs


@pytest.mark.parametrize(("case", "target"), GRAPHS)
def test_a_program_computes_what_the_module_does(case: ZooCase, target: Any) -> None:
    inputs, model = case.inputs(2, 9, 0), case.build()
    if getattr(model.config, "use_cache", False):
        inputs = {**inputs, "use_cache": False}  # type: ignore[dict-item]
    program = torch.export.export(model, (), inputs, strict=False)
    after = rewriter.optimize(program, target)
    expected = case.run(rewritten(case, target), inputs)
    assert relative(case.run(after.module(), inputs), expected) < CLOSE
    assert relative(case.run(program.module(), inputs), expected) > 1e-2  # the control, and the input as it was
    assert after.rewrite_report.flops.before == after.rewrite_report.flops.after  # a mask over all scores


def test_a_program_keeps_its_dynamic_length(tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    inputs, tokens = case.inputs(2, 8, 0), torch.export.Dim("tokens", min=2, max=64)
    shapes = {name: {1: tokens} for name in inputs}
    program = torch.export.export(case.build(), (), inputs, dynamic_shapes=shapes, strict=False)
    torch.export.save(rewriter.optimize(program, SparseFixed(4, 1)), tmp_path / "sparse.pt2")
    again = torch.export.load(tmp_path / "sparse.pt2")
    module = rewritten(case, SparseFixed(4, 1))
    for length in (8, 5, 13):
        more = case.inputs(2, length, 1)
        assert relative(case.run(again.module(), more), case.run(module, more)) < CLOSE


def test_a_compiled_model_and_a_graph_module_see_less() -> None:
    case = ZOO["mha-batch-first"]
    inputs = case.inputs(2, 12, 0)
    expected = case.run(rewriter.optimize(case.build(), WINDOW, example_inputs=inputs), inputs)
    graph = torch.export.export(case.build(), (), inputs, strict=False).module()
    assert relative(case.run(rewriter.optimize(graph, WINDOW, example_inputs=inputs), inputs), expected) < CLOSE
    torch._dynamo.reset()
    compiled = torch.compile(case.build(), backend="rewriter", options={"target": "window:3,1", "backend": "eager"})
    with torch.no_grad():
        assert relative(case.run(compiled, inputs), expected) < CLOSE
    torch._dynamo.reset()
    assert relative(case.run(case.build(), inputs), expected) > 1e-3  # the control


def test_a_graphs_check_finds_a_wrong_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the check that the graph door makes."""
    from rewriter.errors import UnsupportedModel
    from rewriter.install import fx_editor

    case = ZOO["bert-sdpa"]
    program = torch.export.export(case.build(), (), case.inputs(2, 9, 0), strict=False)
    right = fx_editor._with_order
    monkeypatch.setattr(
        fx_editor, "_with_order", lambda spec: tuple(replace(s, reach=s.reach + 1) for s in right(spec))
    )
    with pytest.raises(UnsupportedModel, match="does not equal"):
        rewriter.optimize(program, Window(3, 1))


# ------------------------------------------------------------------ files


FILES = [
    pytest.param(ZOO[name], exporter, target, id=f"{name}-{exporter}-{target.name}")
    for name, exporter, target in (
        (BERT, "dynamo18", BY_HEAD),
        (BERT, "torchscript17", TURNS),
        (BERT, "dynamo23", FIXED),
        (LLAMA, "dynamo18", TURNS),
        (GPT2, "torchscript17", WINDOW),
    )
]


@pytest.mark.parametrize(("case", "exporter", "target"), FILES)
def test_a_file_computes_what_the_module_does(
    case: ZooCase, exporter: str, target: Any, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    source, out = zoo_onnx(case, exporter), tmp_path / "sparse.onnx"
    before = onnx.load(source)
    dynamic = any(d.dim_param for v in before.graph.input for d in v.type.tensor_type.shape.dim)
    rewriter.optimize(source, target).save(out)
    after = onnx.load(out)
    assert sum(n.domain == "rewriter.ops" for n in after.graph.node) == 2
    assert {t.name: t.raw_data for t in after.graph.initializer if len(t.dims) == 2} == {
        t.name: t.raw_data for t in before.graph.initializer if len(t.dims) == 2
    }
    module = rewritten(case, target)
    for size in ((2, 7, 0), (3, 30, 1)) if dynamic and exporter != "dynamo23" else ((2, 7, 0),):
        inputs = unpadded(case.inputs(*size))
        expected = case.run(module, inputs)
        assert relative(run_file(out, inputs), expected) < CLOSE, (target.name, size)
        assert relative(run_file(source, inputs), expected) > 1e-2  # the control
    assert rewriter.verify(out, source).ok


def session_run(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True))


def test_a_files_cache_goes_on_where_it_was(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """A decoder step, again and again on its own cache, against the module on the whole sequence at once."""
    case = ZOO["llama-gqa-sdpa"]
    source, out = zoo_onnx(case, "dynamo18", past=True), tmp_path / "sparse.onnx"
    for target in (FIXED,):
        rewriter.optimize(source, target).save(out)
        declared = {i.name: i.type.tensor_type for i in onnx.load(out).graph.input}
        ids = case.inputs(2, 20, 4)["input_ids"].numpy()
        caches: dict[str, Array] = {
            n: np.zeros((2, t.shape.dim[1].dim_value, 0, t.shape.dim[3].dim_value), np.float32)
            for n, t in declared.items()
            if n.startswith("past")
        }
        answers = []
        for start, stop in ((0, 9), (9, 10), (10, 14), *((n, n + 1) for n in range(14, 20))):
            feeds = {"input_ids": ids[:, start:stop], "attention_mask": np.ones((2, stop), np.int64), **caches}
            feeds["position_ids"] = np.broadcast_to(np.arange(start, stop), (2, stop - start)).copy()
            outputs = session_run(out, feeds)
            answers.append(outputs["logits"])
            presents = [v for n, v in outputs.items() if n.startswith("present")]
            caches = dict(zip(caches, presents, strict=True))
        expected = case.run(rewritten(case, target), {"input_ids": torch.from_numpy(ids)})
        assert relative(np.concatenate(answers, axis=1), expected) < CLOSE


def test_a_fused_operator_is_told_its_window(tmp_path: Path) -> None:
    """GroupQueryAttention says a window without sinks by itself; what it cannot say is refused."""
    for name, before in (("gqa-rotary", -1), ("gqa-window-softcap", 4)):
        source, out = fused_file(name, tmp_path, tied=False), tmp_path / "out.onnx"
        rewriter.optimize(source, Window(3, 0)).save(out)
        kept = [n for n in onnx.load(out).graph.node if n.op_type == "GroupQueryAttention"]
        sizes = [next(a.i for a in n.attribute if a.name == "local_window_size") for n in kept]
        assert sizes and set(sizes) == {3}
        assert rewriter.verify(out, source).ok
        rewriter.optimize(source, Window(9, 0)).save(out)
        kept = [n for n in onnx.load(out).graph.node if n.op_type == "GroupQueryAttention"]
        sizes = [next(a.i for a in n.attribute if a.name == "local_window_size") for n in kept]
        assert set(sizes) == {9 if before < 0 else before}
    with pytest.raises(NothingToRewrite, match="window without sinks"):
        rewriter.optimize(source, "window")


def test_a_rewritten_file_is_rewritten_again(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case = ZOO["gpt2-sdpa"]
    source, first, second = zoo_onnx(case, "dynamo18"), tmp_path / "a.onnx", tmp_path / "b.onnx"
    rewriter.optimize(source, Window(3, 1)).save(first)
    rewriter.optimize(first, "gqa2").save(second)
    inputs = unpadded(case.inputs(3, 30, 1))
    module = rewriter.optimize(rewritten(case, Window(3, 1)), "gqa2", example_inputs=case.inputs(2, 9, 0))
    assert relative(run_file(second, inputs), case.run(module, inputs)) < CLOSE
