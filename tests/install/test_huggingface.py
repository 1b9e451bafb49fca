"""The head-count knob: config and projections are edited, and the checkpoint stays an ordinary one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import UnsupportedModel, UsageError
from rewriter.install.call_record import record_calls
from rewriter.install.huggingface import apply_knob, config_tells_all, heads_of, knob_applies
from rewriter.install.torch_module import mixers
from tests.install.canonical import owners, pooled, rewrite, take_apart
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

WITH_KNOB = ["llama-sdpa", "llama-eager", "qwen3-sdpa", "mistral-sdpa", "gemma2-eager"]
WITHOUT_KNOB = ["gpt2-sdpa", "bert-sdpa", "phi3-sdpa", "opt-sdpa", "falcon-sdpa", "t5-sdpa", "torch-encoder"]


def keys(path: str) -> tuple[str, str]:
    return f"{path}.k_proj.weight", f"{path}.v_proj.weight"


def tied(case: ZooCase, kv_heads: int) -> Any:
    model = case.build()
    case.tie(model, kv_heads)
    return model


def turn(model: Any, case: ZooCase, kv_heads: int, only: slice = slice(None)) -> None:
    paths = owners(model, case.heads)[only]
    records = record_calls(model, paths, kwargs=case.inputs(2, 9, 0))
    for path in paths:
        attention = take_apart(model.get_submodule(path), case.heads, causal=True)
        apply_knob(model, path, *keys(path), kv_heads, pooled(attention, kv_heads)[1], records[path])


def generate(model: Any, case: ZooCase) -> Tensor:
    ids = case.inputs(2, 9, 0)["input_ids"]
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        no_repeat_ngram_size=1,
    )
    assert isinstance(tokens, Tensor)
    return tokens


@pytest.mark.parametrize("name", [*WITH_KNOB, *WITHOUT_KNOB])
def test_where_the_knob_is(name: str) -> None:
    case = ZOO[name]
    model = case.build()
    assert {knob_applies(model, path, *keys(path)) for path in owners(model, case.heads)} == {name in WITH_KNOB}


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", WITH_KNOB)
def test_a_turned_model_is_an_ordinary_checkpoint(name: str, kv_heads: int, tmp_path: Path) -> None:
    case = ZOO[name]
    model = tied(case, kv_heads)
    inputs = case.inputs(3, 8, 1)
    expected, tokens = case.run(model, inputs), generate(model, case)
    kind = type(model)
    turn(model, case, kv_heads)
    assert model.config.num_key_value_heads == kv_heads
    assert not mixers(model)
    torch.testing.assert_close(case.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model, case), tokens)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "rewrite.json").exists()
    loaded = kind.from_pretrained(tmp_path / "saved", attn_implementation=name.rpartition("-")[2])
    assert loaded.config.num_key_value_heads == kv_heads
    assert torch.equal(case.run(loaded, inputs), case.run(model, inputs))

    loose = tied(case, kv_heads)
    case.perturb(loose)
    before = case.run(loose, inputs)
    turn(loose, case, kv_heads)
    assert not torch.allclose(case.run(loose, inputs), before, atol=1e-2)


def test_fewer_heads_than_a_grouped_model_has() -> None:
    case = ZOO["llama-gqa-sdpa"]
    model = tied(case, 1)
    inputs = case.inputs(2, 9, 0)
    expected = case.run(model, inputs)
    turn(model, case, 1)
    assert model.config.num_key_value_heads == 1
    torch.testing.assert_close(case.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_what_a_hook_adds_to_a_projection_is_added_once(name: str) -> None:
    case = ZOO["llama-sdpa"]
    model, inputs = tied(case, 2), case.inputs(2, 9, 0)
    without = case.run(model, inputs)
    for path in owners(model, case.heads):
        projection = model.get_submodule(f"{path}.{name}")
        projection.register_forward_hook(lambda _module, _args, output: output + 0.5)
    expected = case.run(model, inputs)
    assert not torch.allclose(expected, without, atol=1e-2)
    done = rewriter.optimize(model, "gqa2", example_inputs=case.inputs(2, 7, 1))
    assert all(row.exact for row in done.rewrite_report.sites)
    torch.testing.assert_close(case.run(done, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_kept(dtype: torch.dtype) -> None:
    case = ZOO["llama-sdpa"]
    model = tied(case, 2).to(dtype)
    inputs = case.inputs(2, 9, 0)
    expected = case.run(model, inputs)
    turn(model, case, 2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    error = (case.run(model, inputs).float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < 3e-2


def test_some_layers_only() -> None:
    """The config has one number for all layers: it stays, and the model says that it does not tell all."""
    case = ZOO["llama-sdpa"]
    model = tied(case, 2)
    inputs = case.inputs(2, 9, 0)
    expected, tokens = case.run(model, inputs), generate(model, case)
    turn(model, case, 2, slice(0, 1))
    assert model.config.num_key_value_heads == case.kv_heads
    assert not config_tells_all(model)
    assert [heads_of(layer.self_attn) for layer in model.model.layers] == [2, case.kv_heads]
    torch.testing.assert_close(case.run(model, inputs), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model, case), tokens)
    turn(model, case, 2, slice(1, 2))
    assert config_tells_all(model)
    assert model.config.num_key_value_heads == 2


def test_knob_and_mixer_in_one_model() -> None:
    case = ZOO["llama-sdpa"]
    model = tied(case, 2)
    inputs = case.inputs(2, 9, 0)
    expected = case.run(model, inputs)
    rewrite(model, inputs, case.heads, 2, causal=True, only=owners(model, case.heads)[:1])
    turn(model, case, 2, slice(1, None))
    assert model.config.num_key_value_heads == case.kv_heads
    torch.testing.assert_close(case.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_training_goes_on() -> None:
    case = ZOO["qwen3-sdpa"]
    model = tied(case, 2)
    turn(model, case, 2)
    inputs = case.inputs(2, 9, 0)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_module_with_its_own_idea_of_head_counts_is_refused_and_left_alone() -> None:
    """A norm over all K features cannot take fewer of them: the edited copy fails before anything is changed."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model: Any = Olmo2ForCausalLM(config)
    model.eval()
    inputs = {"input_ids": torch.randint(5, 60, (2, 7))}
    path = "model.layers.0.self_attn"
    record = record_calls(model, [path], kwargs=inputs)[path]
    attention = take_apart(model.get_submodule(path), 4, causal=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModel, match="cannot be given 2 K/V heads"):
        apply_knob(model, path, *keys(path), 2, pooled(attention, 2)[1], record)
    assert model.config.num_key_value_heads == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_in_another_order_than_the_groups_read_them_are_refused() -> None:
    class Tiled(nn.Module):
        """Query head h reads K/V head h % kv_heads, not h // group."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            attention: Any = self.inner
            names = ("k_proj", "v_proj")
            kept = {name: getattr(attention, name) for name in names}
            groups = attention.num_key_value_groups
            for name in names:
                wide = copy.deepcopy(kept[name])
                wide.weight = nn.Parameter(kept[name].weight.repeat(groups, 1))
                setattr(attention, name, wide)
            attention.num_key_value_groups = 1
            try:
                return attention(*args, **kwargs)
            finally:
                attention.num_key_value_groups = groups
                for name in names:
                    setattr(attention, name, kept[name])

    case = ZOO["llama-sdpa"]
    model = case.build()
    layer: Any = model.get_submodule("model.layers.0")
    inner = layer.self_attn
    tiled: Any = Tiled(inner)
    for name in ("config", "num_key_value_groups"):
        setattr(tiled, name, getattr(inner, name))
    layer.self_attn = tiled
    path = "model.layers.0.self_attn"
    record = record_calls(model, [path], kwargs=case.inputs(2, 9, 0))[path]
    attention = take_apart(inner, case.heads, causal=True)
    weights = [f"{path}.inner.{name}_proj.weight" for name in "kv"]
    assert knob_applies(model, path, weights[0], weights[1])
    with pytest.raises(UnsupportedModel):
        apply_knob(model, path, weights[0], weights[1], 2, pooled(attention, 2)[1], record)
    assert inner.k_proj.out_features == 32


def test_what_is_not_there_has_no_knob() -> None:
    case = ZOO["llama-sdpa"]
    model = case.build()
    path = owners(model, case.heads)[0]
    k, v = keys(path)
    assert not knob_applies(model, path, k.replace("k_proj", "nothing"), v)
    assert not knob_applies(model, path, k.replace("weight", "bias"), v)
    assert not knob_applies(model, path, keys(owners(model, case.heads)[1])[0], v)
    attention = take_apart(model.get_submodule(path), case.heads, causal=True)
    record = record_calls(model, [path], kwargs=case.inputs(2, 9, 0))[path]
    with pytest.raises(UnsupportedModel, match="config"):
        apply_knob(model, path, k.replace("k_proj", "nothing"), v, 2, pooled(attention, 2)[1], record)


def test_biases_are_turned_too() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.zoo.randomize import randomize

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, attention_bias=True, pad_token_id=0,
    )  # fmt: skip
    case = replace(ZOO["llama-sdpa"], build=lambda: randomize(LlamaForCausalLM(config)))
    model = tied(case, 1)
    inputs = case.inputs(2, 9, 0)
    expected = case.run(model, inputs)
    turn(model, case, 1)
    assert model.model.layers[0].self_attn.v_proj.bias.shape == (8,)
    torch.testing.assert_close(case.run(model, inputs), expected, rtol=1e-4, atol=1e-4)


def test_pushing_to_the_hub_is_refused(tmp_path: Path) -> None:
    case = ZOO["llama-sdpa"]
    model = tied(case, 2)
    turn(model, case, 2)
    with pytest.raises(UsageError, match="hub"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_a_config_that_tells_no_number_for_all_layers_has_no_knob() -> None:
    class Varied:
        num_attention_heads = 4

        @property
        def num_key_value_heads(self) -> int:
            raise RuntimeError("it varies between layers")

    module = nn.Module()
    module.attention = nn.Module()
    module.attention.config, module.attention.num_key_value_groups = Varied(), 1  # type: ignore[assignment]
    assert not knob_applies(module, "attention", *keys("attention"))
