"""Gated attention units in place of attention, through modules and files, causal or not, by weights or fitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import rewriter
from codegen.ops.mixed_chunk_attention.torch_body import ChunkState
from codegen.ops.token_mixing import from_json, to_json
from codegen.ops.token_mixing import token_mixing as oracle
from codegen.spec import GatedAttention, MixedChunkAttention
from passes.targets import GatedUnit
from passes.targets.catalogue import find
from passes.weights.unit_refit import OutputSums
from rewriter.install.token_mixer import token_mixers
from tests.targets.lossless_twin import run_file
from tests.targets.watched_mixes import Watched, off, relative, rewritten
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

Array = NDArray[Any]
ZooOnnx = Callable[..., Path]
CLOSE = 2e-5

TARGETS = ("gau", "flash:4")
CASES = [pytest.param(ZOO[n], id=n) for n in ("bert-sdpa", "gpt2-sdpa", "llama-gqa-sdpa")]


def parameters(mixer: nn.Module) -> dict[str, Array]:
    return {name: p.detach().numpy() for name, p in mixer.named_parameters(recurse=False)}


def test_a_rewritten_module_is_the_oracle_of_its_input() -> None:
    for name in ("bert-sdpa", "gpt2-sdpa"):
        for target in TARGETS:
            model = rewritten(ZOO[name], target)
            mixed, report = token_mixers(model), model.rewrite_report
            assert len(mixed) == len(report.sites) and {row.after for row in report.sites} == {target}
            assert {row.merge for row in report.sites} == {"initialised"}
            assert not any(row.exact for row in report.sites)
            watched = Watched(model)
            for size in ((2, 7, 0), (3, 12, 1)):
                ZOO[name].run(model, ZOO[name].inputs(*size))
                for path, (hidden, answer) in watched.mixes.items():
                    held = parameters(mixed[path])
                    assert off(answer, oracle(mixed[path].spec, hidden, **held)) < CLOSE
                    moved = held | {"distances": np.roll(held["distances"], 1)}
                    assert off(answer, oracle(mixed[path].spec, hidden, **moved)) > 1e-3  # the control
            assert report.parameters.after == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_a_file_computes_what_the_module_does(case: ZooCase, target: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    out = tmp_path / "unit.onnx"
    module = rewritten(case, target)
    source = zoo_onnx(case, "dynamo18")
    rewriter.optimize(source, target).save(out)
    assert sum(n.domain == "rewriter.ops" for n in onnx.load(out).graph.node) == len(token_mixers(module))
    for size in ((2, 7, 0), (3, 12, 1)):
        inputs = case.inputs(*size)
        assert relative(run_file(out, inputs), case.run(module, inputs)) < CLOSE
        assert relative(run_file(source, inputs), case.run(module, inputs)) > 1e-3  # the control
    assert rewriter.verify(out, source).ok


@pytest.mark.parametrize("target", TARGETS)
def test_a_causal_model_stays_causal(target: str) -> None:
    case = ZOO["gpt2-sdpa"]
    model = rewritten(case, target)
    assert all(m.spec.causal for m in token_mixers(model).values())
    before = {n: v.clone() for n, v in case.inputs(2, 12, 0).items()}
    after = {n: v.clone() for n, v in before.items()}
    after["input_ids"][:, 8] = (after["input_ids"][:, 8] + 1) % 7
    first, second = (case.run(model, given) for given in (before, after))
    assert torch.equal(first[:, :8], second[:, :8]) and not torch.allclose(first[:, 8:], second[:, 8:])


@pytest.mark.parametrize("target", TARGETS)
def test_a_fit_comes_nearer_and_both_doors_fit_alike(target: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case, out = ZOO["bert-sdpa"], tmp_path / "unit.onnx"
    batches = [{n: v.numpy() for n, v in case.inputs(4, 9, 100 + seed).items()} for seed in range(4)]
    module, plain = rewritten(case, target, calibration=batches), rewritten(case, target)
    rows = module.rewrite_report.sites
    assert {row.merge for row in rows} == {"output"} and all("explains" in row.notes[0] for row in rows)
    original = case.build()
    missed = [0.0, 0.0]
    for batch in batches:
        inputs = {n: torch.from_numpy(v) for n, v in batch.items()}
        wished = case.run(original, inputs)
        for number, model in enumerate((module, plain)):
            missed[number] += float((case.run(model, inputs) - wished).square().sum())
    assert missed[0] < 0.8 * missed[1]
    rewriter.optimize(zoo_onnx(case, "dynamo18"), target, calibration=batches).save(out)
    inputs = case.inputs(2, 7, 0)
    assert relative(run_file(out, inputs), case.run(module, inputs)) < 1e-3
    assert relative(run_file(out, inputs), case.run(plain, inputs)) > 1e-2  # the control: no fit


def test_a_rewritten_module_trains_and_is_saved(tmp_path: Path) -> None:
    case = ZOO["gpt2-sdpa"]
    model = rewritten(case, {"0": "flash:4", "1": "gau"})
    inputs = case.inputs(2, 12, 0)
    case.run(model.train(), inputs)
    model(**inputs)[0].square().sum().backward()  # with the cache that models make unless told not to
    for mixer in token_mixers(model).values():
        grads = {n: float(p.grad.abs().sum()) for n, p in mixer.named_parameters(recurse=False) if p.grad is not None}
        assert set(grads) == set(mixer.spec.shapes) and all(grads.values()), grads
    expected = case.run(model.eval(), inputs)
    model.save_pretrained(tmp_path / "units")
    again = rewriter.load(tmp_path / "units")
    assert [m.spec for m in token_mixers(again).values()] == [m.spec for m in token_mixers(model).values()]
    assert torch.equal(case.run(again, inputs), expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["gpt2-sdpa", "llama-gqa-sdpa"])
def test_generation_with_a_cache_is_that_without(name: str, target: str) -> None:
    """One by one, by beams that change places, and several answers to one prompt; past a chunk's end."""
    case = ZOO[name]
    model = rewritten(case, target)
    prompt = case.inputs(2, 6, 0)["input_ids"]
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
    for way in ways:
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **way}
        with_cache = model.generate(prompt, use_cache=True, **options)
        without = model.generate(prompt, use_cache=False, **options)
        assert torch.equal(with_cache, without) and with_cache.shape[1] == 15
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        states = list(cache.gated_unit_states.values())
        assert len(states) == len(token_mixers(model)) and {s.position for s in states} == {6}
        cache.crop(-2)
        with pytest.raises(TypeError, match="was cut"):
            model(prompt[:, :1], past_key_values=cache)
    states[0].select(torch.tensor([1, 0]))
    swapped = [states[0].values, states[0].keys]
    states[0].select(torch.tensor([0, 1]))
    assert swapped[0] is states[0].values and swapped[1] is states[0].keys


