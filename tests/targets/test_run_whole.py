"""Attentions that are run from projections to merged heads: every door shares their heads, and no others'."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from passes.dataflow import Flow, Node
from passes.match import run_whole
from passes.match.stretch import Stretch, stretch_of
from passes.targets import GroupedQuery
from rewriter.errors import NothingToRewrite
from tests.targets.lossless_twin import run_file

WIDTH, HEADS, DIM, KEPT, SIDE, CHUNK = 32, 4, 8, 2, 3, 4
EXACT, MOVED = 1e-4, 1e-3


class Attention(nn.Module):
    """Self-attention over x [B, T, WIDTH] by heads [B, H, T, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        merged: Tensor = self.attend(x, *self.operands(x)).transpose(1, 2).flatten(2)
        return x + self.o(merged)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


def around(tokens: Tensor) -> Tensor:
    """[B, H, blocks, 3 * CHUNK, DIM]: those of each block with those before and behind."""
    padded = F.pad(tokens, (0, 0, CHUNK, CHUNK))
    blocks = tokens.shape[2] // CHUNK
    return torch.stack([padded[:, :, CHUNK * n : CHUNK * (n + 3)] for n in range(blocks)], 2)


class RowsAndColumns(Attention):
    """Queries score rows and columns of an image apart, on scores laid out as an image (arXiv 2112.01526)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.randn(SIDE, SIDE, DIM)) for _ in range(2))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        image = q.unflatten(1, (SIDE, SIDE))
        by_row = torch.einsum("bhwc,hkc->bhwk", image, self.rows)[..., None]
        by_column = torch.einsum("bhwc,wkc->bhwk", image, self.columns)[..., None, :]
        scores = (q @ k.transpose(1, 2)).view(-1, SIDE, SIDE, SIDE, SIDE) * DIM**-0.5 + by_row + by_column
        weights = scores.view(-1, SIDE * SIDE, SIDE * SIDE).softmax(-1)
        return (weights @ v).unflatten(0, (x.shape[0], HEADS))


class Chunks(Attention):
    """Blocks of queries meet the keys around them (arXiv 2004.05150, in short), with numbers by head and place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, CHUNK, 3 * CHUNK))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = [around(t) for t in (k, v)]
        scores = torch.einsum("bhncd,bhnkd->bhnck", q.unflatten(2, (-1, CHUNK)), near[0])
        scores = (scores.transpose(1, 2) + self.table).transpose(1, 2)
        return torch.einsum("bhnck,bhnkd->bhncd", scores.softmax(-1), near[1]).flatten(2, 3)


class Summaries(Attention):
    """Every query sees its block, and a summary of each block, scored apart (arXiv 2112.07916, in short)."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, CHUNK)).sum(2)
        _, far_k, far_v = self.operands(blocks)
        q, k, v = (t.unflatten(2, (-1, CHUNK)) for t in (q, k, v))
        scores = [torch.einsum("bhncd,bhnkd->bhnck", q, k), torch.einsum("bhncd,bhmd->bhncm", q, far_k)]
        near, far = torch.cat(scores, -1).softmax(-1).split([CHUNK, blocks.shape[1]], -1)
        mixed = torch.einsum("bhnck,bhnkd->bhncd", near, v) + torch.einsum("bhncm,bhmd->bhncd", far, far_v)
        return mixed.flatten(2, 3)


class Choosing(Attention):
    """Only the queries that stand out attend; the others get the mean (ProbSparse, arXiv 2012.07436, in short)."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        places = (scores.amax(-1) - scores.mean(-1)).topk(3, -1).indices[..., None].expand(-1, -1, -1, DIM)
        mixed = (q.gather(2, places) @ k.transpose(-2, -1)).softmax(-1) @ v
        return v.mean(2, keepdim=True).expand_as(q).scatter(2, places, mixed)


class SeveralOfEach(Chunks):
    """Two heads of keys and values, repeated for four of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // 2) for _ in range(2))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(x, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


class Fused(Chunks):
    """One projection, in which each head has its queries, keys and values beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        del self.q, self.k, self.v

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (HEADS, 3, DIM)).transpose(1, 2).unbind(3)  # type: ignore[no-any-return]


