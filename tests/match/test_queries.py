"""Queries of unusual kinds: folded, apart, learned; and softmaxes that only look as if they weighed tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

import rewriter
from passes.match.attention import Matches, find_attention
from rewriter.capture.torch_export import capture
from tests.match.doors import through_torch
from tests.match.expected import REPLAY_LIMIT
from tests.targets.head_norms import Normed
from tests.targets.lossless_twin import distance
from tests.zoo.models import ZOO

HEADS, SHARED, DIM, WIDTH = 4, 2, 8, 32


def matches(module: nn.Module, *inputs: Tensor) -> Matches:
    return find_attention(capture(module.eval(), inputs, {}).flow)


def features(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------ packed and normalised


class PackedNorm(Normed):
    """Queries and keys out of a packed projection, normalised by head or over all heads."""

    def __init__(self, by_head: bool) -> None:
        super().__init__("layer", packed=True)
        self.by_head = by_head
        if by_head:
            self.q_norm, self.k_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)


def test_a_norm_over_the_heads_of_a_packed_projection_is_told_from_one_by_head() -> None:
    (site,) = matches(PackedNorm(True), features()).sites
    assert site.k.norm is not None and site.k.norm.per_head
    (site,) = matches(PackedNorm(False), features()).sites
    assert site.k.norm is not None and not site.k.norm.per_head


# ------------------------------------------------------------------ scores that are bent


class Bent(nn.Module):
    """Attention with something done to its scores [B, H, T, T]."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o, self.change = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out: Tensor = self.o((self.change(q @ k.mT * DIM**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


def lower(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:]).tril()


UNCHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "clamped far out": lambda s: s.clamp(-5e4, 5e4),
    "clamped from below": lambda s: s.clamp(min=-1e5),
    "multiplied where hidden": lambda s: s * lower(s) - 1e4 * (1 - lower(s)),
}
CHANGED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "clamped": (lambda s: s.clamp(-5, 5), "scores are clamped between -5 and 5"),
    "multiplied where seen": (lambda s: s * lower(s), "scores are multiplied by a tensor"),
    "multiplied where half hidden": (
        lambda s: s * lower(s) - 1e2 * (1 - lower(s)),
        "scores are multiplied by a tensor",
    ),
    "multiplied by more than a mask": (
        lambda s: 2 * s * lower(s) * (1 + lower(s)) - 1e4 * (1 - lower(s)),
        "scores are multiplied by a tensor",
    ),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_no_visible_score_feels_is_read_over(name: str) -> None:
    (site,) = matches(Bent(UNCHANGED[name]), features()).sites
    assert site.replay_error < REPLAY_LIMIT and site.causal is ("hidden" in name)


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_visible_score_feels_is_not_read(name: str) -> None:
    change, reason = CHANGED[name]
    (site,) = matches(Bent(change), features()).sites
    assert reason in site.whole


class Zeroed(nn.Module):
    """Attention [B, T, E] whose weights are made zero again where a mask [B, T] hid their scores, or elsewhere."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o, self.same = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), same

    def forward(self, x: Tensor, shown: Tensor, other: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        hidden = [m[:, None, None] == torch.tensor(False) for m in (shown, shown if self.same else other)]
        weights = (q @ k.mT * DIM**-0.5).masked_fill(hidden[0], -torch.inf).softmax(-1).masked_fill(hidden[1], 0.0)
        out: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return out


def test_weights_zeroed_by_the_mask_of_their_scores_are_read_though_it_hides_nothing() -> None:
    everything = torch.ones(2, 6, dtype=torch.bool)
    (site,) = matches(Zeroed(True), features(), everything, everything).sites
    assert site.replay_error < REPLAY_LIMIT and site.masked_rows_are_zero
    (site,) = matches(Zeroed(False), features(), everything, everything.clone()).sites
    assert "so they add up to less than one" in site.whole


class Noisy(nn.Module):
    """Adds noise to what its attention gets."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Bent(lambda s: s)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x + torch.randn_like(x))
        return out