@pytest.mark.parametrize("target", TARGETS)
def test_units_are_proved_on_a_call_that_keeps_a_cache(target: str) -> None:
    case = ZOO["llama-gqa-sdpa"]
    given = {"input_ids": case.inputs(2, 9, 0)["input_ids"], "use_cache": True}
    model = rewriter.optimize(case.build(), target, example_inputs=given)
    assert len(token_mixers(model)) == 2


@pytest.mark.parametrize(("name", "target"), [("bart-sdpa", "flash:4"), ("t5-sdpa", "gau")])
def test_a_decoder_that_reads_an_encoder_keeps_states_in_its_own_cache(name: str, target: str) -> None:
    case = ZOO[name]
    model, inputs = rewritten(case, {"decoder": target}), case.inputs(2, 9, 0)
    decoded = inputs.pop("decoder_input_ids")
    assert len(token_mixers(model)) == 2 and decoded.shape[1] > 4
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=decoded, use_cache=False).logits
        first = model(**inputs, decoder_input_ids=decoded[:, :4], use_cache=True)
        rest = model(**inputs, decoder_input_ids=decoded[:, 4:], past_key_values=first.past_key_values).logits
    assert (torch.cat([first.logits, rest], 1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert (whole[:, 4:] - whole[:, 3:4]).abs().max() > 1e-2, "the control: steps differ"


def test_beams_that_leave_their_states_behind_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    case = ZOO["gpt2-sdpa"]
    model = rewritten(case, "flash:4")
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": 4}
    prompts = [case.inputs(2, 6, seed)["input_ids"] for seed in range(4)]
    right = [model.generate(prompt, use_cache=False, **options) for prompt in prompts]
    monkeypatch.setattr(ChunkState, "select", lambda self, rows: None)
    wrong = [model.generate(prompt, use_cache=True, **options) for prompt in prompts]
    assert any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


def test_a_cache_filled_with_gradients_cannot_be_gone_on_with() -> None:
    case = ZOO["gpt2-sdpa"]
    model, prompt = rewritten(case, "flash:4"), case.inputs(2, 6, 0)["input_ids"]
    cache = model(prompt, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(TypeError, match="without gradients"):
        model(prompt[:, :1], past_key_values=cache)


def test_the_refit_finds_what_there_is_and_says_what_it_explains() -> None:
    rng = np.random.default_rng(0)
    features, weight, bias = rng.standard_normal((400, 6)), rng.standard_normal((4, 6)), rng.standard_normal(4)
    output = features @ weight.T + bias + 0.1 * rng.standard_normal((400, 4))
    sums = OutputSums()
    for part in range(4):
        rows = slice(100 * part, 100 * part + 100)
        sums.add(features[rows], output[rows])
    fit = sums.solve(np.zeros((4, 6)), np.zeros(4))
    missed = float(((fit.output(features) - output) ** 2).sum() / (output**2).sum())
    assert np.abs(fit.tensors["out_weight"] - weight).max() < 0.03
    assert fit.explained == pytest.approx(1 - missed, abs=2e-3) and fit.explained < 1 - missed
    assert fit.constant == pytest.approx(float((output.mean(0) ** 2).sum() * 400 / (output**2).sum()))
    assert fit.constant < fit.explained


def test_a_refit_to_noise_stays_near_what_was_known() -> None:
    """Thirty features, forty tokens, and outputs that have nothing to do with them beyond the known projection."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 30))
    features, later = rng.standard_normal((40, 30)), rng.standard_normal((400, 30))

    def outputs(x: Array) -> Array:
        return x @ weight.T + 3 * rng.standard_normal((len(x), 4))

    sums, given = OutputSums(), outputs(features)
    sums.add(features, given)
    fit, wished = sums.solve(weight, np.zeros(4)), outputs(later)
    plain = np.linalg.lstsq(features, given, rcond=None)[0].T
    error = float(((fit.output(later) - wished) ** 2).sum())
    assert error < 1.15 * float(((later @ weight.T - wished) ** 2).sum())
    assert float(((later @ plain.T - wished) ** 2).sum()) > 1.5 * error  # the control: nothing held


def test_names_and_specs() -> None:
    assert find("gau") == GatedUnit("gau") and find("flash-quad") == GatedUnit("flash-quad")
    assert find("flash") == GatedUnit("flash") and find("flash:64") == GatedUnit("flash", 64)
    assert GatedUnit("flash", 64).name == "flash:64" and GatedUnit("flash").name == "flash"
    assert find("flash:0") is None and find("gau:3") is None
    with pytest.raises(ValueError, match="chunk"):
        GatedUnit("flash", 0)
    for name, kind in (("gau", GatedAttention), ("flash:4", MixedChunkAttention)):
        for mixer in token_mixers(rewritten(ZOO["bert-sdpa"], name)).values():
            assert isinstance(mixer.spec, kind) and from_json(to_json(mixer.spec)) == mixer.spec


def test_cross_attention_is_refused() -> None:
    case = ZOO["t5-eager"]
    sites = rewriter.inspect(case.build(), example_inputs=case.inputs(2, 7, 0)).to_dict()["sites"]
    crossing = [s for s in sites if s["cross"]]
    assert crossing and not any({"gau", "flash"} & set(s["targets"]) for s in crossing)