class Across(Chunks):
    """Each head's scores are the largest of those before it, too."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(x, q, k.cummax(1).values, v)


class Unlike(Chunks):
    """The last head scores by the cube of its keys."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(x, q, torch.cat([k[:, :-1], k[:, -1:] ** 3], 1), v)


class Halves(Chunks):
    """Queries and keys are one projection (arXiv 2001.04451): no halves of its heads are the one and the other."""

    def __init__(self) -> None:
        super().__init__()
        del self.k

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        q, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.v))
        return q, F.normalize(q, dim=-1), v


class OfKeys(Chunks):
    """Scores get a number that keys make by themselves."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = [around(t) for t in (k, v)]
        scores = torch.einsum("bhncd,bhnkd->bhnck", q.unflatten(2, (-1, CHUNK)), near[0])
        scores = (scores + (near[0] * self.table[0, 0, :DIM]).sum(-1)[..., None, :]).transpose(1, 2)
        return torch.einsum("bnhck,bhnkd->bhncd", scores.softmax(-1), near[1]).flatten(2, 3)


class OfTokens(Chunks):
    """Scores get numbers by head and place, each token's own times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HEADS)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = [around(t) for t in (k, v)]
        scores = torch.einsum("bhncd,bhnkd->bhnck", q.unflatten(2, (-1, CHUNK)), near[0])
        gate = self.gate(x).sigmoid().transpose(1, 2).unflatten(2, (-1, CHUNK))[..., None]
        scores = scores + gate * self.table[:, None]
        return torch.einsum("bhnck,bhnkd->bhncd", scores.softmax(-1), near[1]).flatten(2, 3)


SHARED = (RowsAndColumns, Chunks, Summaries, Choosing, SeveralOfEach, Fused)


def built(kind: type[Attention]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()).eval().requires_grad_(False)


def tie(model: nn.Sequential, kept: int) -> nn.Sequential:
    """Keys' and values' heads equal in groups."""
    for name, parameter in model.named_parameters():
        owner = name.split(".")[1]
        if owner in {"k", "v"}:
            heads = parameter.view(kept, -1, DIM, *parameter.shape[1:])
            heads[:, 1:] = heads[:, :1]
        elif owner == "qkv":
            heads = parameter.view(kept, HEADS // kept, 3, DIM, *parameter.shape[1:])
            heads[:, 1:, 1:] = heads[:, :1, 1:]
    return model


def given(kind: type[Attention], batch: int = 2) -> Tensor:
    tokens = SIDE * SIDE if kind is RowsAndColumns else 3 * CHUNK
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(batch))


def file_of(model: nn.Module, x: Tensor, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), dynamo=False, input_names=["x"], opset_version=17)
    return path


@pytest.mark.parametrize("door", ["module", "program", "file"])
@pytest.mark.parametrize("kind", SHARED, ids=lambda kind: kind.__name__)
def test_shared_heads_are_run_as_before(kind: type[Attention], door: str, tmp_path: Path) -> None:
    kept = 1 if kind is SeveralOfEach else KEPT
    target, x = GroupedQuery(kept), given(kind)

    def rewritten(model: nn.Module) -> Tensor:
        if door == "module":
            done = rewriter.optimize(model, target, example_inputs=(x,))
            assert sum(p.numel() for p in done.parameters()) < sum(p.numel() for p in model.parameters())
            return done(x)
        if door == "program":
            return rewriter.optimize(torch.export.export(model, (x,)), target).module()(x)
        rewriter.optimize(file_of(model, x, tmp_path / "m.onnx"), target).save(tmp_path / "new.onnx")
        return torch.from_numpy(run_file(tmp_path / "new.onnx", {"x": x}))

    model = tie(built(kind), kept)
    assert (rewritten(model) - model(x)).abs().max() <= EXACT
    model = built(kind)
    assert (rewritten(model) - model(x)).abs().max() > MOVED, "control: heads that differ are merged"


