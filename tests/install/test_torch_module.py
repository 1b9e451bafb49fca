"""The torch door out: in-place replacement that keeps the original's call, proven on the zoo and on odd owners."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from codegen.spec import GroupedQueryAttention
from rewriter.errors import UnsupportedModel
from rewriter.install.call_record import record_calls
from rewriter.install.mixer import MixerParameters, RewrittenMixer
from rewriter.install.reproduction import disagreement
from rewriter.install.torch_module import install, mixers
from tests.install.canonical import Attention, owners, pooled, rewrite, take_apart
from tests.zoo.case import ZooCase, main_output
from tests.zoo.models import ZOO, cases

CASES = [*cases(), *cases(having="extra", without=("none", "refuse"))]
KV_HEADS = {case.name: 2 if case.kv_heads % 2 == 0 and case.kv_heads > 2 else 1 for case in CASES}
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def tied(case: ZooCase, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = case.build()
    case.tie(model, KV_HEADS[case.name])
    return model.to(dtype)


def inputs_of(case: ZooCase, dtype: torch.dtype = torch.float32, *size: int) -> dict[str, Tensor]:
    inputs = case.inputs(*(size or (2, 9, 0)))
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


# ---------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_tied_twin_is_rewritten_without_loss_and_a_perturbed_one_is_not(case: ZooCase) -> None:
    model, inputs = tied(case), inputs_of(case)
    expected = {size: case.run(model, inputs_of(case, torch.float32, *size)) for size in ((2, 9, 0), (3, 6, 1))}
    untouched = {name for name, _ in model.named_parameters()}
    made = rewrite(model, inputs, case.heads, KV_HEADS[case.name], causal=case.causal)
    assert len(made) == case.sites
    for size, theirs in expected.items():
        assert relative_error(case.run(model, inputs_of(case, torch.float32, *size)), theirs) < RELATIVE[torch.float32]
    outside = {name for name in untouched if not name.startswith(tuple(f"{path}." for path in made))}
    assert outside <= {name for name, _ in model.named_parameters()}

    loose = tied(case)
    case.perturb(loose)
    before = case.run(loose, inputs)
    rewrite(loose, inputs, case.heads, KV_HEADS[case.name], causal=case.causal)
    assert relative_error(case.run(loose, inputs), before) > 100 * RELATIVE[torch.float32]


HALF = [
    "gpt2-sdpa",
    "gpt2-eager",
    "bert-sdpa",
    "vit-sdpa",
    "qwen3-sdpa",
    "t5-eager",
    "torch-encoder",
    "nanogpt-softmax",
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = ZOO[name]
    model, inputs = tied(case, dtype), inputs_of(case, dtype)
    expected = case.run(model, inputs)
    rewrite(model, inputs, case.heads, KV_HEADS[name], causal=case.causal)
    ours = case.run(model, inputs)
    assert ours.dtype == dtype
    assert relative_error(ours, expected) < RELATIVE[dtype]
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("name", ["bert-eager", "gpt2-sdpa", "torch-encoder-padded", "t5-sdpa"])
def test_parameters_shrink_and_q_and_the_output_projection_are_the_very_same(name: str) -> None:
    case = ZOO[name]
    model = tied(case)
    path = owners(model, case.heads)[0]
    original = model.get_submodule(path)
    before = take_apart(original, case.heads, causal=case.causal)
    count = sum(p.numel() for p in model.parameters())
    mixer = rewrite(model, inputs_of(case), case.heads, 1, causal=case.causal, only=[path])[path]
    assert model.get_submodule(path) is mixer
    if isinstance(before.parameters.q_weight, nn.Parameter):
        assert mixer.q_proj.weight is before.parameters.q_weight
    out = before.names["out"]
    assert mixer.out_proj is (None if out is None else original.get_submodule(out))
    dim = before.spec.head_dim
    biases = sum(2 for bias in (before.parameters.k_bias,) if bias is not None)
    saved = (case.heads - 1) * dim * (2 * before.parameters.k_weight.shape[1] + biases)
    assert sum(p.numel() for p in model.parameters()) == count - saved
    for parameter in mixer.parameters():  # no slice keeps a fused matrix alive
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert-sdpa", "bert-eager", "gpt2-sdpa", "gpt2-eager", "opt-sdpa", "bloom-eager"])
def test_padding_does_not_change_the_real_tokens(name: str, side: str) -> None:
    case = ZOO[name]
    model = tied(case)
    rewrite(model, inputs_of(case), case.heads, KV_HEADS[name], causal=case.causal)
    ids = torch.randint(5, 60, (1, 6), generator=torch.Generator().manual_seed(4))
    pads = torch.zeros(1, 3, dtype=torch.long)
    order = (pads, ids) if side == "left" else (ids, pads)
    mask = torch.cat([torch.zeros_like(x) if x is pads else torch.ones_like(x) for x in order], dim=1)
    real = mask[0].bool()
    extra = {} if name.startswith("bloom") else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        alone = main_output(model(input_ids=ids, attention_mask=torch.ones_like(ids)))
        padded = main_output(model(input_ids=torch.cat(order, dim=1), attention_mask=mask, **extra))
        unmasked = main_output(model(input_ids=torch.cat(order, dim=1), **extra))
    torch.testing.assert_close(padded[:, real], alone, rtol=1e-4, atol=1e-4)
    if side == "left" or not case.causal:  # the control: without the mask, padding does leak in
        assert not torch.allclose(unmasked[:, real], alone, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------- generation

GENERATING = ["gpt2-sdpa", "gpt2-eager", "opt-sdpa", "bloom-eager", "falcon-sdpa", "t5-sdpa", "bart-eager"]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


def generate(model: Any, inputs: dict[str, Tensor], **way: Any) -> Tensor:
    given = {name: x for name, x in inputs.items() if not name.startswith("decoder")}
    if "decoder_input_ids" not in inputs:
        given["attention_mask"] = (given["input_ids"] != 0).long()
    tokens = model.generate(
        **given, max_new_tokens=8, do_sample=False, eos_token_id=None, no_repeat_ngram_size=1, **way
    )
    assert isinstance(tokens, Tensor)
    return tokens


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", GENERATING)
def test_generate_gives_the_tokens_of_the_original(name: str, way: str) -> None:
    case = ZOO[name]
    model, inputs = tied(case), inputs_of(case)
    expected = generate(model, inputs, **WAYS[way])
    assert len(set(expected[:, -8:].flatten().tolist())) > 2  # not one token over and over
    rewrite(model, inputs, case.heads, KV_HEADS[name], causal=case.causal)
    assert torch.equal(generate(model, inputs, **WAYS[way]), expected)
    for mixer in mixers(model).values():
        mixer.v_proj.weight.data += 0.5 * torch.randn_like(mixer.v_proj.weight)
    assert not torch.equal(generate(model, inputs, **WAYS[way]), expected)


def test_the_cache_holds_the_shared_heads_only() -> None:
    case = ZOO["gpt2-sdpa"]
    model, inputs = tied(case), inputs_of(case)
    rewrite(model, inputs, case.heads, 1, causal=True)
    cache = model(**inputs, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (2, 1, 9, 8)


def test_left_padded_batches_generate_what_each_row_generates_alone() -> None:
    case = ZOO["gpt2-sdpa"]
    model: Any = tied(case)
    rewrite(model, inputs_of(case), case.heads, 2, causal=True)
    rows = [torch.tensor([[7, 8, 9, 10, 11]]), torch.tensor([[20, 21, 22]])]
    alone = [generate(model, {"input_ids": row})[:, row.shape[1] :] for row in rows]
    together = generate(model, {"input_ids": torch.tensor([[7, 8, 9, 10, 11], [0, 0, 20, 21, 22]])})
    assert torch.equal(together[:, 5:], torch.cat(alone))


# ---------------------------------------------------------------------- the call


def test_arguments_by_position_by_name_and_by_a_former_name() -> None:
    case = ZOO["gpt2-sdpa"]
    model: Any = tied(case)
    rewrite(model, inputs_of(case), case.heads, 2, causal=True)
    from transformers import DynamicCache

    mixer = model.transformer.h[0].attn
    names = list(inspect.signature(mixer).parameters)
    assert names[:3] == ["hidden_states", "cache", "attention_mask"]
    x = torch.randn(2, 5, 32)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    expected = mixer(x, None, mask)[0]
    assert torch.equal(mixer(hidden_states=x, attention_mask=mask)[0], expected)
    caches = [DynamicCache(), DynamicCache()]
    for name, cache in zip(("cache", "past_key_values"), caches, strict=True):
        mixer(x, **{name: cache})
        assert cache.get_seq_length() == 5
    with pytest.raises(TypeError, match="softcap"):
        mixer(x, softcap=30.0)
    with pytest.raises(TypeError, match="hidden_states"):
        mixer(attention_mask=mask)
    with pytest.raises(TypeError, match="positional"):
        mixer(*[x] * 9)
    assert mixer(x, softcap=None, use_cache=True, position_ids=torch.arange(5))[0].shape == x.shape


def test_what_is_no_tensor_is_no_mask() -> None:
    case = ZOO["gpt2-sdpa"]
    model: Any = tied(case)
    rewrite(model, inputs_of(case), case.heads, 2, causal=True)
    with pytest.raises(TypeError, match="mask"):
        model.transformer.h[0].attn(torch.randn(1, 4, 32), attention_mask=object())


@pytest.mark.parametrize("name", ["gpt2-eager", "bert-eager", "bloom-eager", "t5-eager"])
def test_attentions_are_collected_as_before(name: str) -> None:
    case = ZOO[name]
    model, inputs = tied(case), inputs_of(case)
    fields = [
        f
        for f in ("attentions", "decoder_attentions", "cross_attentions")
        if (f == "attentions") != name.startswith("t5")
    ]
    before = model(**inputs, output_attentions=True)
    twin = tied(case)
    rewrite(twin, inputs, case.heads, KV_HEADS[name], causal=case.causal)
    after = twin(**inputs, output_attentions=True)
    for field in fields:
        theirs, ours = getattr(before, field), getattr(after, field)
        if theirs is not None:
            assert len(ours) == len(theirs) > 0
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_hooks_move_to_the_replacement() -> None:
    case = ZOO["bert-sdpa"]
    model, inputs = tied(case), inputs_of(case)
    path = owners(model, case.heads)[1]
    seen: list[type] = []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(type(module)))
    rewrite(model, inputs, case.heads, 2, causal=False)
    seen.clear()
    case.run(model, inputs)
    assert seen == [RewrittenMixer]


def test_a_dispatch_hook_goes_along() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    case = ZOO["bert-sdpa"]
    model, inputs = tied(case), inputs_of(case)
    path = owners(model, case.heads)[0]
    expected = case.run(model, inputs)
    hooks.add_hook_to_module(model.get_submodule(path), hooks.AlignDevicesHook(execution_device="cpu"))
    rewrite(model, inputs, case.heads, 2, causal=False)
    assert isinstance(model.get_submodule(path)._hf_hook, hooks.AlignDevicesHook)
    assert relative_error(case.run(model, inputs), expected) < RELATIVE[torch.float32]


@pytest.mark.parametrize("name", ["gpt2-sdpa", "torch-encoder"])
def test_copies_and_pickles_are_independent(name: str) -> None:
    case = ZOO[name]
    model, inputs = tied(case), inputs_of(case)
    rewrite(model, inputs, case.heads, 2, causal=case.causal)
    expected = case.run(model, inputs)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for mixer in mixers(model).values():
        mixer.q_proj.weight.data.zero_()
    for other in others:
        assert torch.equal(case.run(other, inputs), expected)
    assert not torch.equal(case.run(model, inputs), expected)


def test_new_weights_are_cast_to_the_models_dtype() -> None:
    case = ZOO["bert-sdpa"]
    model, inputs = tied(case, torch.bfloat16), inputs_of(case, torch.bfloat16)
    expected = case.run(model, inputs)
    path = owners(model, case.heads)[0]
    attention = take_apart(model.get_submodule(path), case.heads, causal=False)
    spec, after = pooled(attention, 2)
    widened = {n: None if x is None or n.startswith("q") else x.detach().float() for n, x in vars(after).items()}
    after = dataclasses.replace(after, **{n: x for n, x in widened.items() if x is not None})
    record = record_calls(model, [path], kwargs=inputs)[path]
    mixer = install(model, path, attention.spec, spec, attention.parameters, after, record)
    assert {p.dtype for p in mixer.parameters()} == {torch.bfloat16}
    assert relative_error(case.run(model, inputs), expected) < RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("change", ["eager", "sdpa"])
def test_the_kernel_in_use_may_change_afterwards(change: str) -> None:
    """transformers then hands over other masks, or none where causal order is implied."""
    case = ZOO["gpt2-sdpa" if change == "eager" else "gpt2-eager"]
    model: Any = tied(case)
    inputs = inputs_of(case)
    alone = {"input_ids": inputs["input_ids"]}
    expected = [case.run(model, given) for given in (inputs, alone)]
    rewrite(model, inputs, case.heads, 2, causal=True)
    model.set_attn_implementation(change)
    for given, theirs in zip((inputs, alone), expected, strict=True):
        assert relative_error(case.run(model, given), theirs) < RELATIVE[torch.float32]


def test_a_mask_of_keys_leaves_the_causal_order_in_place() -> None:
    """Kernels that are causal by themselves are handed a mask [batch, keys] of zeros and ones."""
    case = ZOO["gpt2-sdpa"]
    model: Any = tied(case)
    rewrite(model, inputs_of(case), case.heads, 2, causal=True)
    mixer, x = model.transformer.h[0].attn, torch.randn(2, 6, 32)
    keys = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    whole = torch.ones(6, 6, dtype=torch.bool).tril() & keys.bool()[:, None, None]
    torch.testing.assert_close(mixer(x, attention_mask=keys)[0], mixer(x, attention_mask=whole)[0])
    assert not torch.allclose(mixer(x, attention_mask=keys)[0], mixer(x)[0], atol=1e-3)


# ---------------------------------------------------------------------- torch's own attention


class Caller(nn.Module):
    """A model around one module, which it calls with whatever it is called with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def multihead(batch_first: bool, kv_heads: int = 2, **settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=batch_first, **settings).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)
            if name.startswith("in_proj"):
                for part in parameter.view(3, kv_heads, -1, 8, *parameter.shape[1:])[1:]:
                    part.copy_(part[:, :1].clone().expand_as(part))
    return module


