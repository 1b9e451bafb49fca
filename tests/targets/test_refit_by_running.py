"""Calibration where no formula gives the scores: the program is run with shared heads, and the output refitted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.calibrate import rewritten
from passes.match.attention import find_attention
from passes.paired_runs import PairedRuns
from passes.plan import Step
from passes.refit_by_running import can_run
from passes.targets import GroupedQuery
from rewriter.calibration.batches import batches
from rewriter.calibration.torch_probe import module_probe
from rewriter.capture.torch_export import capture
from tests.match.test_blocks_apart import COLUMNS, ROWS, Blocks
from tests.match.test_reasons import GatheredKeys, PooledQueries, ScaledLate, Summed
from tests.targets.lossless_twin import run_file
from tests.targets.test_hidden_biases import OfKeys

WIDTH, KEPT = 32, 2


class Pair(nn.Module):
    """Two layers; what the first gives has as many tokens as it was given."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = kind(), kind()

    def forward(self, x: Tensor) -> Tensor:
        second: Tensor = self.second(self.first(x))
        return second


KINDS: dict[str, type[nn.Module]] = {
    "rotated and scaled": ScaledLate,
    "gathered keys": GatheredKeys,
    "keys bias scores": OfKeys,
    "blocks": Blocks,
    "pooled queries": PooledQueries,
    "summed keys": Summed,
}
ALONE = {"pooled queries", "summed keys"}
"""Of which the tokens of a second layer would be fewer, or none."""
DOORS = [
    *((kind, "module") for kind in KINDS),
    *((kind, "program") for kind in ("rotated and scaled", "blocks", "pooled queries")),
    *((kind, "file") for kind in ("keys bias scores", "summed keys")),
]


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = KINDS[kind]() if kind in ALONE else Pair(KINDS[kind])
    return nn.Sequential(made).eval().requires_grad_(False)


def given(kind: str, seed: int) -> Tensor:
    tokens = ROWS * COLUMNS if kind == "blocks" else 6
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def through(door: str, model: nn.Module, target: Any, x: Tensor, calibration: list[Tensor] | None, at: Path) -> Any:
    """(what is rewritten, applied; its report)."""
    if door == "module":
        done = rewriter.optimize(model, target, example_inputs=(x,), calibration=calibration)
        return done, done.rewrite_report
    if door == "program":
        done = rewriter.optimize(torch.export.export(model, (x,)), target, calibration=calibration)
        return done.module(), done.rewrite_report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch"}}
        torch.onnx.export(model, (x,), str(at / "m.onnx"), dynamo=False, input_names=["x"], dynamic_axes=axes)
    data = None if calibration is None else [{"x": batch.numpy()} for batch in calibration]
    done = rewriter.optimize(at / "m.onnx", target, calibration=data)
    done.save(at / "new.onnx")
    return lambda x: torch.from_numpy(run_file(at / "new.onnx", {"x": x})), done.rewrite_report


@pytest.mark.parametrize(("kind", "door"), DOORS)
def test_calibrated_heads_are_nearer_than_their_mean(kind: str, door: str, tmp_path: Path) -> None:
    model, x = model_of(kind), given(kind, 0)
    calibration = [given(kind, seed) for seed in range(1, 9 if kind == "blocks" else 33)]
    held = given(kind, 99)

    def error(merge: Any, data: list[Tensor] | None) -> float:
        target = GroupedQuery(KEPT, merge=merge, keep_hidden_bias=True)
        new, report = through(door, model, target, x, data, tmp_path)
        assert report.sites and not report.refused
        return float((new(held) - model(held)).square().mean())

    mean, refitted, merged = error("mean", None), error("mean", calibration), error(None, calibration)
    assert refitted < 0.8 * mean and merged < 0.8 * mean


@pytest.mark.parametrize(
    "kind", sorted(KINDS.keys() - {"keys bias scores"})
)  # which projects its positions by them, too
def test_the_students_go_on_with_what_is_installed(kind: str) -> None:
    """What they hold behind the last site is what the rewritten module gives; without the heads they hold it is not."""
    model, x = model_of(kind), given(kind, 0)
    calibration = [given(kind, seed) for seed in range(1, 9)]
    captured = capture(model, (x,), {})
    matches = find_attention(captured.flow, hidden_biases=True)
    assert captured.program is not None
    found = batches(calibration, causal=False)
    pair = PairedRuns.start(captured.flow, matches, module_probe(model, ((x,), {}), captured.program, found))
    target = GroupedQuery(KEPT, keep_hidden_bias=True)
    assert all(can_run(pair, site) for site in matches.sites)
    rewritten(pair, [Step(site, target) for site in matches.sites])
    (output,) = captured.flow.outputs
    held = [run.advance(output, {output})[output] for run in pair.students]
    new = rewriter.optimize(model, target, example_inputs=(x,), calibration=calibration)
    for batch, student in zip(calibration, held, strict=True):
        np.testing.assert_allclose(student, new(batch).numpy(), atol=2e-5)
        assert float(np.abs(student - model(batch).numpy()).max()) > 1e-3, "control: the original's is another"


def test_heads_that_were_read_already_cannot_be_put() -> None:
    """Keys of the second attention are projected, and laid out, before the first attention ends."""

    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Summed(), Summed()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.second.heads(x)
            y = self.first(x)
            q = self.second.q(y).view(*y.shape[:2], 4, -1).transpose(1, 2)
            k, v = (t.unflatten(2, (-1, 3)).sum(3) for t in (k, v))
            return y + self.second.merged((q @ k.transpose(-2, -1)).softmax(-1) @ v)

    model, x = Early().eval().requires_grad_(False), given("", 0)
    captured = capture(model, (x,), {})
    matches = find_attention(captured.flow)
    assert captured.program is not None
    probe = module_probe(model, ((x,), {}), captured.program, batches([x], causal=False))
    pair = PairedRuns.start(captured.flow, matches, probe)
    assert [can_run(pair, site) for site in matches.sites] == [True, False]
    calibration = [given("", seed) for seed in range(1, 9)]
    new = rewriter.optimize(model, "gqa2", example_inputs=(x,), calibration=calibration)
    assert [row.merge for row in new.rewrite_report.sites] == ["mean", "mean"]
