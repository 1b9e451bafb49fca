"""Two gated units in the place of an attention and its feed-forward block, through modules and files, causal or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import rewriter
from codegen.ops.token_mixing import token_mixing as oracle
from passes.targets.catalogue import find
from passes.targets.gated_pair import SEEN, GatedPair, UnitBlocks, gated_pair
from passes.targets.gated_unit import GatedUnit
from rewriter.install import module_sites
from rewriter.install.token_mixer import token_mixers
from rewriter.install.unit_block import NO_UNIT, unit_blocks
from tests.targets.lossless_twin import run_file
from tests.targets.watched_mixes import off, relative, rewritten
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

ZooOnnx = Callable[..., Path]
CLOSE = 2e-5
TARGETS = ("gau:pair", "flash:4,pair")
CASES = [pytest.param(ZOO[n], id=n) for n in ("bert-sdpa", "gpt2-sdpa", "llama-gqa-sdpa")]
"""Post-norm and pre-norm, plain and gated."""


def watched(model: torch.nn.Module, case: ZooCase, size: tuple[int, int, int]) -> dict[str, tuple[Any, Any]]:
    """What each block's unit was given and answered on one call."""
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = [
        block.register_forward_hook(
            lambda _, given, answer, path=path: seen.update({path: (given[0].numpy(), answer.numpy())})
        )
        for path, block in unit_blocks(model).items()
    ]
    case.run(model, case.inputs(*size))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_a_block_becomes_a_unit_that_is_nearly_the_block(case: ZooCase, target: str) -> None:
    model, single = rewritten(case, target), rewritten(case, target.removesuffix("pair").rstrip(":,"))
    blocks = unit_blocks(model)
    assert len(blocks) == len(token_mixers(model)) == len(token_mixers(single)) and not unit_blocks(single)
    rows = [row for row in model.rewrite_report.sites if row.before.startswith("ffn")]
    assert len(rows) == len(blocks) and all(0 < row.error < 5 * SEEN and not row.exact for row in rows)
    inputs = case.inputs(2, 9, 0)
    apart = relative(case.run(model, inputs), case.run(single, inputs))
    assert 0 < apart < 10 * SEEN, "the feed-forward block is there, and a little of other tokens"
    for path, (given, answer) in watched(model, case, (2, 9, 0)).items():
        held = {name: p.detach().numpy() for name, p in blocks[path].named_parameters(recurse=False)}
        assert off(answer, oracle(blocks[path].spec, given, **held)) < CLOSE
        moved = held | {"distances": np.roll(held["distances"], 1)}
        assert off(answer, oracle(blocks[path].spec, given, **moved)) > 1e-2, "the control: other tokens"
    assert model.rewrite_report.parameters.after == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "target"), [("bert-sdpa", TARGETS[0]), ("gpt2-sdpa", TARGETS[1]), ("llama-gqa-sdpa", TARGETS[0])]
)
def test_a_file_computes_what_the_module_does(name: str, target: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case, out = ZOO[name], tmp_path / "pair.onnx"
    module, source = rewritten(case, target), zoo_onnx(case, "dynamo18")
    rewriter.optimize(source, target).save(out)
    calls = sum(n.domain == "rewriter.ops" for n in onnx.load(out).graph.node)
    assert calls == len(token_mixers(module)) + len(unit_blocks(module))
    for size in ((2, 7, 0), (3, 12, 1)):
        inputs = case.inputs(*size)
        assert relative(run_file(out, inputs), case.run(module, inputs)) < CLOSE
        assert relative(run_file(source, inputs), case.run(module, inputs)) > 1e-3  # the control
    assert rewriter.verify(out, source).ok


def blended(model: torch.nn.Module) -> torch.nn.Module:
    """With second units that look at other tokens as much as at their own, so that forgotten ones would be seen."""
    with torch.no_grad():
        for block in unit_blocks(model).values():
            block.distances.fill_(0.5)
            block.scale.add_(torch.randn(block.scale.shape, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize(("name", "target"), [("gpt2-sdpa", "flash:4,pair"), ("llama-gqa-sdpa", "gau:pair")])
def test_generation_with_a_cache_is_that_without(name: str, target: str) -> None:
    """One by one, and by beams that change places, past a chunk's end; earlier tokens never see later ones."""
    case = ZOO[name]
    model: Any = blended(rewritten(case, target))
    prompt = case.inputs(2, 6, 0)["input_ids"]
    for way in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **way}
        assert torch.equal(
            model.generate(prompt, use_cache=True, **options), model.generate(prompt, use_cache=False, **options)
        )
    with torch.no_grad():
        whole = model(prompt, use_cache=False).logits
        cache = model(prompt[:, :4], use_cache=True).past_key_values
        assert len(cache.gated_unit_states) == len(token_mixers(model)) + len(unit_blocks(model))
        behind = model(prompt[:, 4:], past_key_values=cache).logits
        assert torch.allclose(behind, whole[:, 4:], atol=1e-4)
        for unit in token_mixers(model).values():
            unit.followers.clear()
        cache = model(prompt[:, :4], use_cache=True).past_key_values
        forgotten = model(prompt[:, 4:], past_key_values=cache).logits
        assert not torch.allclose(forgotten, whole[:, 4:], atol=1e-2), "the control: nobody tells them of the cache"


def test_it_trains_and_is_saved(tmp_path: Path) -> None:
    case = ZOO["gpt2-sdpa"]
    model = blended(rewritten(case, "flash:4,pair"))
    inputs = case.inputs(2, 12, 0)
    model.train()
    model(**inputs)[0].square().sum().backward()
    for block in unit_blocks(model).values():
        grads = {n: float(p.grad.abs().sum()) for n, p in block.named_parameters(recurse=False) if p.grad is not None}
        assert set(grads) == set(block.spec.shapes) and all(grads.values()), grads
    expected = case.run(model.eval(), inputs)
    rewriter.save(model, tmp_path / "pair")
    again: Any = rewriter.load(tmp_path / "pair")
    assert torch.equal(case.run(again, inputs), expected)
    prompt = inputs["input_ids"][:, :6]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(again.generate(prompt, **options), again.generate(prompt, use_cache=False, **options))


def test_untrained_second_units_get_gradients() -> None:
    """Scores of 0 would get none: the slope of their square is 0."""
    case = ZOO["bert-sdpa"]
    model = rewritten(case, "gau:pair")
    model(**case.inputs(2, 9, 0))[0].square().sum().backward()
    for block in unit_blocks(model).values():
        assert block.scale.grad is not None and float(block.scale.grad[0].abs().sum()) > 0, "queries are 0, and learn"


def test_a_causal_block_without_a_unit_before_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state would be lost between the tokens of an answer."""
    monkeypatch.setattr(module_sites, "_mix_one", lambda *_: None)  # attentions stay
    model = rewritten(ZOO["gpt2-sdpa"], "gau:pair", verify=False)
    assert not unit_blocks(model) and {r.reason for r in model.rewrite_report.refused} == {NO_UNIT}


def test_a_block_called_with_other_tokens_than_its_attention_says_so() -> None:
    case = ZOO["gpt2-sdpa"]
    model: Any = rewritten(case, "gau:pair")
    block = next(iter(unit_blocks(model).values()))
    with torch.no_grad():
        unit = next(u for u in token_mixers(model).values() if block in u.followers)
        unit.register_forward_hook(lambda *_: setattr(block, "step", block.step and block.step.__class__(
            block.step.states, block.step.seen, block.step.order, (9, 9))))  # fmt: skip
        with pytest.raises(TypeError, match="other tokens"):
            model(case.inputs(2, 6, 0)["input_ids"], use_cache=True)


def test_names() -> None:
    assert find("gau:pair") == GatedPair(GatedUnit("gau"), UnitBlocks("gau")) == gated_pair("gau")
    assert find("flash,pair") is None and find("flash:64:pair") is None and find("gau,pair") is None
    for name in ("gau:pair", "flash-quad:pair", "flash:pair", "flash:64,pair"):
        found = find(name)
        assert found is not None and found.name == name