def test_a_model_that_draws_random_numbers_is_compared_on_equal_draws() -> None:
    module = Noisy().eval()
    with torch.no_grad():
        rows = module.attention.qkv.weight[WIDTH:].view(2, HEADS, DIM, WIDTH)
        rows.copy_(rows[:, :1].expand_as(rows))
        bias = module.attention.qkv.bias[WIDTH:].view(2, HEADS, DIM)
        bias.copy_(bias[:, :1].expand_as(bias))
        assert distance(module(features()), module(features())) > 1e-1
    report = rewriter.optimize(module, "mqa", example_inputs={"x": features()}).rewrite_report
    assert [row.exact for row in report.sites] == [True] and report.fidelity is not None
    assert report.fidelity.max_abs < 1e-4


# ------------------------------------------------------------------ folded


class Folded(nn.Module):
    """Grouped attention that writes the heads of a group as rows of one longer query."""

    def __init__(self, fused: bool, mask: str, unfold: str = "right", shared: int = SHARED) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = shared
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, shared * DIM), nn.Linear(WIDTH, shared * DIM)
        self.fused, self.mask, self.unfold = fused, mask, unfold

    def _bias(self, length: int) -> Tensor | None:
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        order = torch.zeros(length, length).masked_fill(hidden, -1e9)
        per_head = order[None] - torch.arange(HEADS)[:, None, None] * 0.1 * torch.arange(length)
        wide = {"none": None, "order": order[None].expand(HEADS, -1, -1), "by head": per_head}[self.mask]
        return None if wide is None else wide.reshape(1, self.shared, -1, length)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, DIM).transpose(1, 2)
        q = q.reshape(batch, self.shared, HEADS // self.shared * length, DIM)
        k, v = (p(x).view(batch, length, self.shared, DIM).transpose(1, 2) for p in (self.k, self.v))
        bias = self._bias(length)
        if self.fused:
            rows = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = q @ k.mT * DIM**-0.5
            rows = (scores if bias is None else scores + bias).softmax(-1) @ v
        y = rows.reshape(batch, HEADS, length, DIM)
        y = rows.reshape(batch, length, HEADS, DIM).transpose(1, 2) if self.unfold == "wrong" else y
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("mask", ["none", "order", "by head"])
@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("shared", [1, 2])
def test_folded_queries_are_read_as_heads(fused: bool, mask: str, shared: int) -> None:
    module = Folded(fused, mask, shared=shared)
    (site,) = matches(module, features()).sites
    assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, shared, DIM)
    assert site.group == tuple(h * shared // HEADS for h in range(HEADS))
    assert site.replay_error < REPLAY_LIMIT
    assert site.causal is (mask != "none")
    assert site.q.seam_axes == site.output_axes == ("b", "h", "s", "d")
    assert np.array_equal(site.q.columns, np.arange(WIDTH).reshape(HEADS, DIM))


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
def test_rows_that_are_not_unfolded_by_head_are_refused(fused: bool) -> None:
    (refusal,) = matches(Folded(fused, "none", unfold="wrong"), features()).refusals
    assert "not unfolded" in refusal.reason


@pytest.mark.parametrize("mask", ["none", "by head"])
@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
def test_a_graph_with_folded_queries_is_rewritten(fused: bool, mask: str) -> None:
    module = Folded(fused, mask).eval()
    with torch.no_grad():
        for projection in (module.k, module.v):
            for parameter in projection.parameters():
                parameter[DIM:] = parameter[:DIM]
    program = torch.export.export(module, (features(),), strict=False)
    new = rewriter.optimize(program, "mqa")
    assert new.rewrite_report.sites[0].exact and not new.rewrite_report.sites[0].notes
    with torch.no_grad():
        assert distance(new.module()(features()), module(features())) < 1e-5
        module.v.weight[-1] += 1.0
        other = rewriter.optimize(torch.export.export(module, (features(),), strict=False), "mqa")
        assert distance(other.module()(features()), module(features())) > 1e-3


# ------------------------------------------------------------------ groups on an axis of their own


class Apart(nn.Module):
    """Grouped attention whose query heads lie along two axes: groups, and the heads of a group.

    Args:
        spelling: "matmul" has keys [B, KV, 1, T, D]; "einsum" [B, KV, T, D]; "tokens first" [B, T, KV, D]; "fused" is
            the operator.
        mask: "", "order" [S, T], "padding" [B, 1, 1, 1, T], "by head" [KV, G, S, T] or "by member" [G, S, T].
        early: whether scores are [B, H, S, T] where masks meet them.
        packed: whether one projection has each group's queries, key and value together.
        full: positions, norms and a softcap too.
        merge: "heads", or "members", where heads that are no group lie together in the output.
    """

    def __init__(
        self,
        spelling: str,
        mask: str = "",
        *,
        early: bool = False,
        packed: bool = False,
        full: bool = False,
        merge: str = "heads",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling, self.mask, self.early, self.packed, self.full, self.merge = (
            spelling, mask, early, packed, full, merge
        )  # fmt: skip
        self.kv, self.group, heads = 2 * SHARED, 2, 4 * SHARED
        if packed:
            self.qkv = nn.Linear(WIDTH, self.kv * (self.group + 2) * DIM)
        else:
            self.q = nn.Linear(WIDTH, heads * DIM)
            self.k, self.v = (nn.Linear(WIDTH, self.kv * DIM) for _ in range(2))
        self.o, self.q_norm, self.k_norm = nn.Linear(heads * DIM, WIDTH), nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def shared_rows(self) -> list[Tensor]:
        """Key and value parameters, [kv heads, heads together, DIM, ...]."""
        if self.packed:
            views = (p.data.unflatten(0, (self.kv, -1, DIM)) for p in self.qkv.parameters())
            return [view[:, self.group :] for view in views]
        return [p.data.unflatten(0, (self.kv, 1, DIM)) for m in (self.k, self.v) for p in m.parameters()]

    def share(self, mean: bool) -> Apart:
        """Make pairs of key and value heads equal: the first of both, or their mean."""
        for rows in self.shared_rows():
            pairs = rows.unflatten(0, (-1, 2))
            pairs.copy_((pairs.mean(1, keepdim=True) if mean else pairs[:, :1]).clone().expand_as(pairs))
        return self

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, KV, G, D] and [B, T, KV, D] twice."""
        lead = x.shape[:2]
        if self.packed:
            y = self.qkv(x).view(*lead, self.kv, self.group + 2, DIM)
            return y[:, :, :, : self.group], y[:, :, :, self.group], y[:, :, :, self.group + 1]
        k, v = (p(x).view(*lead, self.kv, DIM) for p in (self.k, self.v))
        return self.q(x).view(*lead, self.kv, self.group, DIM), k, v

    def _turned(self, x: Tensor) -> Tensor:
        """Rotated by position, which is axis 1."""
        angle = torch.arange(x.shape[1]).view(-1, *[1] * (x.dim() - 2)) * 0.5 ** torch.arange(DIM // 2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def _masked(self, scores: Tensor) -> Tensor:
        batch, length, depth = scores.shape[0], scores.shape[-1], scores.dim()
        order = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1) > 0, -1e9)
        if self.mask == "padding":
            seen = torch.arange(length)[None] < length - torch.arange(batch)[:, None]
            return scores.masked_fill(~seen.view(batch, *[1] * (depth - 2), length), -1e9)
        if self.mask == "order":
            return scores + order
        count = {"by head": self.kv * self.group, "by member": self.group}.get(self.mask)
        if count is None:
            return scores
        bias = order - 0.1 * torch.arange(count)[:, None, None] * torch.arange(length)
        if self.mask == "by head":
            return scores + (bias.unflatten(0, (self.kv, -1)) if depth == 5 else bias)
        return scores + (bias if depth == 5 else bias.repeat(self.kv, 1, 1))

    def _weights(self, scores: Tensor) -> Tensor:
        scores = scores * DIM**-0.5
        scores = 5 * torch.tanh(scores / 5) if self.full else scores
        weights = self._masked(scores.flatten(1, 2) if self.early else scores).softmax(-1)
        return weights.unflatten(1, (self.kv, self.group)) if self.early else weights

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._projected(x)
        if self.full:
            q, k = self._turned(self.q_norm(q)), self._turned(self.k_norm(k))
        if self.spelling == "tokens first":
            weights = self._weights(torch.einsum("bskgd,btkd->bkgst", q, k))
            y = torch.einsum("bkgst,btkd->bskgd", weights, v)
        else:
            q, k, v = q.permute(0, 2, 3, 1, 4), k.transpose(1, 2), v.transpose(1, 2)
            if self.spelling == "einsum":
                y = torch.einsum("bkgst,bktd->bkgsd", self._weights(torch.einsum("bkgsd,bktd->bkgst", q, k)), v)
            elif self.spelling == "matmul":
                y = self._weights(q @ k[:, :, None].mT) @ v[:, :, None]
            else:
                y = F.scaled_dot_product_attention(q, k[:, :, None], v[:, :, None])
            y = y.permute(0, 3, 1, 2, 4)
        out: Tensor = self.o((y if self.merge == "heads" else y.transpose(2, 3)).flatten(2))
        return out


SPELLINGS = ["matmul", "einsum", "tokens first"]
MASKS = ["", "order", "padding", "by head", "by member"]


@pytest.mark.parametrize("early", [False, True], ids=["scores apart", "scores by head"])
@pytest.mark.parametrize("mask", MASKS, ids=[m or "no mask" for m in MASKS])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_query_heads_along_two_axes_are_read_as_heads(spelling: str, mask: str, early: bool) -> None:
    (site,) = matches(Apart(spelling, mask, early=early), features()).sites
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (8, 4, DIM, DIM)
    assert site.group == (0, 0, 1, 1, 2, 2, 3, 3)
    assert site.replay_error < REPLAY_LIMIT
    assert site.causal is (mask not in ("", "padding"))
    assert np.array_equal(site.q.columns, np.arange(8 * DIM).reshape(8, DIM))
    assert site.output_axes == ("b", "s", "hd") and site.out is not None
    assert len(site.modifiers) == (mask != "") and all(m.apart in (None, (4, 2)) for m in site.modifiers)


@pytest.mark.parametrize("spelling", [*SPELLINGS, "fused"])
def test_query_heads_that_are_turned_where_they_lie_apart(spelling: str) -> None:
    (site,) = matches(Apart(spelling, "order" * (spelling != "fused"), packed=True, full=True), features()).sites
    assert site.q.rotary is not None and site.q.norm is not None and site.q.norm.per_head
    assert site.q.stem_axes == ("b", "s", "h", "g", "d") and "g" in site.q.seam_axes
    assert site.k.stem_axes == ("b", "s", "h", "d") and site.replay_error < REPLAY_LIMIT


def test_heads_along_two_axes_that_are_not_joined_in_their_order_are_refused() -> None:
    (refusal,) = matches(Apart("matmul", merge="members"), features()).refusals
    assert "not joined again in their order" in refusal.reason


class Windows(nn.Module):
    """Tokens that see the others of their block of three only: [B, blocks, heads, 3, D]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(1, (-1, 3)).unflatten(-1, (HEADS, DIM)).transpose(2, 3) for p in (self.q, self.k, self.v)
        )
        y = (q @ k.mT * DIM**-0.5).softmax(-1) @ v
        out: Tensor = self.o(y.transpose(2, 3).flatten(3).flatten(1, 2))
        return out