@pytest.mark.parametrize("kind", SHARED, ids=lambda kind: kind.__name__)
def test_it_is_one_site_of_its_own_heads_and_nothing_but_fewer_is_offered(kind: type[Attention]) -> None:
    seen = rewriter.inspect(built(kind), example_inputs=(given(kind),))
    assert [(s.whole != "", s.heads, s.kv_heads, s.head_dim) for s in seen.sites] == [
        (True, HEADS, 2 if kind is SeveralOfEach else HEADS, DIM)
    ] * 2
    assert not seen.refusals and not seen.not_attention
    assert set(seen.targets.values()) == {("mqa",) if kind is SeveralOfEach else ("mqa", "gqa2")}
    if kind is Fused:  # queries of each head come first, then keys
        assert seen.sites[0].k.columns[1].tolist() == list(range(4 * DIM, 5 * DIM))
    why = "tokens are joined from several" if kind is Summaries else "run and not read"
    with pytest.raises(NothingToRewrite, match=why):
        rewriter.optimize(built(kind), "linear", example_inputs=(given(kind),))


@pytest.mark.parametrize("kind", [Across, Unlike, Halves], ids=lambda kind: kind.__name__)
def test_heads_that_are_mixed_or_not_alike_are_refused(kind: type[Attention]) -> None:
    seen = rewriter.inspect(built(kind), example_inputs=(given(kind),))
    assert not seen.sites and len(seen.refusals) == 2


def test_so_many_tokens_are_not_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (largest,) = {stretch.size for stretch in stretches(monkeypatch)}
    for limit, sites in ((largest, 2), (largest - 1, 0)):
        monkeypatch.setattr(run_whole, "_LARGEST", limit)
        seen = rewriter.inspect(built(Chunks), example_inputs=(given(Chunks),))
        assert len(seen.sites) == sites
        assert {"pass example_inputs of fewer tokens" in r.reason for r in seen.refusals} == (
            {True} if not sites else set()
        )


def stretches(monkeypatch: pytest.MonkeyPatch) -> list[Stretch]:
    """Those of a model's attentions."""
    found: list[Stretch] = []

    def watched(flow: Flow, anchor: Node) -> Stretch | None:
        stretch = stretch_of(flow, anchor)
        found.extend([stretch] if stretch is not None else [])
        return stretch

    with monkeypatch.context() as patch:
        patch.setattr(run_whole, "stretch_of", watched)
        rewriter.inspect(built(Chunks), example_inputs=(given(Chunks),))
    return found


@pytest.mark.parametrize("kind", [OfKeys, OfTokens], ids=lambda kind: kind.__name__)
def test_what_keys_or_tokens_add_to_scores_has_to_be_asked_for(kind: type[Attention]) -> None:
    model, x = tie(built(kind), KEPT), given(kind)
    seen = rewriter.inspect(model, example_inputs=(x,))
    assert not seen.sites and {"keep_hidden_bias=True" in r.reason for r in seen.refusals} == {True}
    done = rewriter.optimize(model, GroupedQuery(KEPT, keep_hidden_bias=True), example_inputs=(x,))
    assert (done(x) - model(x)).abs().max() <= EXACT
    control = built(kind)
    done = rewriter.optimize(control, GroupedQuery(KEPT, keep_hidden_bias=True), example_inputs=(x,))
    assert (done(x) - control(x)).abs().max() > MOVED


@pytest.mark.parametrize("kind", [Chunks, RowsAndColumns], ids=lambda kind: kind.__name__)
def test_calibration_brings_what_is_run_nearer_to_the_original(kind: type[Attention]) -> None:
    model, x = built(kind), given(kind, 7)
    batches = [(given(kind, 32 + n),) for n in range(4)]
    plain = rewriter.optimize(model, GroupedQuery(KEPT), example_inputs=(x,))
    fitted = rewriter.optimize(model, GroupedQuery(KEPT), example_inputs=(x,), calibration=batches)
    far, near = ((done(x) - model(x)).square().mean() for done in (plain, fitted))
    assert near < 0.9 * far
