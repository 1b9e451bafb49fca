"""Keys and values with different numbers of heads: modules, caches, calibration, saving, and where it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewriter
from codegen.ops.decoupled_attention import reference, torch_body
from codegen.spec import DecoupledAttention, GroupedQueryAttention
from passes.targets import DecoupledHeads, GroupedQuery
from passes.targets.catalogue import find
from rewriter import Recipe
from rewriter.errors import InvalidModelFile, NothingToRewrite, UnsupportedModel, UsageError
from rewriter.install.checkpoint_folder import MANIFEST
from rewriter.install.torch_module import mixers
from tests.targets.lossless_twin import distance
from tests.targets.test_calibration import batches, relative
from tests.uptrain.small_models import llama, token_ids
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

BERT, LLAMA, WHISPER = ZOO["bert-sdpa"], ZOO["llama-sdpa"], ZOO["whisper-sdpa"]
LENGTH = 12


def counts(case: ZooCase) -> tuple[int, int]:
    """(keys, values): one head, and the most that are fewer than there are."""
    site = rewriter.inspect(case.build()).sites[0]
    legal = GroupedQuery(1).legal(site)
    return legal[0], legal[-2] if len(legal) > 2 else legal[-1]


def rewritten(case: ZooCase, target: Any, model: Any = None, **options: Any) -> Any:
    return rewriter.optimize(model or case.build().eval(), target, example_inputs=case.inputs(2, LENGTH, 0), **options)


def averaged(case: ZooCase, heads: int, keys: int, values: int) -> Any:
    """The original, each head in the place of which is the mean of its group."""
    model = case.build().eval()
    names = {"k_proj": keys, "key": keys, "v_proj": values, "value": values}
    for name, module in model.named_modules():
        count = names.get(name.rpartition(".")[2])
        if count is None:
            continue
        with torch.no_grad():
            for parameter in module.parameters():
                grouped = parameter.view(count, heads // count, -1, *parameter.shape[1:])
                grouped[:] = grouped.double().mean(dim=1, keepdim=True).to(parameter.dtype).expand_as(grouped).clone()
    return model


def test_names() -> None:
    assert find("dha") == DecoupledHeads() and find("dha:2,4") == DecoupledHeads(2, 4)
    assert find(DecoupledHeads(2, 4).name) == DecoupledHeads(2, 4)
    for wrong in ("dha:", "dha:2", "dha:0,4", "dha:2,4,8", "auto:gqa2+dha"):
        assert find(wrong) is None, wrong
    with pytest.raises(ValueError, match="both"):
        DecoupledHeads(2)


@pytest.mark.parametrize(("keys", "values"), [(1, 4), (4, 1), (2, 6), (3, 2)])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_the_body_computes_the_definition(keys: int, values: int, masked: bool) -> None:
    g = np.random.default_rng(keys)
    heads = 12
    plain = GroupedQueryAttention(heads, int(np.lcm(keys, values)), 8, 6, 0.3, causal=not masked, bias=masked)
    spec = DecoupledAttention(plain, keys, values)
    q, k, v = (g.normal(size=(2, n, 7, d)) for n, d in ((heads, 8), (keys, 8), (values, 6)))
    bias = g.normal(size=(2, 1, 7, 7)) if masked else None
    wished = reference.decoupled_attention(spec, q, k, v, bias)
    given = torch_body.decoupled_attention(
        spec, *map(torch.from_numpy, (q, k, v)), None if bias is None else torch.from_numpy(bias)
    )
    np.testing.assert_allclose(given.numpy(), wished, atol=1e-9)
    turned = reference.decoupled_attention(spec, q, np.roll(k, 1, axis=1), np.roll(v, 1, axis=1), bias)
    assert np.abs(turned - wished).max() > 1e-2  # control: which head a query reads counts


def test_numbers_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="multiple"):
        DecoupledAttention(GroupedQueryAttention(12, 6, 8, 8, 1.0), 4, 6)
    with pytest.raises(ValueError, match="divide"):
        DecoupledAttention(GroupedQueryAttention(12, 5, 8, 8, 1.0), 5, 1)
    spec = DecoupledAttention(GroupedQueryAttention(12, 6, 8, 8, 1.0), 2, 6)
    with pytest.raises(ValueError, match="contradict"):
        reference.check(spec, (1, 6, 3, 8), (1, 6, 3, 8))


@pytest.mark.parametrize(
    "case", [pytest.param(BERT, id="bert"), pytest.param(LLAMA, id="llama"), pytest.param(WHISPER, id="whisper")]
)
def test_merged_heads_are_the_mean_of_each_group(case: ZooCase) -> None:
    """The rewritten model is the original with every key head replaced by its group's mean, and every value head."""
    keys, values = counts(case)
    small = rewritten(case, DecoupledHeads(keys, values))
    assert {m.kv_heads for m in mixers(small).values()} == {(keys, values)}
    inputs, heads = case.inputs(2, LENGTH, 3), rewriter.inspect(case.build()).sites[0].kv_heads
    wished = case.run(averaged(case, heads, keys, values), inputs)
    torch.testing.assert_close(case.run(small, inputs), wished, atol=2e-5, rtol=1e-4)
    other = case.run(averaged(case, heads, values, keys), inputs)  # control
    assert float((other - wished).abs().max()) > 1e-3
    row = small.rewrite_report.sites[0]
    assert row.after == f"dha:{keys},{values}" and not row.exact and row.error > 0