def test_blocks_of_tokens_are_not_mistaken_for_groups_of_heads() -> None:
    for batch in (1, 2):
        (site,) = matches(Windows(), features(batch)).sites
        assert (site.heads, site.kv_heads, site.by_blocks) == (HEADS, HEADS, True)
    (site,) = matches(Windows(), features(2, 3)).sites  # one block, which is no group of heads either
    assert "differ along the second" in site.whole and site.heads == HEADS


@pytest.mark.parametrize("mask", ["padding", "by head"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_graph_with_query_heads_along_two_axes_is_rewritten(spelling: str, mask: str) -> None:
    _graph_becomes_its_mean(lambda: Apart(spelling, mask))


def test_a_graph_whose_queries_are_fed_anew_along_two_axes_is_rewritten() -> None:
    _graph_becomes_its_mean(lambda: Apart("tokens first", "order", packed=True, full=True))


def _graph_becomes_its_mean(make: Callable[[], Apart]) -> None:
    """A twin stays as it is, and any other comes to what it computes with the means of its heads; at another size."""
    free = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    other = features(3, 9)
    module, given = make().eval(), make().eval().share(False)
    program = torch.export.export(given, (features(),), strict=False, dynamic_shapes=free)
    for mean in (False, True):
        if mean:
            given.load_state_dict(module.state_dict())  # and with it the program, whose parameters are its own
        right = make().eval().share(mean)
        new = rewriter.optimize(program, "gqa2")
        assert [(row.exact, row.notes) for row in new.rewrite_report.sites] == [(not mean, ())]
        with torch.no_grad():
            assert distance(new.module()(other), right(other)) < 1e-5
            assert not mean or distance(new.module()(other), module(other)) > 1e-3


@pytest.mark.parametrize("inner", [False, True], ids=["the model itself", "inside a model"])
def test_a_module_with_query_heads_along_two_axes_is_rewritten(inner: bool) -> None:
    def make() -> nn.Module:
        attention = Apart("tokens first", "order", full=True)
        return (nn.Sequential(nn.Linear(WIDTH, WIDTH), attention) if inner else attention).eval()

    def share(module: nn.Module, mean: bool) -> nn.Module:
        next(m for m in module.modules() if isinstance(m, Apart)).share(mean)
        return module

    torch.manual_seed(1)
    first = make().state_dict()
    for mean in (False, True):
        module, right = make(), make()
        module.load_state_dict(first)
        right.load_state_dict(first)
        share(right, mean)
        new = rewriter.optimize(module if mean else share(module, mean), "gqa2", example_inputs=(features(),))
        assert [row.exact for row in new.rewrite_report.sites] == [not mean]
        with torch.no_grad():
            assert distance(new(features(3, 9)), right(features(3, 9))) < 1e-5
            module.load_state_dict(first)
            assert not mean or distance(new(features(3, 9)), module(features(3, 9))) > 1e-3


# ------------------------------------------------------------------ learned


class Pool(nn.Module):
    """Attention of a few learned queries over the tokens."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        learned = torch.randn(WIDTH) if spelling == "class token" else torch.randn(3, WIDTH)
        self.queries, self.norm, self.spelling = nn.Parameter(learned), nn.LayerNorm(WIDTH), spelling
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        given = self.norm(self.queries.expand(len(x), -1 if self.queries.ndim > 1 else 1, WIDTH))
        q, k, v = (
            p(t).view(len(x), -1, HEADS, DIM).transpose(1, 2) for p, t in ((self.wq, given), (self.wk, x), (self.wv, x))
        )
        if self.spelling == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "bias in the product":
            rows, keys, bias = (t.flatten(0, 1) for t in (q, k, torch.zeros(*q.shape[:3], k.shape[2])))
            y = (torch.baddbmm(bias, rows * DIM**-0.5, keys.mT).softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])
        else:
            y = (q @ k.mT * DIM**-0.5).softmax(-1) @ v
        out: Tensor = self.wo(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("spelling", ["written out", "fused", "bias in the product", "class token"])
def test_learned_queries_make_a_site(spelling: str) -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), Pool(spelling)).eval()
    pool = module[1]
    with torch.no_grad():
        for projection in (pool.wk, pool.wv):  # type: ignore[union-attr]
            for parameter in projection.parameters():  # type: ignore[union-attr]
                by_group = parameter.view(2, 2, DIM, -1)
                by_group[:, 1] = by_group[:, 0]
    (site,) = matches(module, features()).sites
    assert (site.heads, site.kv_heads, site.cross) == (HEADS, HEADS, True)
    assert site.replay_error < REPLAY_LIMIT
    assert _distances(module) < 1e-5
    with torch.no_grad():
        pool.wv.weight[-1] += 1.0  # type: ignore[union-attr, operator, index]
    assert _distances(module, exact=False) > 1e-3


def _distances(module: nn.Module, *, exact: bool = True) -> float:
    """The worse of module and graph, rewritten, from the original."""
    program = torch.export.export(module, (features(),), strict=False)
    new = rewriter.optimize(module, "gqa2", example_inputs=(features(),)), rewriter.optimize(program, "gqa2")
    assert all(n.rewrite_report.sites[0].exact is exact for n in new)
    with torch.no_grad():
        results = new[0](features(3, 9)), new[1].module()(features())
        return max(distance(results[0], module(features(3, 9))), distance(results[1], module(features())))


def test_queries_that_nothing_is_learned_for_are_refused() -> None:
    class Fixed(Pool):
        def forward(self, x: Tensor) -> Tensor:
            q = torch.ones(len(x), HEADS, 3, DIM)
            k, v = (p(x).view(len(x), -1, HEADS, DIM).transpose(1, 2) for p in (self.wk, self.wv))
            return F.scaled_dot_product_attention(q, k, v)

    (refusal,) = matches(Fixed("fused"), features()).refusals
    assert "that no projection makes" in refusal.reason


class LowRankRouter(nn.Module):
    """Experts weighed by a softmax over two matrices in a row: no attention, though one of them is learned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Parameter(torch.randn(WIDTH, 3)), nn.Parameter(torch.randn(3, 2))
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ (self.down @ self.up)).softmax(-1)
        return (torch.stack([e(x) for e in self.experts], -1) @ weights.unsqueeze(-1)).squeeze(-1)


class DynamicKernel(nn.Module):
    """A convolution whose kernel is a softmax over a projection, laid out in columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.out = nn.Linear(WIDTH, HEADS * 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        kernel = self.kernel(x).reshape(-1, 3, 1).softmax(1)
        windows = F.pad(self.out(x), (0, 0, 1, 1)).unfold(1, 3, 1).reshape(-1, WIDTH // HEADS, 3)
        return (windows @ kernel).reshape(batch, length, WIDTH)


@pytest.mark.parametrize("module", [LowRankRouter(), DynamicKernel()], ids=["low-rank router", "dynamic kernel"])
def test_a_softmax_over_a_projection_is_no_attention(module: nn.Module) -> None:
    found = matches(module, features())
    assert found.sites == ()
    assert [n.reason for n in found.not_attention if "learned projection" in n.reason]


# ------------------------------------------------------------------ reasons, and silence


def test_latent_attention_says_why_its_heads_cannot_be_merged() -> None:
    found = through_torch(ZOO["deepseek-v3-sdpa"]).matches
    assert found.refusals and all("put together from 2 projections" in r.reason for r in found.refusals)


class WritesInPlace(nn.Module):
    """Keys turned and put together by writing into slices of an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for p in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1]).float()[:, None]
        first, second = k.chunk(2, dim=-1)
        keys = k.new_empty(k.shape)
        keys[..., : DIM // 2] = first * angle.cos() - second * angle.sin()
        keys[..., DIM // 2 :] = second * angle.cos() + first * angle.sin()
        y = F.scaled_dot_product_attention(q, keys, v)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def test_what_is_written_into_slices_is_followed() -> None:
    (site,) = matches(WritesInPlace(), features()).sites
    assert site.k.rotary is not None and site.k.rotary.partner == (4, 5, 6, 7, 0, 1, 2, 3)
    assert site.q.rotary is None and site.replay_error < REPLAY_LIMIT


class SelfAttentionThatBranches(WritesInPlace):
    """Branches on data and writes into slices: not exported, but traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool((x > 1e9).any()) else super().forward(2.0 * x)


def test_what_branches_and_writes_into_slices_is_traced() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), SelfAttentionThatBranches()).eval()
    with torch.no_grad():
        for projection in (module[1].k, module[1].v):
            for parameter in projection.parameters():
                by_group = parameter.unflatten(0, (2, 2, DIM))
                by_group[:, 1] = by_group[:, 0]
        for perturbed in (False, True):
            module[1].v.weight[-1] += float(perturbed)
            new = rewriter.optimize(module, "gqa2", example_inputs=(features(),))
            assert [row.exact for row in new.rewrite_report.sites] == [not perturbed]
            error = distance(new(features(3, 9)), module(features(3, 9)))
            assert error > 1e-3 if perturbed else error < 1e-5


class SelfAttentionThatHides(SelfAttentionThatBranches):
    """Branches on data, and refuses to be traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if get_proxy_mode() is not None:
            raise RuntimeError("this is not for tracers")
        return y


def test_a_module_that_cannot_be_seen_through_is_refused_with_the_exporters_reason() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), SelfAttentionThatHides()).eval()
    seen = rewriter.inspect(module, example_inputs=(features(),))
    assert [(r.name, "data-dependent" in r.reason) for r in seen.refusals] == [("1", True)]
    with pytest.raises(rewriter.UnsupportedModel, match="data-dependent"):
        rewriter.optimize(module, "gqa2", example_inputs=(features(),))
    assert rewriter.inspect(nn.Sequential(WritesInPlace()), example_inputs=(features(),)).refusals == ()


