"""Joint attention of two streams: each projects its own queries, keys and values, tokens are joined before one softmax
and parted behind it, as in diffusion transformers for images and text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import rewriter
from tests.zoo.randomize import randomize

WIDTH, HEADS, DIM = 32, 4, 8
EXACT, MOVED = 1e-5, 1e-3
Pair = tuple[Tensor, Tensor]


class RootMeanSquareNorm(nn.Module):
    """As older exporters know it: in parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Stream(nn.Module):
    """What one stream has of its own."""

    def __init__(self, packed: bool, normed: bool) -> None:
        super().__init__()
        sizes = (3 * WIDTH,) if packed else (WIDTH,) * 3
        self.project = nn.ModuleList([nn.Linear(WIDTH, size) for size in sizes])
        self.norms = nn.ModuleList([RootMeanSquareNorm(DIM) for _ in range(2)]) if normed else None
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, [B, T, heads, features] each."""
        made = [part for m in self.project for part in m(x).split(WIDTH, -1)]
        q, k, v = (part.unflatten(-1, (HEADS, DIM)) for part in made)
        return [q, k, v] if self.norms is None else [self.norms[0](q), self.norms[1](k), v]

    def shared(self) -> list[Tensor]:
        """Rows of keys and of values, weights and biases."""
        weight, bias = ([getattr(m, name) for m in self.project] for name in ("weight", "bias"))
        if len(weight) == 3:
            return [*weight[1:], *bias[1:]]
        return [part for whole in (*weight, *bias) for part in whole.chunk(3)[1:]]


class Joint(nn.Module):
    """``image [B, S, 32], text [B, T, 32]`` to the same."""

    def __init__(self, packed: bool = False, normed: bool = False, rotated: bool = False) -> None:
        super().__init__()
        self.image, self.text, self.rotated = Stream(packed, normed), Stream(packed, normed), rotated

    def forward(self, image: Tensor, text: Tensor) -> Pair:
        parts = zip(self.text.heads(text), self.image.heads(image), strict=True)
        if self.rotated:
            lengths = text.shape[1], image.shape[1]
            q, k, v = (torch.cat(both, 1) for both in parts)
            q, k = (_rotated(x, torch.cat([torch.arange(n) for n in lengths])[:, None]) for x in (q, k))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        else:
            q, k, v = (torch.cat([x.transpose(1, 2) for x in both], 2) for both in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        of_text, of_image = mixed[:, : text.shape[1]], mixed[:, text.shape[1] :]
        return image + self.image.out(of_image), text + self.text.out(of_text)


def _rotated(x: Tensor, places: Tensor) -> Tensor:
    """Neighbouring features of ``x [B, T, heads, features]`` turned by their token's place, ``places [T, 1]``."""
    angles = places[:, None] / 10 ** torch.arange(DIM // 2)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, -1).flatten(3)


class Blocks(nn.Module):
    def __init__(self, make: Callable[[], Joint]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([make() for _ in range(2)])

    def forward(self, image: Tensor, text: Tensor) -> Pair:
        for block in self.blocks:
            image, text = block(image, text)
        return image, text


KINDS: dict[str, Callable[[], Joint]] = {
    "separate": Joint,
    "packed-normed": lambda: Joint(packed=True, normed=True),
    "normed-rotated": lambda: Joint(normed=True, rotated=True),
}


def _inputs(seed: int, image: int = 7, text: int = 5) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, image, WIDTH, generator=generator), torch.randn(2, text, WIDTH, generator=generator)


def _model(kind: str, *, tied: bool = True, perturbed: str | None = None) -> Blocks:
    """A twin of gqa2; with `perturbed` ("image" or "text") one of that stream's heads is its own."""
    model = randomize(Blocks(KINDS[kind]))
    assert isinstance(model, Blocks)
    with torch.no_grad():
        for name, stream in model.named_modules():
            for rows in stream.shared() if tied and isinstance(stream, Stream) else ():
                by_head = rows.view(2, HEADS // 2, DIM, *rows.shape[1:])
                by_head[:, 1] = by_head[:, 0]
                if perturbed is not None and name.endswith(perturbed):
                    by_head[-1, 1] += 0.5
    return model


def _file(model: nn.Module, folder: Path) -> Path:
    path, names = folder / "old.onnx", ["image", "text"]
    axes = {name: {0: "batch", 1: f"{name}_tokens"} for name in names}
    torch.onnx.export(
        model, _inputs(0), str(path), dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes
    )
    return path


def _ran(path: Path, inputs: Pair) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(
        None, {n: x.numpy() for n, x in zip(("image", "text"), inputs, strict=True)}
    )
    return results


def _moved(found: Pair | list[np.ndarray], wanted: Pair) -> float:
    return max(float(np.abs(np.asarray(a) - b.numpy()).max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("kind", "perturbed"), [*((kind, None) for kind in KINDS), ("separate", "image"), ("separate", "text")]
)
@torch.no_grad()
def test_a_twin_is_rewritten_without_loss_through_every_door(kind: str, perturbed: str | None, tmp_path: Path) -> None:
    model, other = _model(kind, perturbed=perturbed), _inputs(1, 4, 6)
    wanted = model(*other)
    in_place = rewriter.optimize(model, "gqa2", example_inputs=_inputs(0))
    dynamic = {n: {1: Dim(f"{n}_tokens", min=2)} for n in ("image", "text")}
    graph = rewriter.optimize(torch.export.export(model, _inputs(0), dynamic_shapes=dynamic), "gqa2")
    rewriter.optimize(_file(model, tmp_path), "gqa2").save(tmp_path / "new.onnx")
    for found in (in_place(*other), graph.module()(*other), _ran(tmp_path / "new.onnx", other)):
        assert _moved(found, wanted) < EXACT if perturbed is None else _moved(found, wanted) > MOVED
    if perturbed is None:
        before, after = (sum(t.numel() for t in held.values()) for held in (model.state_dict(), graph.state_dict))
        assert before - after == 2 * 2 * 2 * HEADS // 2 * DIM * (WIDTH + 1)


def test_both_streams_are_shared_alike_and_both_lose_old_weights(tmp_path: Path) -> None:
    path = _file(_model("separate", tied=False), tmp_path)
    new = rewriter.optimize(path, "mqa")
    report = new.rewrite_report
    removed = 2 * 2 * 2 * (HEADS - 1) * DIM * (WIDTH + 1)  # blocks, streams, keys and values
    assert report.parameters.before - report.parameters.after == removed
    assert all(row.error is not None and 0.01 < row.error < 1 for row in report.sites)
    new.save(tmp_path / "new.onnx")
    pairs = zip(_ran(tmp_path / "new.onnx", _inputs(0)), _ran(path, _inputs(0)), strict=True)
    assert all(float(np.abs(a - b).max()) > MOVED for a, b in pairs)


def test_calibration_and_other_targets_say_what_is_possible(tmp_path: Path) -> None:
    path = _file(_model("separate", tied=False), tmp_path)
    given = [{n: x.numpy() for n, x in zip(("image", "text"), _inputs(s), strict=True)} for s in (2, 3)]
    assert {row.merge for row in rewriter.optimize(path, "gqa2", calibration=given).rewrite_report.sites} == {"mean"}
    for target in ("window:4,0", "linear"):
        with pytest.raises(rewriter.NothingToRewrite, match="its tokens are joined from several projections"):
            rewriter.optimize(path, target)
    with pytest.raises(rewriter.NothingToRewrite, match="its tokens are joined from several projections"):
        rewriter.optimize(path, "fnet")
