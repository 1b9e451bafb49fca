"""Scores with a bias that hidden states make: every door shares heads and keeps it where that is asked for."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from passes.targets import GroupedQuery
from rewriter.cli.arguments import target_of
from rewriter.errors import NothingToRewrite, RewriteError, UsageError
from tests.targets.lossless_twin import run_file

WIDTH, HEADS, DIM, KEPT, REACH = 32, 4, 8, 2, 4
EXACT, MOVED = 1e-5, 1e-3
KEEPING = GroupedQuery(KEPT, keep_hidden_bias=True)


class Attention(nn.Module):
    """Self-attention over x [B, T, WIDTH], whose scores get `bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) + self.bias(x, q, k)) * DIM**-0.5
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def bias(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError


def distances(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return (places[:, None] - places).clamp(-REACH, REACH) + REACH


class OfQueries(Attention):
    """Each query is multiplied by vectors for distances (Shaw et al., arXiv 1803.02155)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * REACH + 1, DIM)

    def bias(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bhid,ijd->bhij", q, self.table(distances(x)))


class Shifted(Attention):
    """Products with projected positions, shifted to distances (Transformer-XL, Conformer; arXiv 1901.02860)."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.u = nn.Linear(WIDTH, WIDTH, bias=False), nn.Parameter(torch.randn(HEADS, 1, DIM))
        self.register_buffer("places", torch.randn(1, 31, WIDTH))
        self.places: Tensor

    def bias(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        tokens = x.shape[1]
        placed = self.heads(self.p(self.places[:, 16 - tokens : 15 + tokens]))
        scores = F.pad((q + self.u) @ placed.transpose(-2, -1), (1, 0))
        shifted = scores.view(x.shape[0], HEADS, 2 * tokens, tokens)[:, :, 1:]
        return shifted.reshape(x.shape[0], HEADS, tokens, 2 * tokens - 1)[..., :tokens]


class OfKeys(OfQueries):
    """Likewise of keys, as in DeBERTa's disentangled attention (arXiv 2006.03654)."""

    def bias(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        asked, told = (f(self.table.weight.repeat(1, HEADS)).unflatten(-1, (HEADS, DIM)) for f in (self.q, self.k))
        places = distances(x).expand(x.shape[0], HEADS, -1, -1)
        of_queries = torch.gather(q @ told.permute(1, 2, 0), -1, places)
        of_keys = torch.gather(k @ asked.permute(1, 2, 0), -1, places).transpose(-2, -1)
        return of_queries + of_keys


class OfTokens(Attention):
    """A number for each pair of tokens and head, made of both tokens (AlphaFold's and Graphormer's, in short)."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Linear(WIDTH, HEADS)

    def bias(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        number: Tensor = self.pair(x).transpose(1, 2)
        return number[..., None] * number[:, :, None]


KINDS = (OfQueries, Shifted, OfKeys, OfTokens)
CASES = [
    (kind, door) for kind in KINDS for door in ("module", "program", "file") if (kind, door) != (OfKeys, "program")
]


def twin(kind: type[Attention]) -> nn.Sequential:
    """Two layers whose heads are equal in pairs."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(), kind()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.split(".")[1] in {"k", "v"}:
            heads = parameter.view(KEPT, HEADS // KEPT, -1)
            heads[:, 1:] = heads[:, :1]
    return model


def given(tokens: int = 6) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


def file_of(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch", 1: "tokens"}}
        torch.onnx.export(model, (given(),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes)
    return path


@pytest.mark.parametrize(("kind", "door"), CASES)
def test_shared_heads_keep_the_bias(kind: type[Attention], door: str, tmp_path: Path) -> None:
    model = twin(kind)

    def rewritten() -> Tensor:
        if door == "module":
            return rewriter.optimize(model, KEEPING, example_inputs=(given(),))(given(9))
        if door == "program":
            program = torch.export.export(model, (given(9),))
            return rewriter.optimize(program, KEEPING).module()(given(9))
        rewriter.optimize(file_of(model, tmp_path / "m.onnx"), KEEPING).save(tmp_path / "new.onnx")
        return torch.from_numpy(run_file(tmp_path / "new.onnx", {"x": given(9)}))

    assert (rewritten() - model(given(9))).abs().max() <= EXACT
    for layer in model:
        layer.k.weight[-DIM:] *= -1
    assert (rewritten() - model(given(9))).abs().max() > MOVED, "control: heads that differ are merged"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_nothing_is_done_unasked(kind: type[Attention], tmp_path: Path) -> None:
    model, file = twin(kind), file_of(twin(kind), tmp_path / "m.onnx")
    for seen in (rewriter.inspect(model, example_inputs=(given(),)), rewriter.inspect(file)):
        assert not seen.sites and len(seen.refusals) == 2
        assert all(r.reason.startswith("the score bias is computed from hidden states") for r in seen.refusals)
    for target in (f"gqa{KEPT}", "window:2", "fnet"):
        with pytest.raises(NothingToRewrite, match="keep_hidden_bias=True"):
            rewriter.optimize(model, target, example_inputs=(given(),))
    with pytest.raises(NothingToRewrite, match="keep_hidden_bias=True"):
        rewriter.optimize(file, f"gqa{KEPT}")


def test_layers_are_asked_one_by_one() -> None:
    target = {"0": KEEPING, "1": f"gqa{KEPT}"}
    report = rewriter.optimize(twin(OfQueries), target, example_inputs=(given(),)).rewrite_report
    assert [s.name for s in report.sites] == ["0"] and [r.name for r in report.refused] == ["1"]


def test_the_command_line_asks_for_it() -> None:
    assert target_of(f"gqa{KEPT}", None, None, keep_hidden_bias=True) == KEEPING
    with pytest.raises(UsageError, match="keep-hidden-bias is for mqa and gqaN"):
        target_of("fnet", None, None, keep_hidden_bias=True)


def test_a_program_whose_keys_and_positions_share_a_projection_says_what_to_do() -> None:
    program = torch.export.export(twin(OfKeys), (given(),))
    with pytest.raises(RewriteError, match=r"computed from its keys; .* is read elsewhere, .*; rewrite the module"):
        rewriter.optimize(program, KEEPING)