class Convolved(nn.Module):
    """Projections by convolutions; a grouped one is no projection."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.v = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(2))
        self.k = nn.Conv1d(WIDTH, WIDTH, **{"kernel_size": 1, **options})  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x.mT).view(len(x), HEADS, DIM, -1) for p in (self.q, self.k, self.v))
        return ((q.mT @ k * DIM**-0.5).softmax(-1) @ v.mT).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3, "padding": 2, "dilation": 2}], ids=["token", "tokens"])
def test_projections_by_convolution_are_rewritten_where_they_are(options: dict[str, int]) -> None:
    module = nn.Sequential(Convolved(**options)).eval()
    module[0].requires_grad_(False)
    for tied in (module[0].k, module[0].v):
        for parameter in tied.parameters():
            by_group = parameter.unflatten(0, (2, 2, DIM))
            by_group[:, 1] = by_group[:, 0]
    twin = rewriter.optimize(module, "gqa2", example_inputs=(features(),))
    assert [row.exact for row in twin.rewrite_report.sites] == [True]
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in module.parameters())
    assert distance(twin(features(3, 9)), module(features(3, 9))) < 1e-5
    program = rewriter.optimize(torch.export.export(module, (features(),)), "gqa2").module()
    assert distance(program(features()), module(features())) < 1e-5
    module[0].v.weight[-1] += 1.0
    other = rewriter.optimize(module, "gqa2", example_inputs=(features(),))
    assert distance(other(features(3, 9)), module(features(3, 9))) > 1e-3


def test_targets_that_need_a_module_of_its_own_are_listed_where_there_can_be_one() -> None:
    convolved, linear = nn.Sequential(Convolved()).eval(), nn.Sequential(WritesInPlace()).eval()
    other = {"window", "sparse-fixed", "sparse-strided", "linear", "dha"}
    listed, plain = (rewriter.inspect(m, example_inputs=(features(),)).targets["0"] for m in (convolved, linear))
    assert listed == ("mqa", "gqa2") and other <= set(plain)
    for target in sorted(other):
        with pytest.raises(rewriter.NothingToRewrite, match="convolutions"):
            rewriter.optimize(convolved, target, example_inputs=(features(),))


def test_convolutions_that_do_more_than_project_are_refused() -> None:
    grouped = rewriter.inspect(Convolved(groups=2).eval(), example_inputs=(features(),))
    assert ["key: the projection is a convolution in 2 groups" in r.reason for r in grouped.refusals] == [True]


def test_masks_of_the_lowest_number_match_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert len(through_torch(ZOO["gpt-neo-eager"]).matches.sites) == 2


def test_keys_may_be_repeated_before_they_are_rotated() -> None:
    for site in through_torch(ZOO["falcon-sdpa"]).matches.sites:
        assert (site.heads, site.kv_heads, site.group) == (4, 2, (0, 0, 1, 1))
        assert site.k.seam == "" and site.k.seam_axes == () and site.v.seam
        assert site.k.stem and site.k.rotary is not None and site.replay_error < REPLAY_LIMIT
