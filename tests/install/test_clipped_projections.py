"""Queries, keys and values kept within bounds, before they are cut out of one projection or each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import rewriter
from tests.targets.lossless_twin import distance, run_file

WIDTH, HEADS, DIM = 32, 4, 8


class Clipped(nn.Module):
    """`cut`: by chunk or by axes of a view, behind the clamp; or before it."""

    def __init__(self, cut: str, bound: float, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o, self.cut, self.bound = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), cut, bound
        with torch.no_grad():
            for parameter in self.qkv.parameters():
                for part in parameter.split(WIDTH)[1:] if tied else ():
                    heads = part.view(HEADS, DIM, -1)
                    heads[1::2] = heads[::2]

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(x)
        if self.cut == "before":
            q, k, v = (t.clamp(-self.bound, self.bound) for t in made.chunk(3, -1))
        elif self.cut == "chunk":
            q, k, v = made.clamp(min=-self.bound, max=self.bound).chunk(3, -1)
        else:
            q, k, v = made.clamp(-self.bound, self.bound).view(*x.shape[:2], 3, WIDTH).unbind(2)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (q, k, v))
        out: Tensor = self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def features(size: float = 1.0, tokens: int = 6) -> Tensor:
    return size * torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bound", [0.5, 4.0], ids=["met", "not met by the example"])
@pytest.mark.parametrize("cut", ["before", "chunk", "view"])
def test_shared_heads_are_kept_within_the_same_bounds(cut: str, bound: float) -> None:
    module, many = nn.Sequential(Clipped(cut, bound)).eval(), {1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(module, (features(),), dynamic_shapes=(many,))
    small = rewriter.optimize(module, "gqa2", example_inputs=(features(),))
    written = rewriter.optimize(program, "gqa2")
    assert [r.exact for new in (small, written) for r in new.rewrite_report.sites] == [True, True]
    seen = rewriter.inspect(module, example_inputs=(features(),))
    assert "window" not in seen.targets[seen.sites[0].name]
    with torch.no_grad():
        wide = features(9.0, 8)  # beyond either bound
        assert max(distance(module(wide), new(wide)) for new in (small, written.module())) < 1e-5
        module[0].bound = 100.0  # type: ignore[assignment]
        assert distance(module(wide), small(wide)) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_differ_are_not_called_exact_in_modules_and_files(tied: bool, tmp_path: Path) -> None:
    module, path = nn.Sequential(Clipped("chunk", 0.5, tied=tied)).eval(), tmp_path / "model.onnx"
    (row,) = rewriter.optimize(module, "gqa2", example_inputs=(features(),)).rewrite_report.sites
    torch.onnx.export(module, (features(),), str(path), dynamo=False, opset_version=17, input_names=["x"])
    done = rewriter.optimize(path, "gqa2")
    assert [row.exact, *(r.exact for r in done.rewrite_report.sites)] == [tied, tied]
    done.save(tmp_path / "new.onnx")
    with torch.no_grad():
        error = distance(run_file(tmp_path / "new.onnx", {"x": features(9.0)}), module(features(9.0)))
    assert (error < 1e-5) is tied
