"""Hugging Face models that keep their own attention code call the kernels through transformers' registry."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewriter
from codegen.launch import torch_op
from codegen.spec import GroupedQueryAttention
from rewriter.errors import UsageError
from rewriter.install.attention_interface import REPLACED
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

FUSED = ["llama-gqa-sdpa", "qwen3-sdpa", "gpt2-sdpa", "bert-sdpa", "t5-sdpa", "whisper-sdpa", "phi3-sdpa"]
"""Causal, bidirectional, with normed heads, packed projections, position biases, and cross-attention."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GroupedQueryAttention]]:
    """The specs that kernels were called with."""
    found: list[GroupedQueryAttention] = []
    stock = torch_op.launch

    def launch(kernel: Any, spec: GroupedQueryAttention, *rest: Any) -> Tensor:
        found.append(spec)
        return stock(kernel, spec, *rest)

    monkeypatch.setattr(torch_op, "launch", launch)
    yield found


def main_output(model: Any, case: ZooCase, tokens: int = 9) -> Tensor:
    with torch.no_grad():
        found = model(**case.inputs(2, tokens, 0))
    output = found[0]
    assert isinstance(output, Tensor)
    return output


def generated(model: Any, **more: Any) -> Tensor:
    """Greedy unless told otherwise; the first sequence is padded on the left."""
    ids = torch.arange(1, 15).reshape(2, 7)
    keep = torch.ones_like(ids)
    keep[0, :3] = 0
    found = model.generate(ids, attention_mask=keep, max_new_tokens=6, do_sample=False, eos_token_id=None, **more)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", FUSED)
def test_models_answer_as_before_and_come_by_the_kernel(name: str, calls: list[GroupedQueryAttention]) -> None:
    case = ZOO[name]
    model = case.build()
    before = main_output(model, case)
    rewriter.use_kernels(model, "cpp", example_inputs=case.inputs(2, 9, 0))
    calls.clear()
    after = main_output(model, case)
    assert calls and (after - before).abs().max() < 1e-5 * before.abs().max()
    assert not torch.equal(after, before), "the control: other code adds up in another order"
    rewriter.use_kernels(model, "off", example_inputs=case.inputs(2, 9, 0))
    calls.clear()
    assert torch.equal(main_output(model, case), before) and not calls


@pytest.mark.parametrize(
    "more",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "static cache"],
)
def test_generation(more: dict[str, Any], calls: list[GroupedQueryAttention]) -> None:
    case = ZOO["llama-gqa-sdpa"]
    model = case.build()
    right = generated(model, **more)
    rewriter.use_kernels(model, "cpp", example_inputs=case.inputs(2, 9, 0))
    calls.clear()
    assert torch.equal(generated(model, **more), right)
    assert calls


def test_only_rewritten_attentions_are_reached_by_optimize(calls: list[GroupedQueryAttention]) -> None:
    case = ZOO["llama-sdpa"]
    model = case.build()
    given = case.inputs(2, 9, 0)
    small = rewriter.optimize(model, "gqa2", layers="0", example_inputs=given, kernels="cpp")
    off = rewriter.optimize(model, "gqa2", layers="0", example_inputs=given, kernels="off")
    calls.clear()
    found = main_output(small, case)
    assert {spec.kv_heads for spec in calls} == {2}
    assert (found - main_output(off, case)).abs().max() < 1e-5
    assert model.config._attn_implementation == off.config._attn_implementation == REPLACED
    assert copy.deepcopy(small).config._attn_implementation == small.config._attn_implementation != REPLACED


def test_the_checkpoint_says_nothing_of_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case = ZOO["llama-sdpa"]
    small = rewriter.optimize(case.build(), "gqa2", example_inputs=case.inputs(2, 9, 0), kernels="cpp")
    small.save_pretrained(tmp_path)
    assert "rewriter" not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == REPLACED
    assert (main_output(plain, case) - main_output(small, case)).abs().max() < 1e-5


def test_it_compiles_trains_and_exports(calls: list[GroupedQueryAttention]) -> None:
    case = ZOO["llama-gqa-sdpa"]
    model = case.build()
    given = case.inputs(2, 9, 0)
    plain = copy.deepcopy(model)
    rewriter.use_kernels(model, "cpp", example_inputs=given)
    with torch.no_grad():
        right = model(**given, use_cache=False)[0]
        assert (torch.compile(model, fullgraph=True)(**given, use_cache=False)[0] - right).abs().max() < 1e-5
    calls.clear()
    program = torch.export.export(model, (), {**given, "use_cache": False}, strict=False)
    assert not any("rewriter" in str(node.target) for node in program.graph.nodes) and not calls
    for m in (model, plain):
        m(**given, use_cache=False)[0].square().mean().backward()
    weights = [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert any(g is not None for g, _ in weights)
    assert all(a is None or b is None or torch.allclose(a, b, atol=1e-6) for a, b in weights)


@pytest.mark.parametrize("name", ["llama-gqa-eager", "gemma2-eager"])
def test_what_runs_on_code_of_its_own_choice_is_left_alone(name: str) -> None:
    case = ZOO[name]
    model = case.build()
    with pytest.raises(UsageError, match="its own attention code") as caught:
        rewriter.use_kernels(model, "cpp", example_inputs=case.inputs(2, 9, 0))
    assert "sdpa" in str(caught.value.hint)
    assert rewriter.use_kernels(model, example_inputs=case.inputs(2, 9, 0)) is model
    assert model.config._attn_implementation == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is not there")
def test_kernels_that_are_not_to_be_had_are_named() -> None:
    case = ZOO["llama-gqa-sdpa"]
    with pytest.raises(UsageError, match="kernels='cuda': there is no cuda kernel") as caught:
        rewriter.use_kernels(case.build(), "cuda", example_inputs=case.inputs(2, 9, 0))
    assert '"auto"' in caught.value.hint


def test_a_model_that_would_answer_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.install import attention_interface

    stock = attention_interface.attention
    monkeypatch.setattr(attention_interface, "attention", lambda *a, **k: stock(*a, **k) * 1.01)
    case = ZOO["llama-gqa-sdpa"]
    model = case.build()
    rewriter.use_kernels(model, example_inputs=case.inputs(2, 9, 0))
    assert model.config._attn_implementation == REPLACED
