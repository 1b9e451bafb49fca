"""What no mixer reproduces keeps its forward: smaller projections, repeated heads, caches that hold each once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from rewriter.errors import UnsupportedModel
from rewriter.install.repeated_projection import RepeatedProjection, repeated
from rewriter.install.shared_cache import CacheView, SharedHeads, sharers
from tests.covering import covering
from tests.targets.lossless_twin import distance, legal_pool, tied
from tests.zoo import heads
from tests.zoo.case import ZooCase
from tests.zoo.feeds import HEADS, WIDTH
from tests.zoo.hugging_face import ENCODER, implementations
from tests.zoo.models import ZOO

EXACT, MOVED = 1e-4, 1e-3
FIRST, SECOND = (2, 7, 0), (3, 9, 1)
KEEPS = "keeps its own attention"


def _encoder(name: str, family: str, suffixes: tuple[str, ...], **settings: Any) -> ZooCase:
    config = {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    views = heads.separate(HEADS, *suffixes)
    return implementations(name, f"{family}Model", f"{family}Config", config, views, only=("eager",), causal=False)[0]


def _with_its_own_table(case: ZooCase, table: str) -> ZooCase:
    """Positions that are frozen sines are no weights to randomise."""

    def build() -> nn.Module:
        module = case.build()
        fresh: nn.Module = type(module)(module.config)
        module.get_submodule(table).load_state_dict(fresh.get_submodule(table).state_dict())
        return module

    return replace(case, build=build)


SELF = ("self.key", "self.value")
FAMILIES = {
    case.name: case
    for case in [
        _with_its_own_table(_encoder("roformer", "RoFormer", SELF, embedding_size=WIDTH), "encoder.embed_positions"),
        _encoder(
            "nystromformer", "Nystromformer", SELF, num_landmarks=64, segment_means_seq_len=64, conv_kernel_size=3
        ),
        _encoder("ibert", "IBert", SELF),
        ZOO["gpt-neo-eager"],
        ZOO["x-alibi"],
        ZOO["x-rotary"],
        ZOO["complex-rotary"],
    ]
}
SAVES_WORK = {name for name in FAMILIES if name != "ibert-eager"}


def optimized(case: ZooCase, *, perturbed: bool = False, target: str = "") -> tuple[nn.Module, Any]:
    """(the twin, the twin rewritten)."""
    module = tied(case, perturbed=perturbed)
    new = rewriter.optimize(module, target or f"gqa{legal_pool(case)}", example_inputs=case.inputs(*FIRST))
    return module, new


# ------------------------------------------------------------------ exact, and lossy


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tied_twin_is_rewritten_without_loss_and_a_perturbed_one_is_not(name: str) -> None:
    case = FAMILIES[name]
    module, new = optimized(case)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    report = new.rewrite_report
    assert report.refused == () and len(report.sites) == case.sites
    assert all(row.exact for row in report.sites)
    assert any(note.startswith(KEEPS) for row in report.sites for note in row.notes) and KEEPS in str(report)
    for size in (FIRST, SECOND, (1, 5, 2)):
        assert distance(case.run(new, case.inputs(*size)), case.run(module, case.inputs(*size))) < EXACT
    assert report.parameters.before == sum(p.numel() for p in module.parameters())
    assert report.parameters.after == sum(p.numel() for p in new.parameters()) < report.parameters.before
    assert (report.flops.after < report.flops.before) is (name in SAVES_WORK)
    assert all(
        ("still projected to all heads" in note) is (name == "ibert-eager")
        for row in report.sites
        for note in row.notes
    )
    assert {k: t.shape for k, t in module.state_dict().items()} == {k: t.shape for k, t in before.items()}
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items()), "the original was changed"

    other, lossy = optimized(case, perturbed=True)
    assert not any(row.exact for row in lossy.rewrite_report.sites)
    assert distance(case.run(lossy, case.inputs(*SECOND)), case.run(other, case.inputs(*SECOND))) > MOVED


@pytest.mark.parametrize("name", ["gpt-neo-eager", "complex-rotary", "ibert-eager"])
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = FAMILIES[name]
    module, new = optimized(case)
    rewriter.save(new, tmp_path / "new")
    loaded = rewriter.load(tmp_path / "new", **({} if "hf" in case.tags else {"module": case.build()}))
    inputs = case.inputs(*SECOND)
    assert distance(case.run(loaded, inputs), case.run(module, inputs)) < EXACT
    assert set(repeated(loaded)) == set(repeated(new)) != set()
    assert {k: vars(s) for k, s in sharers(loaded).items()} == {k: vars(s) for k, s in sharers(new).items()}
    if "hf" in case.tags:
        with pytest.raises(Exception, match=r"rewrite|model_type|rewriter"):
            type(module).from_pretrained(tmp_path / "new")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["gpt-neo-eager", "complex-rotary", "ibert-eager"])
def test_it_trains_exports_and_compiles(name: str) -> None:
    case = FAMILIES[name]
    _, new = optimized(case)
    inputs = case.inputs(*SECOND)
    expected = case.run(new, inputs)
    constants: Any = {"use_cache": False} if name.startswith("gpt") else {}
    exported = torch.export.export(new, (), {**inputs, **constants}, strict=False)
    assert distance(case.run(exported.module(), {**inputs, **constants}), expected) < EXACT
    compiled: Any = torch.compile(new, backend="eager")
    assert distance(case.run(compiled, inputs), expected) < EXACT
    new.train()
    result = new(**inputs)
    out = result if isinstance(result, Tensor) else result[0]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    small = [p for m in repeated(new).values() for p in m.parameters() if p.dim() == 2]
    assert small and all(p.grad is not None and float(p.grad.abs().max()) > 1e-7 for p in small)


@pytest.mark.parametrize("name", ["gpt-neo-eager", "x-alibi"])
def test_it_can_be_rewritten_again(name: str) -> None:
    case = FAMILIES[name]
    module = case.build()
    inputs = case.inputs(*FIRST)
    once = rewriter.optimize(module, "gqa2", example_inputs=inputs)
    twice = rewriter.optimize(once, "mqa", example_inputs=inputs)
    assert [(row.before, row.after) for row in twice.rewrite_report.sites] == [("gqa2", "mqa")] * case.sites
    direct = rewriter.optimize(module, "mqa", example_inputs=inputs)
    assert distance(case.run(twice, inputs), case.run(direct, inputs)) < EXACT
    assert distance(case.run(twice, inputs), case.run(once, inputs)) > MOVED
    assert sum(p.numel() for p in twice.parameters()) == sum(p.numel() for p in direct.parameters())


# ------------------------------------------------------------------ caches


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


def generated(model: Any, case: ZooCase, **way: Any) -> Tensor:
    inputs = {n: t for n, t in case.inputs(2, 6, 1).items() if n != "decoder_input_ids"}
    if (mask := inputs.get("attention_mask")) is not None and "encoder-decoder" not in case.tags:
        inputs["attention_mask"] = mask.flip(-1)  # padding on the left
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "no_repeat_ngram_size": 1,
    }
    tokens: Tensor = model.generate(**inputs, **settings, **way)
    return tokens


def heads_cached(model: Any, case: ZooCase) -> set[int]:
    with torch.no_grad():
        cache = model(**case.inputs(*FIRST), use_cache=True).past_key_values
    pair = (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None))
    return {layer.keys.shape[1] for part in (pair if all(pair) else (cache,)) for layer in part.layers}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt-neo-eager", "falcon-sdpa"])
def test_generation_goes_on_with_a_smaller_cache(name: str, way: str) -> None:
    case = ZOO[name]
    module, new = optimized(case)
    assert torch.equal(generated(new, case, **WAYS[way]), generated(module, case, **WAYS[way]))
    assert heads_cached(module, case) == {HEADS}
    assert heads_cached(new, case) == {legal_pool(case)}
    report = new.rewrite_report
    assert report.kv_bytes_per_token.before == 2 * report.kv_bytes_per_token.after
    worse = tied(case)
    case.perturb(worse, 3.0)
    worse = rewriter.optimize(worse, f"gqa{legal_pool(case)}", example_inputs=case.inputs(*FIRST))
    assert not torch.equal(generated(worse, case, **WAYS[way]), generated(module, case, **WAYS[way]))


PAIRED = ["t5-sdpa", "bart-sdpa", "whisper-sdpa"]


@pytest.mark.parametrize(("name", "way", "where"), covering(PAIRED, tuple(WAYS), ("in mixers", "kept")))
def test_encoder_decoders_generate_with_shared_self_and_cross_attention(
    name: str, way: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewritten as they come, or as if no mixer could reproduce them.

    Their caches come in pairs, and cross-attention reads what it stored at the first step (`is_updated`).
    """
    case, kept = ZOO[name], where == "kept"
    if kept:

        def never(*args: Any, **kwargs: Any) -> None:
            raise UnsupportedModel("this test lets no module be rebuilt")

        monkeypatch.setattr("rewriter.install.module_sites.install", never)
    module, new = optimized(case)
    report = new.rewrite_report
    assert len(report.sites) == case.sites and all((KEEPS in " ".join(row.notes)) is kept for row in report.sites)
    assert torch.equal(generated(new, case, **WAYS[way]), generated(module, case, **WAYS[way]))
    assert (heads_cached(module, case), heads_cached(new, case)) == ({HEADS}, {HEADS // 2})
    worse = tied(case)
    case.perturb(worse, 3.0)
    worse = rewriter.optimize(worse, f"gqa{legal_pool(case)}", example_inputs=case.inputs(*FIRST))
    assert not torch.equal(generated(worse, case, **WAYS[way]), generated(module, case, **WAYS[way]))


def test_a_view_stores_each_head_once_and_reads_as_many_as_were_stored() -> None:
    import transformers

    shared, whole = SharedHeads(2), transformers.DynamicCache()
    view = CacheView(whole, shared)
    assert isinstance(view, transformers.DynamicCache) and type(view) is CacheView
    one = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
    keys, values = view.update(one, 2 * one, 0)
    assert torch.equal(keys, one) and torch.equal(values, 2 * one)
    assert whole.layers[0].keys.shape == (2, 2, 3, 4)
    assert torch.equal(view.layers[0].keys, one) and view.get_seq_length(0) == 3
    keys, _ = view.update(one, one, 0)
    assert torch.equal(keys, torch.cat([one, one], dim=2))
    uneven = one.clone()
    uneven[:, 1] += 1.0
    assert not torch.equal(CacheView(transformers.DynamicCache(), shared).update(uneven, one, 0)[0], uneven)


# ------------------------------------------------------------------ how weights may be stored


class Stored(nn.Module):
    """Causal attention with features rotated inside; `how` its keys and values are projected."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        if how in ("linear", "read directly"):
            self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        elif how == "packed":
            self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        elif how == "interleaved":
            self.kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        else:
            self.w_kv = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / WIDTH**0.5)
            self.b_kv = nn.Parameter(torch.randn(2 * WIDTH) / 5)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*x.shape[:2], HEADS, -1)
        if self.how == "linear":
            return self.k(x).view(shape), self.v(x).view(shape)
        if self.how == "read directly":
            return tuple(F.linear(x, m.weight, m.bias).view(shape) for m in (self.k, self.v))  # type: ignore[return-value]
        if self.how == "interleaved":
            k, v = self.kv(x).view(*x.shape[:2], HEADS, 2, -1).unbind(-2)
            return k, v
        both = self.kv(x) if self.how == "packed" else x @ self.w_kv + self.b_kv
        k, v = both.chunk(2, dim=-1)
        return k.view(shape), v.view(shape)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        k, v = self._project(x)
        q = self.q(x).view(*x.shape[:2], HEADS, -1)
        q, k = ((t * turn.cos() + t.roll(1, -1) * 0 + _turned(t) * turn.sin()).transpose(1, 2) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def _turned(t: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def angles(length: int) -> Tensor:
    steps = torch.arange(length).float()[:, None, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
    return steps


STORED = {"linear": True, "packed": True, "interleaved": True, "bare parameter": False, "read directly": False}
"""How keys and values are projected, and whether fewer heads save work there."""


def _tie(module: Stored, how: str) -> None:
    with torch.no_grad():
        if how in ("linear", "read directly"):
            views = [p.view(HEADS, WIDTH // HEADS, -1) for m in (module.k, module.v) for p in m.parameters()]
        elif how == "packed":
            views = [p.view(2, HEADS, WIDTH // HEADS, -1)[i] for p in module.kv.parameters() for i in (0, 1)]
        elif how == "interleaved":
            views = [module.kv.weight.view(HEADS, 2 * WIDTH // HEADS, -1)]
        else:
            views = [p.mT.view(2, HEADS, WIDTH // HEADS, -1)[i] for p in (module.w_kv,) for i in (0, 1)]
            views += [module.b_kv.view(2, HEADS, -1)[i] for i in (0, 1)]
        for view in views:
            view[1], view[3] = view[0], view[2]


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("alone", [False, True], ids=["in a model", "the model itself"])
def test_projections_may_be_stored_in_any_way(how: str, alone: bool) -> None:
    module = Stored(how).eval()
    _tie(module, how)
    holder: nn.Module = module if alone else Holder(module)
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    new = rewriter.optimize(holder, "gqa2", example_inputs=(x, angles(6)))
    (row,) = new.rewrite_report.sites
    (note,) = row.notes
    assert row.exact and note.startswith(KEEPS)
    assert ("still projected" not in note) is STORED[how]
    assert new.rewrite_report.parameters.after == sum(p.numel() for p in new.parameters())
    longer = torch.randn(3, 9, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert distance(new(longer, angles(9)), holder(longer, angles(9))) < EXACT
        for name, parameter in module.named_parameters():
            if name in ("k.weight", "kv.weight"):
                parameter[-1] += 1.0
            elif name == "w_kv":
                parameter[:, WIDTH - 1] += 1.0
        changed = rewriter.optimize(holder, "gqa2", example_inputs=(x, angles(6)))
        assert not changed.rewrite_report.sites[0].exact
        assert distance(changed(longer, angles(9)), holder(longer, angles(9))) > MOVED


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        out: Tensor = self.inner(x, turn)
        return out


def test_a_module_that_does_not_repeat_itself_is_refused_and_left_alone() -> None:
    class Noisy(Stored):
        def forward(self, x: Tensor, turn: Tensor) -> Tensor:
            return super().forward(x, turn) + 0.1 * torch.rand(1)

    holder = Holder(Noisy("linear").eval())
    kinds = [type(m) for m in holder.modules()]
    x = torch.randn(2, 6, WIDTH)
    with pytest.raises(rewriter.NothingToRewrite, match="repeated heads do not give what they should") as refusal:
        rewriter.optimize(holder, "gqa2", example_inputs=(x, angles(6)), inplace=True)
    assert "torch.export" in refusal.value.hint
    assert [type(m) for m in holder.modules()] == kinds


# ------------------------------------------------------------------ the projection itself


def test_a_repeated_projection_is_the_old_one_with_equal_heads() -> None:
    weight, index = nn.Parameter(torch.randn(6, 5)), torch.tensor([0, 1, 2, 3, 2, 3, 4, 5])
    bias = nn.Parameter(torch.randn(6))
    x = torch.randn(2, 3, 5)
    new = RepeatedProjection(weight, bias, index)
    torch.testing.assert_close(new(x), F.linear(x, weight[index], bias[index]))
    assert (new.in_features, new.out_features) == (5, 8)
    assert not torch.allclose(new(x), F.linear(x, weight[index.flip(0)], bias[index]))


def test_a_forward_that_torch_export_refuses_is_traced_instead() -> None:
    """`nn.TransformerDecoder` looks at its mask to see whether it is causal, and branches on what it sees."""
    torch.manual_seed(0)
    module = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 48, batch_first=True), 2).eval()
    views = heads.in_projection(HEADS)
    with torch.no_grad():
        for view in views(module):
            view[1], view[3] = view[0], view[2]
    x, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(module, (x, memory, mask(5)), strict=False)
    seen = rewriter.inspect(module, example_inputs=(x, memory, mask(5)))
    assert seen.refusals == ()
    assert [(s.name, s.causal, s.cross) for s in seen.sites] == [
        (f"layers.{n}.{part}", part == "self_attn", part != "self_attn")
        for n in (0, 1)
        for part in ("self_attn", "multihead_attn")
    ]
    new = rewriter.optimize(module, "gqa2", example_inputs=(x, memory, mask(5)))
    assert all(row.exact for row in new.rewrite_report.sites) and len(new.rewrite_report.sites) == 4
    with torch.no_grad():
        for length in (5, 8):
            given = (torch.randn(3, length, WIDTH), torch.randn(3, 6, WIDTH))
            assert distance(new(*given, mask(length)), module(*given, mask(length))) < EXACT
            assert distance(new(*given, mask(length)), new(*given)) > MOVED
