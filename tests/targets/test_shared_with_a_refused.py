"""Keys and values that a refused attention reads, too: it must not change with the one that is rewritten."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.errors import RewriteError
from tests.targets.lossless_twin import run_file

WIDTH, HEADS, DIM, KEPT = 32, 4, 8, 2
EXACT, MOVED = 1e-5, 1e-2


class TwoReaders(nn.Module):
    """One attention, and one whose bias is computed from hidden states (refused) over the same keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.bias, self.o = nn.Linear(WIDTH, HEADS), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, shared: bool = False) -> Tensor:
        """`shared`: with the first attention's heads merged by their mean, written out."""
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        bias = self.bias(x).permute(0, 2, 1)[:, :, None] * torch.ones(1, 1, x.shape[1], 1)
        scale = DIM**-0.5
        fewer = (merged(k), merged(v)) if shared else (k, v)
        first = (q @ fewer[0].transpose(-2, -1) * scale).softmax(-1) @ fewer[1]
        second = (q @ k.transpose(-2, -1) * scale + bias).softmax(-1) @ v
        return self.o(torch.cat([y.transpose(1, 2).flatten(2) for y in (first, second)], -1))


def merged(heads: Tensor) -> Tensor:
    groups = heads.unflatten(1, (KEPT, HEADS // KEPT))
    return groups.mean(2, keepdim=True).expand_as(groups).flatten(1, 2)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoReaders() for _ in range(2))

    def forward(self, x: Tensor, shared: bool = False) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, shared)
        return x


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def features(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_what_would_change_it_is_refused_and_not_called_rewritable(model: Layers) -> None:
    with pytest.raises(RewriteError, match=r"layers\.\d#1, which is not rewritten, reads the same .*onnx"):
        rewriter.optimize(model, target=f"gqa{KEPT}", example_inputs=(features(),))
    found = rewriter.inspect(model, example_inputs=(features(),))
    assert not found.sites and sum("reads the same keys" in r.reason for r in found.refusals) == 2


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_program_changes_the_other_one_alone(model: Layers, calibrated: bool) -> None:
    program = torch.export.export(model, (features(),), dynamic_shapes=({1: torch.export.Dim("tokens", max=64)},))
    assert len(rewriter.inspect(program).sites) == 2
    calibration = [{"x": features(7)}] if calibrated else None
    made = rewriter.optimize(program, f"gqa{KEPT}", calibration=calibration).module()
    with torch.no_grad():
        right, before = model(features(1), shared=True), model(features(1))
        assert calibrated or (made(features(1)) - right).abs().max() <= EXACT
        assert (made(features(1)) - before).abs().max() > (0 if calibrated else MOVED)


def test_a_file_changes_the_other_one_alone(model: Layers, tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (features(),), str(source), dynamo=False, opset_version=17, input_names=["x"])
    rewriter.optimize(source, f"gqa{KEPT}").save(tmp_path / "new.onnx")
    with torch.no_grad():
        right, before = model(features(1), shared=True), model(features(1))
    found = torch.from_numpy(run_file(tmp_path / "new.onnx", {"x": features(1)}))
    assert (found - right).abs().max() <= EXACT
    assert (found - before).abs().max() > MOVED, "control: sharing the heads changes the result"


class OneReader(TwoReaders):
    """The same projections read by the attention alone; what is refused projects its own."""

    def __init__(self) -> None:
        super().__init__()
        self.other_k, self.other_v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shared: bool = False) -> Tensor:
        heads = [
            f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for f in (self.q, self.k, self.v, self.other_k, self.other_v)
        ]
        q, k, v, other_k, other_v = heads
        bias = self.bias(x).permute(0, 2, 1)[:, :, None] * torch.ones(1, 1, x.shape[1], 1)
        k, v = (merged(k), merged(v)) if shared else (k, v)
        first = (q @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v
        second = (q @ other_k.transpose(-2, -1) * DIM**-0.5 + bias).softmax(-1) @ other_v
        return self.o(torch.cat([y.transpose(1, 2).flatten(2) for y in (first, second)], -1))


@pytest.mark.parametrize("door", ["module", "program"])
def test_control_projections_of_its_own_are_shared(model: Layers, door: str) -> None:
    model.layers = nn.ModuleList(OneReader().eval() for _ in range(2))
    given = model if door == "module" else torch.export.export(model, (features(),))
    made = rewriter.optimize(given, target=f"gqa{KEPT}", example_inputs=(features(),))
    run = made if isinstance(made, nn.Module) else made.module()
    with torch.no_grad():
        assert (run(features()) - model(features(), shared=True)).abs().max() <= EXACT
        assert (run(features()) - model(features())).abs().max() > MOVED
