"""Attentions whose graph is no plain list of operators: flex_attention, vmap, slices that are written into."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import rewriter
from rewriter.errors import RewriteError
from rewriter.install.torch_module import mixers

WIDTH, HEADS, DIM, KEPT, TOKENS = 32, 4, 8, 2, 16
EXACT, MOVED = 1e-5, 1e-2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Flexible(Attention):
    """Causal, with a bias by head and distance out of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(HEADS, TOKENS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, score + self.table[h, (i - j).abs()], -torch.inf)

        mixed = flex_attention(q, k, v, score_mod=bias)
        assert isinstance(mixed, Tensor)
        return mixed


class Mapped(Attention):
    """One head's attention, by vmap over batch and heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(torch.vmap(_of_one_head))(q, k, v)


class InChunks(Attention):
    """Queries in two halves, each written into its part of the output."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, half = torch.empty_like(q), TOKENS // 2
        for start in (0, half):
            out[:, :, start : start + half] = _of_one_head(q[:, :, start : start + half], k, v)
        return out


class ByImage(Attention):
    """Batch and heads on one axis, of which each call takes a slice: a graph has no such slice of fewer heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = torch.empty_like(q)
        for start in range(0, len(q), HEADS):
            part = slice(start, start + HEADS)
            out[part] = _of_one_head(q[part], k[part], v[part])
        return out.unflatten(0, (-1, HEADS))


def _of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * DIM**-0.5, -1) @ v


def _x() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def _twin(kind: type[Attention], *, tied: bool = True) -> Attention:
    torch.manual_seed(0)
    module = kind().eval().requires_grad_(False)
    if tied:
        for rows in (*module.k.parameters(), *module.v.parameters()):
            groups = rows.unflatten(0, (KEPT, HEADS // KEPT, DIM))
            groups.copy_(groups[:, :1].clone().expand_as(groups))
    return module


def _given(module: nn.Module, door: str) -> object:
    if door == "module":
        return copy.deepcopy(module)
    program = torch.export.export(module, (_x(),), strict=False)
    return program if door == "program" else program.module()


CASES = [
    (Flexible, "module"),
    (Flexible, "graph module"),
    (Mapped, "module"),
    (Mapped, "program"),
    (InChunks, "program"),
    (InChunks, "graph module"),
    (ByImage, "program"),
]


@pytest.mark.parametrize(("kind", "door"), CASES, ids=lambda c: c if isinstance(c, str) else c.__name__)
def test_a_twin_loses_nothing(kind: type[Attention], door: str) -> None:
    module = _twin(kind)
    made = rewriter.optimize(_given(module, door), f"gqa{KEPT}", example_inputs=(_x(),))
    run = made if isinstance(made, nn.Module) else made.module()  # type: ignore[attr-defined]
    with torch.no_grad():
        assert (run(_x()) - module(_x())).abs().max() <= EXACT


def test_control_heads_that_differ_lose_something() -> None:
    module = _twin(Mapped, tied=False)
    made = rewriter.optimize(module, f"gqa{KEPT}", example_inputs=(_x(),))
    with torch.no_grad():
        assert (made(_x()) - module(_x())).abs().max() > MOVED


class Renormalised(Flexible):
    """What is used of flex_attention is its log-sum-exp, too, which no attention written anew gives."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed, sums = flex_attention(q, k, v, return_lse=True)
        assert isinstance(sums, Tensor)
        return mixed * sums.sigmoid()[..., None]


def test_an_attention_whose_sums_are_used_is_run_whole() -> None:
    (site,) = rewriter.inspect(_twin(Renormalised), example_inputs=(_x(),)).sites
    assert "its log-sum-exp is used" in site.whole
    for tied in (True, False):
        module = _twin(Renormalised, tied=tied)
        made = rewriter.optimize(module, f"gqa{KEPT}", example_inputs=(_x(),))
        with torch.no_grad():
            moved = (made(_x()) - module(_x())).abs().max()
        assert moved <= EXACT if tied else moved > MOVED


def test_padded_tokens_of_torch_layers_are_compared_without_their_fast_path() -> None:
    """The fast path puts zeros in the place of padded tokens, which no other way of calling the layers does."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    module = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).eval().requires_grad_(False)
    packed = module.layers[0].self_attn  # type: ignore[union-attr]
    for tensor in (packed.in_proj_weight, packed.in_proj_bias):  # type: ignore[union-attr]
        groups = tensor.unflatten(0, (3, KEPT, HEADS // KEPT, DIM))  # type: ignore[operator, union-attr]
        groups[1:] = groups[1:, :, :1].clone().expand_as(groups[1:])
    padded = torch.zeros(2, TOKENS, dtype=torch.bool)
    padded[1, 9:] = True
    call = {"src": _x(), "src_key_padding_mask": padded}
    made = rewriter.optimize(module, f"gqa{KEPT}", example_inputs=call)
    with torch.no_grad():
        assert (made(**call) - module(**call))[~padded].abs().max() <= EXACT


class Scripted(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.jit.script(nn.Softmax(-1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed: Tensor = self.mix(q @ k.mT) @ v
        return mixed


def test_parts_compiled_to_torchscript_are_named() -> None:
    with pytest.raises(RewriteError, match="mix is compiled to TorchScript"):
        rewriter.optimize(Scripted().eval(), f"gqa{KEPT}", example_inputs=(_x(),))


class Doubled(nn.Module):
    def forward(self, stored: Tensor) -> Tensor:
        return 2 * stored


class ComputedBias(Attention):
    """Projections that compute their biases, their weights are stored; and a gate, which no generated module has."""

    def __init__(self) -> None:
        super().__init__()
        for projection in (self.q, self.k, self.v, self.o):
            nn.utils.parametrize.register_parametrization(projection, "bias", Doubled())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _of_one_head(q, k, v)


class WeightNormed(Attention):
    """Projections that compute their weights."""

    def __init__(self) -> None:
        super().__init__()
        for projection in (self.q, self.k, self.v, self.o):
            nn.utils.parametrizations.weight_norm(projection)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _of_one_head(q, k, v)


def test_a_rewritten_copy_leaves_parametrised_projections_of_the_original_alone() -> None:
    module = nn.Sequential(_twin(ComputedBias), _twin(ComputedBias))
    with torch.no_grad():
        before = module(_x())
        made = rewriter.optimize(module, f"gqa{KEPT}", example_inputs=(_x(),))
        assert torch.equal(module(_x()), before)
        assert (made(_x()) - before).abs().max() <= EXACT


def test_weights_that_are_computed_become_stored_ones_and_the_output_stays_as_it_is() -> None:
    module = nn.Sequential(_twin(WeightNormed))
    with torch.no_grad():
        before = module(_x())
        for target, exact in ((f"gqa{KEPT}", True), ("mqa", False)):
            made: Any = rewriter.optimize(module, target, example_inputs=(_x(),))
            assert bool((made(_x()) - before).abs().max() <= EXACT) is exact
            assert [row.exact for row in made.rewrite_report.sites] == [exact]
            assert [*mixers(made)] == ["0"] and nn.utils.parametrize.is_parametrized(made[0].out_proj)
        assert torch.equal(module(_x()), before)
