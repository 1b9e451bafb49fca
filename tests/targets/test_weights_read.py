"""Attention weights that something else reads, too: every door shares heads and keeps the attention as it is."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn

import rewriter
from rewriter.errors import NothingToRewrite

WIDTH, HEADS, DIM, KEPT = 32, 4, 8, 2
EXACT, MOVED = 1e-5, 1e-3


class Told(nn.Module):
    """Two attentions over x [B, T, WIDTH] that tell the mean of their weights over heads, as nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in "qkvo"}) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        told = []
        for layer in self.layers:
            q, k, v = (layer[n](x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for n in "qkv")
            weights = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1)
            x = x + layer["o"]((weights @ v).transpose(1, 2).reshape(x.shape))
            told.append(weights)
        return x, told[0], told[1].mean(1)


def given(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


@pytest.fixture
def twin() -> Told:
    """Heads are equal in pairs."""
    torch.manual_seed(0)
    model = Told().eval().requires_grad_(False)
    for layer in model.layers:
        for projection in (layer["k"], layer["v"]):
            heads = projection.weight.view(KEPT, HEADS // KEPT, -1)
            heads[:, 1:] = heads[:, :1]
            projection.bias.view(KEPT, HEADS // KEPT, -1)[:, 1:] = projection.bias.view(KEPT, -1, DIM)[:, :1]
    return model


def file_of(model: nn.Module, path: Path, opset: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch", 1: "tokens"}}
        torch.onnx.export(
            model, (given(6),), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=opset
        )
    return path


@pytest.mark.parametrize("door", ["module", "program", "file", "old file"])
def test_heads_are_shared_and_weights_told_as_before(door: str, twin: Told, tmp_path: Path) -> None:
    def rewritten() -> tuple[Tensor, ...]:
        if door == "module":
            done = rewriter.optimize(twin, f"gqa{KEPT}", example_inputs=(given(6),))
        elif door == "program":
            done = rewriter.optimize(torch.export.export(twin, (given(9),)), f"gqa{KEPT}")
        else:
            done = rewriter.optimize(file_of(twin, tmp_path / "m.onnx", 9 if door == "old file" else 17), f"gqa{KEPT}")
        assert len(done.rewrite_report.sites) == 2 and not done.rewrite_report.refused
        if door in {"module", "program"}:
            return (done if door == "module" else done.module())(given(9))
        done.save(tmp_path / "new.onnx")
        session = ort.InferenceSession(tmp_path / "new.onnx", providers=["CPUExecutionProvider"])
        return tuple(map(torch.from_numpy, session.run(None, {"x": given(9).numpy()})))

    def apart() -> list[float]:
        return [float((a - b).abs().max()) for a, b in zip(rewritten(), twin(given(9)), strict=True)]

    assert max(apart()) <= EXACT
    twin.layers[0]["k"].weight[-DIM:] *= -1
    assert min(apart()) > MOVED, "control: heads that differ are merged, and weights tell"


@pytest.mark.parametrize("scheme", ["integers", "blocks"])
def test_quantised_projections_repeat_heads_too(scheme: str, twin: Told, tmp_path: Path) -> None:
    def moved() -> tuple[float, set[str]]:
        path, out = file_of(twin, tmp_path / "m.onnx", 17), tmp_path / "quantised.onnx"
        if scheme == "integers":
            quantize_dynamic(path, out, weight_type=QuantType.QInt8)
        else:
            made = MatMulNBitsQuantizer(onnx.load(path), bits=8, block_size=16)
            made.process()
            made.model.save_model_to_file(str(out))
        done = rewriter.optimize(out, f"gqa{KEPT}")
        assert len(done.rewrite_report.sites) == 2 and done.rewrite_report.fidelity is not None
        shapes = {str(v.shape) for v in done.model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT}
        return done.rewrite_report.fidelity.max_abs, {s for s in shapes if s in {"[32,32]", "[32,16]"}}

    assert moved() == (pytest.approx(0, abs=1e-4), set()), "all matrices stay integers"
    twin.layers[0]["k"].weight[-DIM:] *= -1
    assert moved()[0] > MOVED, "control: heads that differ are merged"


def test_nothing_else_is_done_with_them(twin: Told, tmp_path: Path) -> None:
    path = file_of(twin, tmp_path / "m.onnx", 17)
    assert all(set(site["targets"]) == {"mqa", "gqa2"} for site in rewriter.inspect(path).to_dict()["sites"])
    with pytest.raises(NothingToRewrite, match="attention weights"):
        rewriter.optimize(path, "window:2")
