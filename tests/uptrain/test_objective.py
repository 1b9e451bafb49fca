"""Distances, and which modules of two models are compared."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import rewriter
from rewriter.errors import UnsupportedModel
from rewriter.uptrain.batch import Batch
from rewriter.uptrain.divergence import kl_divergence
from rewriter.uptrain.objective import WHOLE, Phase, Recipe, Teacher, is_causal, next_token_loss, plan, relative_error
from rewriter.uptrain.observe import forced, observing
from rewriter.uptrain.pairs import changed, paired_modules
from tests.uptrain.small_models import VOCABULARY, bert, llama, student_of


def ids(rows: int = 2, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("slices", [1, 1000])
def test_kl_and_its_gradient_are_autograds(temperature: float, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("rewriter.uptrain.divergence"), "SLICE", slices)
    generator = torch.Generator().manual_seed(0)
    old, new = (4 * torch.randn(7, 50, generator=generator) for _ in range(2))
    weights = torch.rand(7, generator=generator)
    results = []
    for ours in (True, False):
        student = new.clone().requires_grad_()
        if ours:
            value = kl_divergence(old, student, temperature)
        else:
            log_p, log_q = ((x / temperature).log_softmax(-1) for x in (old, student))
            value = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
        (value * weights).sum().backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1])
    other = kl_divergence(old, new, temperature * 1.1)
    assert not torch.allclose(other, results[0][0], rtol=1e-3)


def test_next_token_loss_is_the_models_own() -> None:
    model, batch = llama(), Batch({"input_ids": ids()}, None)
    with torch.no_grad():
        found = model(**batch.inputs, labels=batch.inputs["input_ids"])
        torch.testing.assert_close(next_token_loss(found.logits, batch), found.loss)
        hidden = Batch(batch.inputs, torch.arange(12)[None].expand(2, 12) < torch.tensor([[12], [6]]))
        labels = batch.inputs["input_ids"].masked_fill(~hidden.valid, -100)  # type: ignore[operator]
        wished = model(**batch.inputs, labels=labels).loss
    torch.testing.assert_close(next_token_loss(found.logits, hidden), wished)


def test_padding_counts_for_nothing() -> None:
    old, new = torch.randn(2, 2, 6, 4)
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    batch = Batch({"input_ids": ids(2, 6)}, valid)
    before = relative_error(old, new, batch, WHOLE, 1.0)
    new[1, 2:] += 100
    assert torch.equal(relative_error(old, new, batch, WHOLE, 1.0), before)
    new[1, 1] += 100
    assert not torch.allclose(relative_error(old, new, batch, WHOLE, 1.0), before)


# ------------------------------------------------------------------ pairs


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


T5_PAIRS = [
    *(f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)),
    *(f"decoder.block.{i}.layer.{j}" for i in range(2) for j in ("0.SelfAttention", "1.EncDecAttention")),
]


@pytest.mark.parametrize(
    ("build", "wished"),
    [
        pytest.param(llama, [f"model.layers.{i}.self_attn" for i in range(2)], id="llama"),
        pytest.param(bert, [f"encoder.layer.{i}.attention.self" for i in range(2)], id="bert"),
        pytest.param(_gpt2, [f"transformer.h.{i}.attn" for i in range(2)], id="gpt2"),
        pytest.param(_t5, T5_PAIRS, id="t5"),
        pytest.param(lambda: llama(layers=1), ["model.layers.0.self_attn"], id="one layer"),
    ],
)
def test_pairs_are_what_the_rewrite_changed(build: Any, wished: list[str]) -> None:
    teacher = build()
    student = student_of(teacher)
    assert paired_modules(student, teacher, changed(student, teacher)) == wished
    assert paired_modules(teacher, teacher, changed(teacher, teacher)) == []


def test_a_target_without_parameters_is_paired_where_the_originals_were() -> None:
    teacher = bert()
    student = student_of(teacher, "fnet")
    found = paired_modules(student, teacher, changed(student, teacher))
    assert len(found) == 2 and all(path.startswith(f"encoder.layer.{i}") for i, path in enumerate(found))


def test_blocks_are_found_again_after_everything_was_trained() -> None:
    teacher = llama()
    student = student_of(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    assert paired_modules(student, teacher, changed(student, teacher)) == ["model.layers.0", "model.layers.1"]


def test_merged_values_in_another_basis_are_compared_behind_the_output_projection() -> None:
    teacher = bert()
    from passes.targets import GroupedQuery

    student = rewriter.optimize(teacher, GroupedQuery(2, "joint"), verify=False)
    wished = [f"encoder.layer.{i}.attention" for i in range(2)]
    assert paired_modules(student, teacher, changed(student, teacher)) == wished


def test_modules_whose_outputs_differ_in_width_give_way_to_those_around_them() -> None:
    class Narrow(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))])
            self.head = nn.Linear(8, 5)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.blocks[0](nn.functional.one_hot(input_ids % 8, 8).float()))
            return out

    torch.manual_seed(0)
    teacher, student = Narrow(8), Narrow(4)
    batch = Batch({"input_ids": ids()}, None)
    found = plan(student, teacher, ["blocks.0.0.weight", "blocks.0.0.bias"], batch, Recipe(steps=1))
    assert found.pairs == ("blocks.0",)


# ------------------------------------------------------------------ the original's inputs


@pytest.mark.parametrize("build", [llama, bert], ids=["decoder", "encoder"])
def test_forced_modules_see_the_teachers_inputs(build: Any) -> None:
    teacher = build()
    student = student_of(teacher)
    batch = Batch({"input_ids": ids()}, None)
    plans = plan(student, teacher, changed(student, teacher), batch, Recipe(steps=1))
    targets = Teacher(teacher, plans).targets(batch, Phase.LAYERS)
    with torch.no_grad():
        with forced(student, targets.calls) as outputs:
            student(**batch.inputs)
        for path in plans.pairs:
            (call,) = targets.calls[path]
            alone = student.get_submodule(path)(*call.args, **call.kwargs)[0]
            torch.testing.assert_close(outputs[path], [alone])
        with observing(student, plans.pairs) as free:
            student(**batch.inputs)
    last = plans.pairs[-1]
    assert not torch.allclose(free[last][0].output, outputs[last][0], rtol=1e-3)


def test_causality_is_tried_out() -> None:
    batch = Batch({"input_ids": ids()}, None)
    assert is_causal(llama(), batch) and not is_causal(bert(), batch)


def test_models_of_two_vocabularies_do_not_fit() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    other, batch = LlamaForCausalLM(config).eval(), Batch({"input_ids": ids()}, None)
    with pytest.raises(UnsupportedModel, match=f"{VOCABULARY}.*{VOCABULARY + 1}") as caught:
        plan(other, llama(), ["lm_head.weight"], batch, Recipe(steps=1))
    assert "rewritten from this teacher" in caught.value.hint