def tokens(batch: int, length: int, batch_first: bool, seed: int = 1) -> Tensor:
    x = torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))
    return x if batch_first else x.transpose(0, 1)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1)},
    "causal hint": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True},
    "additive": {"attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(3))},
    "per head": {"attn_mask": torch.randn(12, 6, 6, generator=torch.Generator().manual_seed(3))},
    "padding": {"key_padding_mask": torch.arange(6)[None] >= torch.tensor([[6], [4], [3]])},
    "both": {
        "key_padding_mask": torch.arange(6)[None] >= torch.tensor([[6], [4], [3]]),
        "attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1),
    },
}


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_under_every_mask(batch_first: bool) -> None:
    module = multihead(batch_first)
    model = Caller(copy.deepcopy(module))
    x = tokens(3, 6, batch_first)
    rewrite(model, {"query": x, "key": x, "value": x}, 4, 2, causal=False)
    assert isinstance(model.module, RewrittenMixer)
    for name, masks in MASKS.items():
        for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            ours, theirs = (m(x, x, x, **masks, **weights) for m in (model, module))
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5, msg=name)
            assert (ours[1] is None) == (theirs[1] is None)
            if theirs[1] is not None:
                torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5, msg=name)
    inverted = model(x, x, x, key_padding_mask=~MASKS["padding"]["key_padding_mask"])[0]
    assert not torch.allclose(inverted, module(x, x, x, **MASKS["padding"])[0], atol=1e-2)


