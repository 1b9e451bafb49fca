"""What `inspect` offers for a module's attentions is what `optimize` does, by how modules are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import rewriter
from rewriter.errors import NothingToRewrite
from rewriter.install.torch_module import mixers
from tests.zoo.randomize import randomize

WIDTH, HEADS = 32, 4
FORMS = {"plain": True, "tensor of no known role": False, "tokens on two axes": False}


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden_states: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = hidden_states.flatten(1, -2)
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out.view(hidden_states.shape)


class Calls(nn.Module):
    """A model of two attentions, each called as `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.layers = form, nn.ModuleList(Attends() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "tokens on two axes":
            x = x.unflatten(1, (3, -1))
        lengths = torch.tensor([x.shape[1]]) if self.form == "tensor of no known role" else None
        for layer in self.layers:
            x = x + (layer(x) if lengths is None else layer(x, lengths))
        return x.flatten(1, -2)


@pytest.mark.parametrize(("form", "replaced"), FORMS.items(), ids=FORMS)
def test_what_needs_a_module_of_its_own_is_offered_where_one_can_be_called(form: str, replaced: bool) -> None:
    model, x = Calls(form).eval(), torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    offered = rewriter.inspect(model, example_inputs=(x,)).targets
    assert all(("window" in names) == ("fnet" in names) == replaced and "gqa2" in names for names in offered.values())
    assert len(rewriter.optimize(model, "gqa2", example_inputs=(x,)).rewrite_report.sites) == 2
    for target in ("window:4", "fnet"):
        if replaced:
            assert len(rewriter.optimize(model, target, example_inputs=(x,)).rewrite_report.sites) == 2
        else:
            with pytest.raises(NothingToRewrite):
                rewriter.optimize(model, target, example_inputs=(x,))


class Weighs(Attends):
    """Hands on its attention weights, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), weights


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attends = Weighs()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attends(x)[0]
        return out


def test_what_gives_no_weights_is_not_offered_where_they_are_handed_on() -> None:
    model, x = Reads().eval(), torch.randn(2, 12, WIDTH)
    (names,) = rewriter.inspect(model, example_inputs=(x,)).targets.values()
    assert "window" in names and "linear" not in names
    assert rewriter.optimize(model, "window:4", example_inputs=(x,)).rewrite_report.sites
    with pytest.raises(NothingToRewrite, match="no attention weights to return"):
        rewriter.optimize(model, "linear", example_inputs=(x,))


class Thinks(nn.Module):
    """An attention and a feed-forward block, which is a module of its own or written into the layer's forward."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attends, self.up, self.down = Attends(), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.block = nn.Sequential(self.up, nn.GELU(), self.down) if apart else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attends(x)
        return x + (self.down(gelu(self.up(x))) if self.block is None else self.block(x))


@pytest.mark.parametrize("apart", [True, False])
def test_blocks_are_offered_what_they_become_where_a_module_computes_them(apart: bool) -> None:
    model, x = nn.Sequential(Thinks(apart)).eval(), torch.randn(2, 12, WIDTH)
    seen = rewriter.inspect(model, example_inputs=(x,))
    (block,) = seen.feed_forward.sites
    assert ("sparse-mixer" in seen.targets[block.name]) == apart
    if apart:
        done = rewriter.optimize(model, "sparse-mixer", example_inputs=(x,)).rewrite_report
        assert any(row.after == "moe16" for row in done.sites)
    else:
        with pytest.raises(NothingToRewrite, match="no module of its own"):
            rewriter.optimize(model, "sparse-mixer", example_inputs=(x,))


def test_layers_that_share_weights_are_not_offered_what_keeps_some_of_them() -> None:
    torch.manual_seed(0)
    layer, x = Thinks(True), torch.randn(2, 12, WIDTH)
    for layers, able in (([layer] * 3, False), ([Thinks(True), layer, layer], True)):
        model = nn.Sequential(*layers).eval()
        offered = rewriter.inspect(model, example_inputs=(x,)).targets
        assert any("fnet-hybrid" in names for names in offered.values()) is able
        assert any("sparse-mixer" in names for name, names in offered.items() if "block" in name) is able
        for target in ("fnet-hybrid", "sparse-mixer"):
            if able:
                rewriter.optimize(model, target, example_inputs=(x,))
            else:
                with pytest.raises(NothingToRewrite, match="shares its weights"):
                    rewriter.optimize(model, target, example_inputs=(x,))


class Lent(nn.Module):
    """One attention that each of two layers calls, with adapters of its own for its keys (as Zamba2's)."""

    def __init__(self, adapted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        ranks = (nn.Sequential(nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, WIDTH, bias=False)) for _ in range(2))
        self.adapters = nn.ModuleList(ranks) if adapted else None

    def forward(self, x: Tensor, layer: int) -> Tensor:
        keys = self.k(x) if self.adapters is None else self.k(x) + self.adapters[layer](x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), keys, self.v(x)))
        out: Tensor = self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Borrows(nn.Module):
    def __init__(self, adapted: bool) -> None:
        super().__init__()
        self.attends = Lent(adapted)

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(2):
            x = x + self.attends(x, layer)
        return x


@pytest.mark.parametrize("adapted", [True, False])
def test_one_module_with_adapters_for_each_layer_that_calls_it_is_offered_no_fewer_heads(adapted: bool) -> None:
    model, x = Borrows(adapted).eval(), torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    offered = rewriter.inspect(model, example_inputs=(x,)).targets
    assert len(offered) == 2 and all(("gqa2" in names) is not adapted for names in offered.values())
    if adapted:
        with pytest.raises(NothingToRewrite, match=r"attends: .* is computed, not stored"):
            rewriter.optimize(model, "gqa2", example_inputs=(x,))
    else:  # in the forward that is there, which is told the layer
        done = rewriter.optimize(model, "gqa2", example_inputs=(x,))
        assert len(done.rewrite_report.sites) == 2 and isinstance(done.attends, Lent)
        assert not any("window" in names for names in offered.values())
        with pytest.raises(NothingToRewrite, match="called with different arguments"):
            rewriter.optimize(model, "window:4", example_inputs=(x,))


def test_layers_without_positions_are_given_them_and_use_none(tmp_path: Path) -> None:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "no_rope_layers": [1, 0],
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = randomize(SmolLM3ForCausalLM(SmolLM3Config(**sizes, **heads)))
    ids = torch.randint(3, 64, (2, 11))
    wide, narrow = (rewriter.optimize(model, f"window:{w}", example_inputs={"input_ids": ids}) for w in (64, 4))
    assert [m.protocol.rotary for m in mixers(wide).values()] == ["half", "none"]
    wide.save_pretrained(tmp_path / "wide")
    with torch.no_grad():
        before, *after = (m(ids).logits for m in (model, wide, rewriter.load(tmp_path / "wide"), narrow))
    assert all(torch.allclose(logits, before, atol=1e-4) for logits in after[:2])
    assert (after[2] - before).abs().max() > 1e-2, "the control: fewer keys"
