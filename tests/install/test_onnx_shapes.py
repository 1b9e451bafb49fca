"""Shapes that were read off projections which go away, in files whose recordings do not vary all that is open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.capture import feeds
from rewriter.capture.onnx_file import OnnxCapture

WIDTH, HEADS = 16, 4


class Patches(nn.Module):
    """Attention over patches of an image of any size; the number of patches is read off the keys."""

    def __init__(self, patch: int, flat: bool) -> None:
        super().__init__()
        self.patch, self.flat = nn.Conv2d(3, WIDTH, patch, patch), flat
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        for layer in (self.k, self.v):
            for p in layer.parameters():  # heads that are equal already
                p.data = p.data.view(HEADS, WIDTH // HEADS, -1)[:1].expand(HEADS, -1, -1).reshape(p.shape).clone()

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        q, k, v = self.q(x), self.k(x), self.v(x)
        heads = [t.view(t.shape[0], t.shape[1], HEADS, -1).transpose(1, 2) for t in (q, k, v)]
        weights = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) * 0.5, -1)
        mixed = (weights @ heads[2]).transpose(1, 2)
        lead = (k.shape[0] * k.shape[1],) if self.flat else k.shape[:2]
        return x + self.o(mixed.reshape(*lead, k.shape[2])).reshape(x.shape)


@pytest.mark.parametrize("flat", (False, True), ids=("by sequence", "rows"))
@pytest.mark.parametrize("patch", (8, 16), ids=("as many patches as features", "other numbers"))
def test_other_image_sizes_than_the_recorded_ones(
    patch: int, flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    source, output = tmp_path / "in.onnx", tmp_path / "out.onnx"
    axes = {"image": {0: "batch", 2: "height", 3: "width"}, "y": {0: "batch", 1: "patches"}}
    torch.onnx.export(
        Patches(patch, flat).eval(), (torch.randn(2, 3, 32, 32),), str(source), dynamo=False, opset_version=17,
        input_names=["image"], output_names=["y"], dynamic_axes=axes,
    )  # fmt: skip

    def apart(side: int) -> float:
        image = np.random.default_rng(0).standard_normal((3, 3, side, side), np.float32)
        a, b = (ort.InferenceSession(str(p)).run(None, {"image": image})[0] for p in (source, output))
        return float(np.abs(a - b).max())

    monkeypatch.setattr(feeds, "_SIDE", 64)  # fewer patches

    def require() -> None:
        rewriter.optimize(source, "mqa").save(output)
        assert max(apart(side) for side in (32, 48, 96)) < 1e-4

    require()
    monkeypatch.setattr(feeds, "_sides", lambda *_: (32, 32))  # as if patches had positions of a fixed number
    require()
    monkeypatch.setattr(OnnxCapture, "varies_all", True)
    rewriter.optimize(source, "mqa").save(output)
    with pytest.raises(Exception, match="cannot be reshaped"):
        apart(96)
