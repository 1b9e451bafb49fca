"""Attentions whose forward is kept, with heads that are turned copies of each other in pairs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import rewriter

WIDTH, HEADS, DIM, KEPT = 32, 4, 8, 2


class Projections(nn.Module):
    """Queries, keys and values [B, H, T, D] of x [B, T, WIDTH], by three layers or one, and the output's layer."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        sizes = (3 * WIDTH,) if packed else (WIDTH,) * 3
        self.project = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = [part for layer in self.project for part in layer(x).split(WIDTH, -1)]
        return [part.view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for part in parts]

    def merged(self, mixed: Tensor) -> Tensor:
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result

    def rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of queries, keys and values by head: of the matrix, and of the bias."""
        for part in ("weight", "bias"):
            held = [getattr(layer, part) for layer in self.project]
            cut = held if len(held) == 3 else held[0].chunk(3)
            q, k, v = (t.view(HEADS, DIM, -1) for t in cut)
            yield q, k, v


class Crowd(nn.Module):
    """Two attentions over x [B, T, WIDTH] in one forward."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.first, self.second = Projections(packed), Projections(packed)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            q, k, v = layer.heads(x)
            x = x + layer.merged(nn.functional.scaled_dot_product_attention(q, k, v))
        return x


class Told(Crowd):
    """Likewise, and the attention weights are told."""

    def forward(self, x: Tensor) -> Any:
        told = []
        for layer in (self.first, self.second):
            q, k, v = layer.heads(x)
            told.append((q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1))
            x = x + layer.merged(told[-1] @ v)
        return x, *told


def untied(kind: type[Crowd], packed: bool = False) -> Crowd:
    torch.manual_seed(0)
    return kind(packed).eval().requires_grad_(False)


def turned(kind: type[Crowd], packed: bool = False) -> Crowd:
    """A twin of gqa2: without loss for merges that turn heads back."""
    model = untied(kind, packed)
    for layer in (model.first, model.second):
        for _, *shared in layer.rows():
            for rows in shared:
                rows[1::2] = rows[::2]
        for head in range(HEADS):
            by_score, by_value = (torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64))[0] for _ in range(2))
            for q, k, v in layer.rows():
                for rows, turn in ((q, by_score), (k, by_score), (v, by_value)):
                    rows[head] = (turn @ rows[head].double()).float()
            columns = layer.out.weight[:, head * DIM : (head + 1) * DIM]
            columns.copy_((columns.double() @ by_value.T).float())
    return model


def given(tokens: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(100 * seed + tokens))


def file_of(model: nn.Module, path: Path, opset: int = 17) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch", 1: "tokens"}}
        torch.onnx.export(
            model, (given(6),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=opset
        )
    return path


def through(door: str, model: nn.Module, target: Any, folder: Path, calibration: list[Tensor] | None = None) -> Any:
    """(answers of the rewritten model to `given(9)`, the report)."""
    if door == "module":
        done = rewriter.optimize(model, target, example_inputs=(given(6),), calibration=calibration)
        found = done(given(9))
    elif door == "program":
        done = rewriter.optimize(torch.export.export(model, (given(9),)), target, calibration=calibration)
        found = done.module()(given(9))
    else:
        batches = None if calibration is None else [{"x": x.numpy()} for x in calibration]
        done = rewriter.optimize(
            file_of(model, folder / "m.onnx", 9 if door == "old file" else 17), target, calibration=batches
        )
        done.save(folder / "new.onnx")
        session = ort.InferenceSession(folder / "new.onnx", providers=["CPUExecutionProvider"])
        found = tuple(torch.from_numpy(np.asarray(a)) for a in session.run(None, {"x": given(9).numpy()}))
    answers = found if isinstance(found, tuple) else (found,)
    return answers, done.rewrite_report