def test_multihead_attention_across_and_unbatched() -> None:
    module = multihead(True)
    model = Caller(copy.deepcopy(module))
    x, memory = tokens(2, 5, True), tokens(2, 7, True, seed=2)
    rewrite(model, {"query": x, "key": memory, "value": memory, "need_weights": False}, 4, 2, causal=False)
    for args in ((x, memory, memory), (x[0], memory[0], memory[0])):
        ours, theirs = model(*args), module(*args)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_keys_and_values_of_other_widths() -> None:
    module = multihead(True, kdim=12, vdim=20)
    model = Caller(copy.deepcopy(module))
    q, k, v = tokens(2, 5, True), torch.randn(2, 7, 12), torch.randn(2, 7, 20)
    assert module.in_proj_bias is not None
    bias_q, bias_k, bias_v = module.in_proj_bias.chunk(3)
    spec = GroupedQueryAttention(4, 4, 8, 8, 8**-0.5)
    p = MixerParameters(module.q_proj_weight, module.k_proj_weight, module.v_proj_weight, bias_q, bias_k, bias_v)
    record = record_calls(model, ["module"], (q, k, v))["module"]
    install(model, "module", spec, spec, p, p, record, out="out_proj")
    torch.testing.assert_close(model(q, k, v)[0], module(q, k, v)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", ["add_bias_kv", "add_zero_attn"])
def test_extra_keys_are_refused(setting: str) -> None:
    model = Caller(multihead(True, **{setting: True}))
    x = tokens(2, 5, True)
    with pytest.raises(UnsupportedModel, match="relative error"):
        rewrite(model, {"query": x, "key": x, "value": x}, 4, 2, causal=False)
    assert type(model.module) is nn.MultiheadAttention


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]], ids=["all", "one"])
def test_the_encoders_fast_paths_are_declined(layers: list[int]) -> None:
    """Padding, eval mode and no gradients: torch would use nested tensors and fused layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = Caller(nn.TransformerEncoder(layer, 3).eval())
    plain = copy.deepcopy(model)
    x, padding = tokens(3, 6, True), MASKS["padding"]["key_padding_mask"]
    with torch.no_grad():
        expected = plain(x, src_key_padding_mask=padding)
        paths = [f"module.layers.{i}.self_attn" for i in layers]
        rewrite(model, {"src": x, "src_key_padding_mask": padding}, 4, 4, causal=False, only=paths)
        assert set(mixers(model)) == set(paths)
        ours = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(ours[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
        causal = nn.Transformer.generate_square_subsequent_mask(6)
        torch.testing.assert_close(
            model(x, mask=causal, is_causal=True), plain(x, mask=causal, is_causal=True), rtol=1e-4, atol=1e-5
        )


def test_a_decoder_layer_with_two_attentions() -> None:
    torch.manual_seed(0)
    model = Caller(nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 2).eval())
    plain = copy.deepcopy(model)
    x, memory = tokens(2, 5, True), tokens(2, 7, True, seed=2)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    inputs = {"tgt": x, "memory": memory, "tgt_mask": mask}
    assert len(rewrite(model, inputs, 4, 4, causal=False)) == 4
    torch.testing.assert_close(model(**inputs), plain(**inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, memory), plain(**inputs), atol=1e-2)


# ---------------------------------------------------------------------- owners of other people's making


class Plain(nn.Module):
    """A self-attention with the habits of hand-written code, each of them a switch."""

    def __init__(self, *, drop: float = 0.0, true_hides: bool = False, causal: bool = False, habit: str = "") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(32, 32), nn.Dropout(drop))
        self.attn_drop = nn.Dropout(drop)
        self.true_hides, self.causal, self.habit = true_hides, causal, habit

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        inside = self.norm(x) if self.habit in ("pre-norm", "block") else x
        q, k, v = (f(inside).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.habit == "clamp":
            k = k.clamp(-0.1, 0.1)
        scores = q @ k.mT * 8**-0.5
        if mask is not None:
            scores = scores.masked_fill(mask if self.true_hides else mask == 0, -torch.inf)
        if self.causal:
            length = x.shape[1]
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        if self.habit == "noise":
            scores = scores + 0.1 * torch.randn_like(scores)
        out: Tensor = self.to_out((self.attn_drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2))
        if self.habit == "post-norm":
            return torch.as_tensor(self.norm(x + out))
        return x + out if self.habit in ("residual", "block") else out


def rewrite_plain(module: Plain, inputs: dict[str, Any], kv_heads: int = 4, out: str = "to_out.0") -> Caller:
    model = Caller(module.eval())
    record = record_calls(model, ["module"], kwargs=inputs)["module"]
    attention = take_apart(module, 4, causal=module.causal)
    spec, parameters = pooled(attention, kv_heads)
    install(model, "module", attention.spec, spec, attention.parameters, parameters, record, out=out)
    return model


def keep_mask(*shape: int) -> Tensor:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(8)) > 0.4
    keep[..., 0] = True
    return keep


@pytest.mark.parametrize("habit", ["", "pre-norm", "post-norm", "residual", "block"])
def test_norms_and_residuals_inside_the_owner(habit: str) -> None:
    module = Plain(habit=habit)
    model, x = rewrite_plain(copy.deepcopy(module), {"x": tokens(2, 6, True)}), tokens(3, 9, True, seed=7)
    torch.testing.assert_close(model(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    other = Plain(habit="residual" if habit != "residual" else "").eval()
    assert not torch.allclose(model(x), other(x), atol=1e-2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("true_hides", [False, True])
@pytest.mark.parametrize(
    ("recorded", "shape"),
    [
        *itertools.product(("mask", "mask that hides nothing"), ((2, 1, 6, 6), (2, 1, 1, 6), (6, 6))),
        *itertools.product(("no mask",), ((2, 1, 6, 6), (2, 1, 1, 6))),
    ],
    ids=str,
)
def test_what_a_mask_means_is_found_out(shape: tuple[int, ...], true_hides: bool, causal: bool, recorded: str) -> None:
    module = Plain(true_hides=true_hides, causal=causal)
    keep = keep_mask(*shape)
    given = {"mask": keep, "mask that hides nothing": torch.ones_like(keep), "no mask": None}[recorded]
    inputs: dict[str, Any] = {"x": tokens(2, 6, True)}
    if given is not None:
        inputs["mask"] = ~given if true_hides else given
    model = rewrite_plain(copy.deepcopy(module), inputs)
    module.eval()
    x, mask = tokens(2, 6, True, seed=9), ~keep if true_hides else keep
    torch.testing.assert_close(model(x, mask=mask), module(x, mask=mask), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), module(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, mask=mask), module(x), atol=1e-3)


def test_a_kind_of_mask_that_means_something_else_is_an_error_not_a_wrong_number() -> None:
    """In the original a float mask is 0 or 1; added to the scores it would be silently wrong."""
    module = Plain()
    model = rewrite_plain(copy.deepcopy(module), {"x": tokens(2, 6, True), "mask": keep_mask(2, 1, 6, 6)})
    with pytest.raises(TypeError, match="float mask"):
        model(tokens(2, 6, True), mask=keep_mask(2, 1, 6, 6).float())


@pytest.mark.parametrize(
    ("habit", "reason"), [("clamp", "relative error"), ("noise", "repeat itself")], ids=["clamp", "noise"]
)
def test_what_cannot_be_reproduced_is_refused_and_left_alone(habit: str, reason: str) -> None:
    module = Plain(habit=habit)
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        rewrite_plain(module, {"x": tokens(2, 6, True)})
    assert refusal.value.hint
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())
    assert module.attn_drop.p == 0.0
    assert not module.training


@pytest.mark.parametrize("change", ["scale", "causal", "weight", "heads"])
def test_a_wrong_description_is_refused(change: str) -> None:
    module = Plain()
    model = Caller(module.eval())
    record = record_calls(model, ["module"], kwargs={"x": tokens(2, 6, True)})["module"]
    attention = take_apart(module, 4, causal=False)
    values: dict[str, Any] = dict(vars(attention.spec))
    parameters = dict(vars(attention.parameters))
    if change == "scale":
        values["scale"] *= 1.001
    elif change == "heads":
        values.update(heads=2, kv_heads=2, head_dim=16, value_dim=16)
    elif change == "weight":
        parameters["k_weight"] = parameters["k_weight"] + 1e-3
    spec, wrong = GroupedQueryAttention(**values), MixerParameters(**parameters)
    if change == "causal":  # the opposite is found out by trying; the mixer then follows the original
        mixer = install(
            model,
            "module",
            GroupedQueryAttention(**{**values, "causal": True}),
            spec,
            wrong,
            wrong,
            record,
            out="to_out.0",
        )
        assert mixer.protocol.causal == "never"
        return
    with pytest.raises(UnsupportedModel):
        install(model, "module", spec, spec, wrong, wrong, record, out="to_out.0")
    assert model.module is module


def test_owners_that_cannot_be_replaced() -> None:
    module = Plain().eval()
    x = tokens(2, 6, True)
    attention = take_apart(module, 4, causal=False)
    spec, parameters = attention.spec, attention.parameters
    record = record_calls(module, [""], kwargs={"x": x})[""]
    with pytest.raises(UnsupportedModel, match="itself"):
        install(module, "", spec, spec, parameters, parameters, record)
    with pytest.raises(UnsupportedModel, match="no module"):
        record_calls(module, ["nowhere"], kwargs={"x": x})


class Odd(nn.Module):
    """Takes a tensor of unknown role, or returns something unknown."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = Plain(), kind

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        out = self.inner(x)
        if self.kind == "argument":
            return out
        return (out, x[..., :1]) if self.kind == "element" else {"out": out}


