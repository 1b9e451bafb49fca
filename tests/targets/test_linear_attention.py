"""Linear attention in place of attention that keeps its heads: modules, causal or not, caches, saving, training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewriter
from codegen.spec import FeatureMap
from passes.targets import LinearHeads
from passes.targets.auto import Auto
from passes.targets.catalogue import find
from rewriter import Recipe
from rewriter.errors import (
    InvalidModelFile,
    RewriteError,
    UnknownTarget,
    UsageError,
)
from rewriter.install.checkpoint_folder import MANIFEST
from rewriter.install.torch_module import mixers
from tests.targets.watched_mixes import relative
from tests.uptrain.small_models import bert, llama, token_ids
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

CLOSE = 2e-5
BERT, LLAMA = ZOO["bert-sdpa"], ZOO["llama-sdpa"]
MODELS = [pytest.param(BERT, id="bert"), pytest.param(LLAMA, id="llama")]
TARGETS = [pytest.param(LinearHeads(4, f), id=f.value) for f in FeatureMap]


def rewritten(case: ZooCase, target: Any, **options: Any) -> Any:
    return rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 30, 0), **options)


def unpadded(case: ZooCase, length: int) -> dict[str, Any]:
    inputs = case.inputs(2, length, 1)
    return {n: torch.ones_like(v) if n == "attention_mask" else v for n, v in inputs.items()}


def test_names() -> None:
    named = {
        "linear": LinearHeads(),
        "linear:32": LinearHeads(32),
        "linear:elu1": LinearHeads(features=FeatureMap.ELU1),
        "linear:128,favor+": LinearHeads(128, FeatureMap.FAVOR),
    }
    for name, target in named.items():
        assert find(name) == target and find(target.name) == target
    for wrong in ("linear:", "linear:0", "linear:,elu1", "linear:32,", "linear:other", "auto:gqa2+linear"):
        assert find(wrong) is None, wrong
    with pytest.raises(UnknownTarget, match="linear:0"):
        rewriter.optimize(torch.nn.Linear(2, 2), "linear:0", example_inputs=(torch.ones(1, 2),))
    for made in (lambda: LinearHeads(0), lambda: Auto(candidates=(LinearHeads(),))):
        with pytest.raises(ValueError, match=r"chunk|weighed"):
            made()


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("target", TARGETS)
def test_two_chunks_are_the_original_and_more_are_not(case: ZooCase, target: LinearHeads) -> None:
    model = rewritten(case, target)
    for length, same in ((1, True), (8, True), (30, False)):
        inputs = unpadded(case, length)
        apart = relative(case.run(model, inputs), case.run(case.build(), inputs))
        assert apart < CLOSE if same else apart > 1e-3, length
    report = model.rewrite_report
    assert [(row.after, row.exact, row.merge) for row in report.sites] == [(target.name, False, "initialised")] * 2
    assert all(row.error is not None and 0 < row.error < 2 for row in report.sites)
    assert report.parameters.after == sum(p.numel() for p in model.parameters()) > report.parameters.before
    assert report.kv_bytes_per_token.after == (0 if case is LLAMA else report.kv_bytes_per_token.before)
    assert report.kv_bytes_per_token.before > 0
    work = {w.tokens: w.mixing for w in report.arithmetic.curve}
    assert work[32768][1] < work[32768][0] / 50 and work[32768][1] == 2 * work[16384][1]


def test_the_row_says_what_the_module_does() -> None:
    """Its error, computed on the recording, is that of the first module's own output."""
    model, original, inputs = rewritten(BERT, "linear:4"), BERT.build(), BERT.inputs(2, 30, 0)
    seen: list[torch.Tensor] = []
    path = next(iter(mixers(model)))
    for module in (model, original):
        module.get_submodule(path).register_forward_hook(lambda *a: seen.append(a[-1][0].detach()))
        BERT.run(module, inputs)
    error = float((seen[0] - seen[1]).norm() / seen[1].norm())
    assert model.rewrite_report.sites[0].error == pytest.approx(error, rel=1e-3)


def test_padding_is_hidden_and_other_masks_are_refused() -> None:
    model = rewritten(BERT, "linear:4")
    inputs = unpadded(BERT, 30)
    mask = inputs["attention_mask"].clone()
    mask[1, 20:] = 0
    short = {n: v[1:, :20] for n, v in inputs.items()}
    with torch.no_grad():
        padded = model(**{**inputs, "attention_mask": mask})[0]
        assert relative(padded[1:, :20], model(**short)[0]) < CLOSE
        assert relative(model(**inputs)[0][1:, :20], model(**short)[0]) > 1e-3  # the control
        odd = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril(3)
        with pytest.raises(TypeError, match="more than that"):
            model(**{**inputs, "attention_mask": odd})


def test_a_mask_of_keys_alone_is_read() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    x, hidden = torch.randn(2, 20, 16), torch.zeros(2, 20, dtype=torch.bool)
    hidden[1, 13:] = True
    fast = rewriter.optimize(layer, "linear:4", example_inputs=(x, None, hidden))
    with torch.no_grad():
        padded = fast(x, None, hidden)
        assert relative(padded[1:, :13], fast(x[1:, :13], None, hidden[1:, :13])) < CLOSE
        assert relative(layer(x, None, hidden)[1:, :13], padded[1:, :13]) > 1e-3  # the control


