"""Keys and values that another attention reads with all their heads, between their projection and the product."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.install import onnx_projection

WIDTH, HEADS, DIM, KEPT = 32, 4, 8, 2
EXACT, MOVED = 1e-5, 1e-3


class _Layers(nn.Module):
    """Scales stand between projections and heads, so that what reads heads reads them behind a step that is no
    layout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.o, self.p = (nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, DIM).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class TwoWays(_Layers):
    """Words and places of an image attend to each other by one score: one's queries are the other's keys."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first, second, mine, theirs = (
            self.heads(f(z) * DIM**-0.25) for f, z in ((self.a, x), (self.b, y), (self.c, x), (self.d, y))
        )
        scores = first @ second.transpose(-2, -1)
        scores = scores - scores.max()
        there = scores.transpose(-2, -1)
        there = there - there.amax(-1, keepdim=True)
        mixed = self.joined(scores.softmax(-1) @ theirs), self.joined(there.softmax(-1) @ mine)
        return self.o(mixed[0]), self.p(mixed[1])


class NextToTalkingHeads(_Layers):
    """The second attention reads the first one's keys and values, and is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.heads(self.b(y) * DIM**-0.5), self.heads(self.d(y) * 2.0) * 0.5
        scores = self.heads(self.a(x)) @ k.transpose(-2, -1)
        other = torch.einsum("bhij,hg->bgij", self.heads(self.c(x)) @ k.transpose(-2, -1), self.talk)
        return self.o(self.joined(scores.softmax(-1) @ v)), self.p(self.joined(other.softmax(-1) @ v))


@pytest.mark.parametrize(("kind", "count"), [(TwoWays, 2), (NextToTalkingHeads, 1)])
def test_others_go_on_reading_all_heads(kind: type[_Layers], count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    for layer in (model.a, model.b, model.c, model.d) if kind is TwoWays else (model.b, model.d):
        for p in (layer.weight, layer.bias):
            p.view(KEPT, HEADS // KEPT, -1)[:, 1:] = p.view(KEPT, HEADS // KEPT, -1)[:, :1]
    given = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)

    def apart() -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = {"x": {0: "batch", 1: "tokens"}, "y": {0: "batch", 1: "words"}}
            torch.onnx.export(
                model, given, str(tmp_path / "m.onnx"), dynamo=False, input_names=["x", "y"], dynamic_axes=axes
            )
        done = rewriter.optimize(tmp_path / "m.onnx", f"gqa{KEPT}")
        assert len(done.rewrite_report.sites) == count
        done.save(tmp_path / "new.onnx")
        session = ort.InferenceSession(tmp_path / "new.onnx", providers=["CPUExecutionProvider"])
        new = session.run(None, {"x": given[0].numpy(), "y": given[1].numpy()})
        return [float((a - torch.from_numpy(b)).abs().max()) for a, b in zip(model(*given), new, strict=True)]

    assert max(apart()) <= EXACT
    model.b.weight[-DIM:] *= -1
    moved = apart()
    assert moved[0] > MOVED, "control: heads that differ are merged"
    if kind is NextToTalkingHeads:
        assert moved[1] <= EXACT, "what is refused reads the heads that it always read"


def test_without_a_copy_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_projection, "path_read_elsewhere", lambda *_: False)
    with pytest.raises(rewriter.errors.VerificationFailed):
        test_others_go_on_reading_all_heads(NextToTalkingHeads, 1, tmp_path)


class BehindACache(_Layers):
    """As `NextToTalkingHeads`, over keys and values that a cache holds; `alone`, the second attention has its own."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone, self.talk = alone, nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        k = torch.cat((keys, self.heads(self.b(x))), dim=2)
        v = torch.cat((values, self.heads(self.d(x))), dim=2)
        mixed = (self.heads(self.a(x)) @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v
        read = self.heads(self.c(x)) if self.alone else k
        talked = torch.einsum("bhij,hg->bgij", self.heads(self.c(x)) @ read.transpose(-2, -1), self.talk).softmax(-1)
        return self.o(self.joined(mixed)), self.p(self.joined(talked @ (read if self.alone else v))), k, v


@pytest.mark.parametrize("alone", [False, True])
def test_a_cache_that_a_refused_attention_reads_keeps_its_heads(alone: bool, tmp_path: Path) -> None:
    """It ended in a failed verification."""
    torch.manual_seed(0)
    cache = torch.randn(2, HEADS, 3, DIM)
    names = ["x", "keys", "values"]
    axes = {"x": {0: "batch", 1: "tokens"}, **{name: {0: "batch", 2: "past"} for name in names[1:]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            BehindACache(alone).eval(), (torch.randn(2, 5, WIDTH), cache, cache), str(tmp_path / "m.onnx"),
            dynamo=False, input_names=names, dynamic_axes=axes,
        )  # fmt: skip
    (targets,) = (t for name, t in rewriter.inspect(tmp_path / "m.onnx").targets.items() if "attention" in name)
    assert ("gqa2" in targets) is alone and "window" in targets
    if alone:
        assert len(rewriter.optimize(tmp_path / "m.onnx", "gqa2").rewrite_report.sites) == 1
        return
    with pytest.raises(rewriter.errors.NothingToRewrite, match="reads its cached keys or values"):
        rewriter.optimize(tmp_path / "m.onnx", "gqa2")
