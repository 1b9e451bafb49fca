"""Query heads that share a key/value head and are no neighbours: head h reads key/value head ``h % kv_heads``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import rewriter
from tests.zoo.randomize import randomize

WIDTH, HEADS, KV, DIM = 32, 8, 4, 4
EXACT, MOVED = 1e-5, 1e-3


class Interleaved(nn.Module):
    """``x [B, T, 32]`` to the same; key/value heads are repeated one after the other, perhaps with slopes by head."""

    def __init__(self, sloped: bool = False) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, KV * DIM) for _ in range(2))
        self.slopes = nn.Parameter(torch.zeros(HEADS, 1, 1)) if sloped else None

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (KV, DIM)).transpose(1, 2).repeat(1, HEADS // KV, 1, 1)
                for p in (self.key, self.value))  # fmt: skip
        scores = q @ k.transpose(-2, -1) * DIM**-0.5
        if self.slopes is not None:
            scores = scores + self.slopes * torch.arange(x.shape[1])
        out: Tensor = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


def _x(seed: int = 0, tokens: int = 7) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def _model(*, twin: bool = True, perturbed: bool = False, sloped: bool = False) -> nn.Module:
    model = randomize(nn.Sequential(Interleaved(sloped), Interleaved(sloped)))
    parameters = [p for layer in model for m in (layer.key, layer.value) for p in m.parameters()]  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for parameter in parameters if twin else ():
            by_head = parameter.view(2, KV // 2, DIM, *parameter.shape[1:])
            by_head[:, 1] = by_head[:, 0]
            if perturbed:
                by_head[-1, 1] += 0.5
    return model


def _file(model: nn.Module, folder: Path) -> Path:
    path, axes = folder / "old.onnx", {"x": {0: "batch", 1: "tokens"}}
    torch.onnx.export(model, (_x(),), str(path), dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
    return path


def _ran(path: Path, x: Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x.numpy()})[0]
    return result


@pytest.mark.parametrize("perturbed", [False, True], ids=["twin", "one-head-untied"])
@torch.no_grad()
def test_a_twin_is_rewritten_without_loss_through_every_door(perturbed: bool, tmp_path: Path) -> None:
    model, other = _model(perturbed=perturbed), _x(1, 5)
    wanted = model(other).numpy()
    in_place = rewriter.optimize(model, "gqa2", example_inputs=(_x(),))
    dynamic = {"input": {1: torch.export.Dim("tokens", min=2)}}
    graph = rewriter.optimize(torch.export.export(model, (_x(),), dynamic_shapes=dynamic), "gqa2")
    rewriter.optimize(_file(model, tmp_path), "gqa2").save(tmp_path / "new.onnx")
    for found in (in_place(other).numpy(), graph.module()(other).numpy(), _ran(tmp_path / "new.onnx", other)):
        error = float(np.abs(found - wanted).max())
        assert error > MOVED if perturbed else error < EXACT


def test_one_head_for_all_needs_no_order(tmp_path: Path) -> None:
    report = rewriter.optimize(_file(_model(twin=False, sloped=True), tmp_path), "mqa").rewrite_report
    assert [(row.before, row.after) for row in report.sites] == [("gqa4", "mqa")] * 2
    floor = rewriter.optimize(_file(_model(twin=False, sloped=True), tmp_path), "mqa", verify=False).rewrite_report
    assert all(row.error is not None and row.error < 1 for row in floor.sites)


@torch.no_grad()
def test_what_treats_heads_apart_keeps_them_where_they_are(tmp_path: Path) -> None:
    model = _model(sloped=True)
    wanted = model(_x(1))
    path = _file(model, tmp_path)
    with pytest.raises(
        rewriter.NothingToRewrite, match="no neighbours, and cannot change places: its scores get a bias"
    ):
        rewriter.optimize(path, "gqa2")
    kept = rewriter.optimize(model, "gqa2", example_inputs=(_x(),))  # whose forward places heads as it did
    assert float((kept(_x(1)) - wanted).abs().max()) < EXACT


def test_statistics_merge_better_than_the_mean(tmp_path: Path) -> None:
    path = _file(_model(twin=False), tmp_path)
    texts = [{"x": _x(seed, 16).numpy()} for seed in range(2, 10)]
    mean, fitted = (rewriter.optimize(path, "gqa2", calibration=given).rewrite_report.sites for given in (None, texts))
    for before, after in zip(mean, fitted, strict=True):
        assert after.merge == "joint"
        assert after.error is not None and before.error is not None
        assert after.error < before.error < 1


def test_targets_that_write_scores_anew_in_place_say_what_to_do_first(tmp_path: Path) -> None:
    path = _file(_model(), tmp_path)
    for target in ("window:4,0", "linear"):
        with pytest.raises(rewriter.NothingToRewrite, match="gqaN brings them together first"):
            rewriter.optimize(path, target)