@pytest.mark.parametrize("kind", ["argument", "element", "dict"])
def test_unknown_arguments_and_results_are_refused(kind: str) -> None:
    odd = Odd(kind).eval()
    model = Caller(odd)
    x = tokens(2, 6, True)
    inputs = {"x": x, "extra": x[:, :, :1]} if kind == "argument" else {"x": x}
    attention = take_apart(odd.inner, 4, causal=False)
    record = record_calls(model, ["module"], kwargs=inputs)["module"]
    with pytest.raises(UnsupportedModel, match=r"role|meaning|returns"):
        install(
            model, "module", attention.spec, attention.spec, attention.parameters, attention.parameters, record,
            out="inner.to_out.0",
        )  # fmt: skip


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Plain()
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.second(self.first(x)))

    model = Twice().eval()
    x = tokens(2, 6, True)
    expected = model(x)
    record = record_calls(model, ["first"], kwargs={"x": x})["first"]
    assert record.calls == 2
    attention = take_apart(model.first, 4, causal=False)
    p, spec = attention.parameters, attention.spec
    mixer: nn.Module = install(model, "first", spec, spec, p, p, record, out="to_out.0")
    assert model.first is mixer
    assert model.second is mixer
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_rewriting_again() -> None:
    case = ZOO["gpt2-sdpa"]
    model, inputs = case.build(), inputs_of(case)
    case.tie(model, 1)
    expected = case.run(model, inputs)
    rewrite(model, inputs, case.heads, 2, causal=True)
    records = record_calls(model, list(mixers(model)), kwargs=inputs)
    for path, mixer in mixers(model).items():
        parts = MixerParameters(
            mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight,
            mixer.q_proj.bias, mixer.k_proj.bias, mixer.v_proj.bias,
        )  # fmt: skip
        spec, parameters = pooled(Attention(mixer.spec, parts), 1)
        install(model, path, mixer.spec, spec, parts, parameters, records[path])
    assert {m.spec.kv_heads for m in mixers(model).values()} == {1}
    assert relative_error(case.run(model, inputs), expected) < RELATIVE[torch.float32]