def test_later_tokens_leave_no_trace_and_decoding_is_the_whole_at_once() -> None:
    model = rewritten(LLAMA, "linear:4")
    ids = LLAMA.inputs(2, 30, 3)["input_ids"]
    changed = ids.clone()
    changed[:, 21] = (changed[:, 21] + 1) % 50
    with torch.no_grad():
        whole, other = (model(input_ids=i, use_cache=False).logits for i in (ids, changed))
        assert torch.equal(whole[:, :21], other[:, :21]) and not torch.equal(whole[:, 21:], other[:, 21:])
        out = model(input_ids=ids[:, :13], use_cache=True)
        answers = [out.logits]
        for start, stop in ((13, 14), (14, 21), (21, 22), (22, 30)):
            out = model(input_ids=ids[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
            answers.append(out.logits)
        assert relative(torch.cat(answers, dim=1), whole) < CLOSE
        mask = torch.ones_like(ids)
        mask[1, :6] = 0
        left = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        out = model(input_ids=ids[:, :13], attention_mask=mask[:, :13], use_cache=True)
        later = model(input_ids=ids[:, 13:], attention_mask=mask, past_key_values=out.past_key_values)
        assert relative(later.logits, left[:, 13:]) < CLOSE
    made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        for n in range(30, 36):
            assert torch.equal(model(input_ids=made[:, :n], use_cache=False).logits[:, -1].argmax(-1), made[:, n])


def test_a_preallocated_cache_and_wished_weights_are_refused() -> None:
    from transformers import StaticCache

    model = rewritten(LLAMA, "linear:4")
    ids = LLAMA.inputs(1, 9, 3)["input_ids"]
    with pytest.raises(TypeError, match="DynamicCache"):
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=32), use_cache=True)
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    fast = rewriter.optimize(layer, "linear:4", example_inputs=(torch.randn(1, 20, 16),))
    x = torch.randn(1, 20, 16)
    with pytest.raises(TypeError, match="weights"):
        fast.self_attn(x, x, x, need_weights=True)
    with pytest.raises(UsageError, match="no cuda kernel of linear"):
        rewritten(LLAMA, "linear:4", kernels="cuda")


@pytest.mark.parametrize("target", ["linear:4", "linear:4,favor+"])
def test_saved_and_loaded(target: str, tmp_path: Path) -> None:
    model = rewritten(LLAMA, target)
    with torch.no_grad():
        for mixer in mixers(model).values():
            assert mixer.linear_term is not None
            mixer.linear_term.log_gain += 0.5  # as training would
    rewriter.save(model, tmp_path / "saved")
    loaded = rewriter.load(tmp_path / "saved")
    inputs = LLAMA.inputs(2, 30, 1)
    assert torch.equal(LLAMA.run(loaded, inputs), LLAMA.run(model, inputs))
    assert relative(LLAMA.run(rewritten(LLAMA, target), inputs), LLAMA.run(loaded, inputs)) > 1e-4  # the control
    manifest = tmp_path / "saved" / MANIFEST
    described = json.loads(manifest.read_text())
    next(iter(described["owners"].values()))["linear"]["features"] = "other"
    manifest.write_text(json.dumps(described))
    with pytest.raises(InvalidModelFile):
        rewriter.load(tmp_path / "saved")


def test_rewritten_models_are_refused() -> None:
    with pytest.raises(RewriteError):
        rewriter.optimize(rewritten(BERT, "linear:4"), "gqa2", example_inputs=BERT.inputs(2, 30, 0))


def test_compiled_and_exported() -> None:
    """A program takes any batch and length."""
    model = rewritten(LLAMA, "linear:4")
    inputs = {"input_ids": LLAMA.inputs(2, 30, 1)["input_ids"], "use_cache": False}
    expected = LLAMA.run(model, inputs)
    free = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
    program = torch.export.export(model, (), inputs, dynamic_shapes=free, strict=False)
    for batch, length in ((2, 30), (3, 61), (2, 7)):
        more = {"input_ids": LLAMA.inputs(batch, length, 2)["input_ids"], "use_cache": False}
        assert relative(program.module()(**more).logits, LLAMA.run(model, more)) < CLOSE
    with torch.no_grad():
        assert relative(torch.compile(model, backend="aot_eager")(**inputs).logits, expected) < CLOSE
    torch._dynamo.reset()
    assert relative(LLAMA.run(LLAMA.build(), inputs), expected) > 1e-3  # the control


def test_inspection_names_it_for_modules() -> None:
    assert all("linear" in names for names in rewriter.inspect(BERT.build()).targets.values() if "mqa" in names)


def test_calibration_fits_nothing_and_says_so() -> None:
    batches = [BERT.inputs(4, 30, 100 + seed) for seed in range(2)]
    model = rewritten(BERT, {"0": "linear:4", "1": "gqa2"}, calibration=batches)
    rows = model.rewrite_report.sites
    assert [r.after for r in rows] == ["linear:4", "gqa2"] and "calibration" in rows[0].notes[-1]


@pytest.mark.parametrize("build", [pytest.param(bert, id="bert"), pytest.param(llama, id="llama")])
def test_uptraining_trains_the_features(build: Callable[[], Any]) -> None:
    """Phase one is attention transfer: the new layers learn to give what the old ones gave."""
    teacher = build()
    student = rewriter.optimize(teacher, "linear:8", verify=False)
    before = {n: p.detach().clone() for n, p in student.named_parameters() if "linear_term" in n}
    recipe = Recipe(steps=30, batch=4, window=64, learning_rate=3e-3, validation=8, layer_phase=1.0, train="rewritten")
    rows = [{"input_ids": row.tolist()} for row in token_ids(64 * 60).reshape(-1, 64)]
    done = rewriter.uptrain(student, teacher, rows, recipe=recipe)
    after = dict(done.model.named_parameters())
    assert len(before) == 6 and all(not torch.equal(after[n], p) for n, p in before.items())
    losses = [point.loss for point in done.curve]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
