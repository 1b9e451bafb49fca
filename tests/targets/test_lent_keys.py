"""Keys and values that one attention projects and several read, each with queries of its own, through every door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewriter
from tests.targets.lossless_twin import distance, run_file

WIDTH, HEADS, DIM, KEPT = 32, 4, 8, 2
EXACT, MOVED = 1e-4, 1e-3


class Attention(nn.Module):
    """Queries of its own; keys and values too, unless they are lent."""

    def __init__(self, lends: bool) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        if lends:
            self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, lent: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        def heads(rows: Tensor) -> Tensor:
            return rows.view(*x.shape[:2], HEADS, DIM).transpose(1, 2)

        k, v = (heads(self.k(x)), heads(self.v(x))) if lent is None else lent
        mixed = (heads(self.q(x)) @ k.transpose(-2, -1) * DIM**-0.5).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2)), (k, v)


class Lends(nn.Module):
    """Three layers, of which the first one's keys and values serve all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(lends) for lends in (True, False, False))

    def forward(self, x: Tensor) -> Tensor:
        lent = None
        for layer in self.layers:
            mixed, lent = layer(x, lent)
            x = x + mixed
        return x


def features(seed: int) -> Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed))


def twin(perturbed: bool) -> nn.Module:
    """Keys and values by head equal within two groups; `perturbed`: but for one head's values."""
    torch.manual_seed(0)
    module = Lends().eval()
    first = module.layers[0]
    with torch.no_grad():
        for projection in (first.k, first.v):
            for parameter in projection.parameters():
                groups = parameter.view(KEPT, HEADS // KEPT, DIM, *parameter.shape[1:])
                groups[:, 1:] = groups[:, :1].clone()
        if perturbed:
            first.v.weight[-DIM:] += 0.5
    return module


@pytest.mark.parametrize("door", ["module", "graph", "file"])
def test_keys_that_serve_several_attentions_are_shared_in_all_of_them(door: str, tmp_path: Path) -> None:
    for perturbed in (False, True):
        module = twin(perturbed)
        with torch.no_grad():
            expected = module(features(1))
        if door == "module":
            new = rewriter.optimize(module, f"gqa{KEPT}", example_inputs=(features(0),))
            with torch.no_grad():
                got, report = new(features(1)), new.rewrite_report
        elif door == "graph":
            program = rewriter.optimize(torch.export.export(module, (features(0),)), f"gqa{KEPT}")
            with torch.no_grad():
                got, report = program.module()(features(1)), program.rewrite_report
        else:
            path = tmp_path / f"{perturbed}.onnx"
            torch.onnx.export(module, (features(0),), str(path), dynamo=False, opset_version=17, input_names=["x"])
            done = rewriter.optimize(path, f"gqa{KEPT}")
            done.save(tmp_path / "new.onnx")
            got, report = torch.from_numpy(run_file(tmp_path / "new.onnx", {"x": features(1)})), done.rewrite_report
        assert [row.exact for row in report.sites] == [not perturbed] * 3 and not report.refused
        error = distance(got, expected)
        assert error > MOVED if perturbed else error < EXACT