# ---------------------------------------------------------------------- training


def test_gradients_are_those_of_the_original() -> None:
    """On a tied twin, shared heads collect the sum of the gradients of their copies."""
    case = ZOO["gpt2-sdpa"]
    inputs = inputs_of(case)
    model = tied(case)
    twin = copy.deepcopy(model)
    rewrite(twin, inputs, case.heads, 2, causal=True)
    for m in (model, twin):
        torch.autograd.backward(main_output(m(**inputs)).square().sum())
    theirs: Any = model.get_submodule("transformer.h.0.attn.c_attn").weight.grad
    ours: Any = twin.get_submodule("transformer.h.0.attn")
    q, k, v = (part.mT for part in theirs.chunk(3, dim=1))
    torch.testing.assert_close(ours.q_proj.weight.grad, q, rtol=1e-3, atol=1e-3)
    for shared, copies in ((ours.k_proj, k), (ours.v_proj, v)):
        torch.testing.assert_close(
            shared.weight.grad, copies.unflatten(0, (2, 2, 8)).sum(1).flatten(0, 1), rtol=1e-3, atol=1e-3
        )
    torch.testing.assert_close(
        twin.get_submodule("transformer.wte").weight.grad,
        model.get_submodule("transformer.wte").weight.grad,
        rtol=1e-3,
        atol=1e-3,
    )