def test_a_model_whose_heads_are_equal_stays_as_it_is() -> None:
    case = LLAMA
    model = case.build().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            k = attention.k_proj.weight.view(-1, attention.head_dim, attention.k_proj.weight.shape[1])
            k[:] = k[:1].clone()
    heads = rewriter.inspect(model).sites[0].kv_heads
    inputs = case.inputs(2, LENGTH, 3)
    before = case.run(model, inputs)
    small = rewritten(case, DecoupledHeads(1, heads), model)
    assert all(row.exact for row in small.rewrite_report.sites)
    assert distance(before, case.run(small, inputs)) < 1e-5
    lossy = rewritten(case, DecoupledHeads(heads, 1), model)  # control: values are not equal
    assert not any(row.exact for row in lossy.rewrite_report.sites)
    assert distance(before, case.run(lossy, inputs)) > 1e-3


def test_the_cache_holds_each_head_once_and_decoding_goes_on() -> None:
    keys, values = counts(LLAMA)
    small = rewritten(LLAMA, DecoupledHeads(keys, values))
    ids = LLAMA.inputs(2, LENGTH, 5)["input_ids"]
    with torch.no_grad():
        whole = small(ids).logits
        first = small(ids[:, :7], use_cache=True)
        layer = first.past_key_values.layers[0]
        assert (layer.keys.shape[1], layer.values.shape[1]) == (keys, values)
        rest = small(ids[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 7:], atol=1e-4, rtol=1e-4)
    assert small.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2).shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize("case", [pytest.param(BERT, id="bert"), pytest.param(LLAMA, id="llama")])
def test_calibration_brings_it_closer_and_more_heads_are_closer_still(case: ZooCase) -> None:
    keys, values = counts(case)
    model = case.build().eval()
    errors = [
        relative(case, model, rewritten(case, target, model, calibration=data, verify=False))
        for target, data in (
            (DecoupledHeads(keys, values), None),
            (DecoupledHeads(keys, values), batches(case)),
            (DecoupledHeads(keys, keys), batches(case)),
        )
    ]
    assert errors[1] < 0.9 * errors[0], errors
    assert errors[1] < errors[2], errors


def test_it_is_saved_and_loaded_and_counted(tmp_path: Path) -> None:
    keys, values = counts(LLAMA)
    small = rewritten(LLAMA, DecoupledHeads(keys, values))
    small.save_pretrained(tmp_path / "small")
    loaded = rewriter.load(tmp_path / "small")
    inputs = LLAMA.inputs(2, LENGTH, 3)
    assert torch.equal(LLAMA.run(loaded, inputs), LLAMA.run(small, inputs))
    site = rewriter.inspect(LLAMA.build()).sites[0]
    numbers = keys * site.head_dim + values * site.value_dim
    cached = small.rewrite_report.kv_bytes_per_token
    assert cached.after == 4 * numbers * len(small.rewrite_report.sites)
    terms = small.rewrite_report.arithmetic.cache
    assert sum(t.numbers[1] for t in terms) * 4 == cached.after
    assert small.rewrite_report.parameters.after == sum(p.numel() for p in small.parameters())
    manifest = tmp_path / "small" / MANIFEST
    described = json.loads(manifest.read_text())
    next(iter(described["owners"].values()))["apart"] = [5, 7]
    manifest.write_text(json.dumps(described))
    with pytest.raises(InvalidModelFile):
        rewriter.load(tmp_path / "small")


def test_uptraining_goes_on_from_there() -> None:
    teacher = llama()
    student = rewriter.optimize(teacher, DecoupledHeads(1, 2), verify=False)
    before = {n: p.detach().clone() for n, p in student.named_parameters() if "k_proj" in n or "v_proj" in n}
    recipe = Recipe(steps=30, batch=4, window=32, learning_rate=3e-3, validation=8, layer_phase=1.0, train="rewritten")
    rows = [{"input_ids": row.tolist()} for row in token_ids(32 * 60).reshape(-1, 32)]
    done = rewriter.uptrain(student, teacher, rows, recipe=recipe)
    after = dict(done.model.named_parameters())
    assert before and all(not torch.equal(after[n], p) for n, p in before.items())
    losses = [point.loss for point in done.curve]
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:3])


def test_wrong_numbers_are_wrong_usage() -> None:
    with pytest.raises(UsageError) as error:
        rewritten(BERT, "dha:3,7")
    assert "legal numbers" in error.value.hint


def test_graphs_files_and_rewritten_models_are_refused(zoo_onnx: Callable[..., Path]) -> None:
    target = DecoupledHeads(*counts(BERT))
    program = torch.export.export(BERT.build().eval(), (), dict(BERT.inputs(2, LENGTH, 0)))
    for model in (program, zoo_onnx(BERT, "torchscript17")):
        with pytest.raises((NothingToRewrite, UnsupportedModel), match="torch modules only"):
            rewriter.optimize(model, target)
    small = rewritten(LLAMA, DecoupledHeads(*counts(LLAMA)))
    with pytest.raises((NothingToRewrite, UnsupportedModel)):
        rewritten(LLAMA, "window:8", small)


def test_inspect_lists_it_for_modules(zoo_onnx: Callable[..., Path]) -> None:
    assert all("dha" in names for names in rewriter.inspect(BERT.build()).targets.values() if "mqa" in names)
    assert not any("dha" in names for names in rewriter.inspect(zoo_onnx(BERT, "torchscript17")).targets.values())