def test_a_step_of_training_lowers_the_loss() -> None:
    case = ZOO["gpt2-sdpa"]
    model: Any = case.build()
    inputs = inputs_of(case)
    rewrite(model, inputs, case.heads, 1, causal=True)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("out", ["to_out", "to_out.0"])
def test_dropouts_are_found_by_what_they_do(out: str) -> None:
    mixer: Any = rewrite_plain(Plain(drop=0.2), {"x": tokens(2, 6, True)}, out=out).module
    assert mixer.protocol.attention_dropout == pytest.approx(0.2)
    assert mixer.protocol.output_dropout == (0.0 if out == "to_out" else pytest.approx(0.2))


@pytest.mark.parametrize("name", ["bert-eager", "gpt2-eager", "torch-encoder", "t5-eager"])
def test_training_mode_drops_what_the_original_drops(name: str) -> None:
    """Same seed, same draws where the kernels are written out; so the noisy outputs are equal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = ZOO[name]
    model, inputs = tied(case), inputs_of(case)
    paths = tuple(owners(model, case.heads))
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not path.startswith(paths):
            module.p = 0.0  # draws for these depend on the memory layout of what attention returns
    twin = copy.deepcopy(model)
    rewrite(twin, inputs, case.heads, case.heads, causal=case.causal)
    outputs = []
    for m in (model, twin):
        m.train()
        torch.manual_seed(11)
        with sdpa_kernel(SDPBackend.MATH):
            outputs.append(main_output(m(**inputs)))
    assert relative_error(outputs[1], outputs[0]) < 1e-4
    assert relative_error(outputs[1], case.run(twin.eval(), inputs)) > 1e-2  # there was noise


def test_training_mode_that_is_not_understood_is_an_error_in_training_only() -> None:
    class Noisy(Plain):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x, mask) * (1.5 if self.training else 1.0)

    model = rewrite_plain(Noisy(), {"x": tokens(2, 6, True)})
    model(tokens(2, 6, True))
    model.train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        model(tokens(2, 6, True))


def test_frozen_weights_stay_frozen() -> None:
    case = ZOO["bert-sdpa"]
    model = tied(case).requires_grad_(False)
    rewrite(model, inputs_of(case), case.heads, 2, causal=False)
    assert not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- export and compile

TRACED = [
    "gpt2-sdpa",
    "bert-eager",
    "t5-sdpa",
    "qwen3-sdpa",
    "torch-encoder-padded",
    "mha-sequence-first",
    "bloom-eager",
]


def traced_inputs(case: ZooCase, *size: int) -> dict[str, Any]:
    return {**inputs_of(case, torch.float32, *size), **({"use_cache": False} if "hf" in case.tags else {})}


EXPORTED_ALIKE = ("bert-eager", "qwen3-sdpa", "torch-encoder-padded")
"""What exporting them shows is enough of them in every run."""


@pytest.mark.parametrize("name", TRACED)
def test_export_with_free_sizes(name: str) -> None:
    case = ZOO[name]
    model, inputs = tied(case), inputs_of(case)
    rewrite(model, inputs, case.heads, KV_HEADS[name], causal=case.causal)
    given = traced_inputs(case)
    free = {n: {axis: torch.export.Dim.AUTO for axis in case.axes.get(n, {})} for n in inputs}
    shapes = {n: free.get(n) for n in given}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    for size in ((2, 9, 0), (3, 12, 1)):
        other = traced_inputs(case, *size)
        with torch.no_grad():
            assert relative_error(main_output(program(**other)), main_output(model(**other))) < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.exhaustive] if n in EXPORTED_ALIKE else []) for n in TRACED]
)
def test_compile_without_graph_breaks(name: str) -> None:
    case = ZOO[name]
    model, inputs = tied(case), inputs_of(case)
    rewrite(model, inputs, case.heads, KV_HEADS[name], causal=case.causal)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        given = traced_inputs(case)
        assert relative_error(main_output(compiled(**given)), main_output(model(**given))) < 1e-5


def test_a_compiled_decoding_step_over_a_static_cache() -> None:
    from transformers import StaticCache

    case = ZOO["gpt2-sdpa"]
    model: Any = tied(case)
    ids = inputs_of(case)["input_ids"]
    rewrite(model, inputs_of(case), case.heads, 1, causal=True)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    cache: Any = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        for i in range(5, 8):
            step = {"input_ids": ids[:, i : i + 1], "position_ids": torch.full((2, 1), i)}
            logits = compiled(**step, past_key_values=cache, use_cache=True).logits[:, -1]
            whole = model(input_ids=ids[:, : i + 1], use_cache=False).logits[:, -1]
            assert relative_error(logits, whole) < 1e-5
    assert cache.layers[0].keys.shape == (2, 1, 16, 8)


# ---------------------------------------------------------------------- comparing answers


def test_what_counts_as_agreement() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert disagreement(x, x) is None
    assert disagreement((x, None), (x, None)) is None
    assert disagreement(x + 1e-7, x) is None
    assert "relative error" in str(disagreement(x + 1e-3, x))
    assert disagreement(x[:2], x) is not None
    assert disagreement(x.double(), x) is not None
    assert disagreement((x, x), (x, None)) is not None
    assert disagreement((x,), (x, None)) is not None
    assert disagreement(x, (x,)) is not None
    assert disagreement(torch.arange(3), torch.arange(1, 4)) is not None
    holes = x.clone()
    holes[0] = torch.nan
    assert disagreement(x, holes) is None  # rows that the original leaves undefined
    assert disagreement(holes, x) is not None
    assert "finite" in str(disagreement(x, torch.full_like(x, torch.nan)))


# ---------------------------------------------------------------------- recording


def test_records_are_the_arguments_by_name() -> None:
    model = Caller(Plain().train())
    x, mask = tokens(2, 6, True), keep_mask(2, 1, 6, 6)
    record = record_calls(model, ["module", "module.norm"], (x,), {"mask": mask})
    assert set(record) == {"module"}  # the norm is not in use
    assert list(record["module"].arguments) == ["x", "mask"]
    assert record["module"].arguments["x"] is x
    assert record["module"].calls == 1
    assert model.module.training
    assert not record["module"].output.requires_grad


def test_tensors_that_the_model_overwrites_are_recorded_as_they_were() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Plain()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            x += self.attention(x)
            return x

    model = Overwriting().eval()
    x = tokens(2, 6, True)
    record = record_calls(model, ["attention"], (x,))["attention"]
    assert torch.equal(record.arguments["x"], x)
    with torch.no_grad():
        assert torch.equal(model.attention(x), record.output)


def test_a_cache_is_recorded_as_it_was_before_the_call() -> None:
    from transformers import DynamicCache

    case = ZOO["gpt2-sdpa"]
    model, inputs = case.build(), inputs_of(case)
    record = record_calls(model, ["transformer.h.0.attn"], kwargs={**inputs, "past_key_values": DynamicCache()})
    assert record["transformer.h.0.attn"].arguments["cache"].get_seq_length() == 0


class AsksForTheClass(nn.Module):
    """Calls its attention only if that is torch's own, as graph networks do that have several kinds."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.asks = nn.MultiheadAttention(32, 4, batch_first=True), asks

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and not isinstance(self.attention, nn.MultiheadAttention):
            return x
        out: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return out


@pytest.mark.parametrize("asks", [True, False])
def test_a_module_that_is_called_for_its_class_stays_and_is_still_called(asks: bool) -> None:
    model, x = AsksForTheClass(asks).eval(), torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in (*model.attention.in_proj_weight.split(32)[1:], *model.attention.in_proj_bias.split(32)[1:]):
            rows = part.view(2, 2, 8, *part.shape[1:])
            rows.copy_(rows[:, :1].clone().expand_as(rows))
    (site,) = rewriter.inspect(model, example_inputs=(x,)).sites
    assert ("window" in rewriter.inspect(model, example_inputs=(x,)).targets[site.name]) == (not asks)
    small = rewriter.optimize(model, "gqa2", example_inputs=(x,), kernels="off", verify=False)
    assert isinstance(small.attention, RewrittenMixer) == (not asks)
    assert relative_error(small(x), model(x)) < RELATIVE[torch.float32]
    if asks:
        with pytest.raises(rewriter.RewriteError, match="asks for its class"):
            rewriter.optimize(model, "window", example_inputs=(x,), kernels="off")
