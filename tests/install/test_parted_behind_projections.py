"""Tokens parted into blocks between a projection and its heads: shared heads are repeated behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import rewriter
from rewriter.errors import NothingToRewrite

WIDTH, HEADS, DIM, BLOCK = 24, 4, 6, 3


class Parted(nn.Module):
    """Each block of three tokens attends to itself; `joined` puts heads on the batch's axis, too."""

    def __init__(self, *, joined: bool = False, behind: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.joined, self.behind = joined, behind

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        projected = projection(x) if self.behind else projection(x.reshape(-1, BLOCK, WIDTH))
        self.projected = projected
        heads = projected.reshape(len(x), -1, BLOCK, HEADS, DIM).transpose(2, 3)
        laid: Tensor = heads.reshape((-1, BLOCK, DIM) if self.joined else (-1, HEADS, BLOCK, DIM))
        return laid

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(p, x) for p in (self.q, self.k, self.v))
        if self.joined:
            mixed = ((q * DIM**-0.5) @ k.transpose(1, 2)).softmax(-1) @ v
        else:
            mixed = scaled_dot_product_attention(q, k, v)
        laid = mixed.reshape(len(x), -1, HEADS, BLOCK, DIM).transpose(2, 3)
        out: Tensor = self.o(laid.reshape(x.shape))
        return out


class Mapped(Parted):
    """Another map reads the projected values (as positions by convolution do in YOLO's area attention)."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = super().forward(x)
        return mixed + self.o(self.projected)


def twin(**options: bool) -> Parted:
    """With equal key and value heads in each pair."""
    module = Parted(**options).eval().requires_grad_(False)
    for stored in (*module.k.parameters(), *module.v.parameters()):
        heads = stored.view(HEADS, DIM, -1)
        heads[1::2] = heads[::2]
    return module


def tokens(batch: int, blocks: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, blocks * BLOCK, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("joined", [False, True], ids=["heads apart", "heads on the batch axis"])
def test_modules_and_programs_repeat_shared_heads(joined: bool) -> None:
    module, x = twin(joined=joined), tokens(2, 5)
    small = rewriter.optimize(nn.Sequential(module), "gqa2", example_inputs=(x,))
    program = rewriter.optimize(torch.export.export(module, (x,), strict=False), "gqa2")
    with torch.no_grad():
        assert torch.allclose(small(tokens(3, 4, 2)), module(tokens(3, 4, 2)), atol=1e-5)
        assert torch.allclose(program.module()(x), module(x), atol=1e-5)
        assert not torch.allclose(program.module()(x), Parted(joined=joined)(x), atol=1e-2), "the control: other heads"
    before, after = (sum(p.numel() for p in parameters) for parameters in (module.parameters(), program.parameters()))
    assert before - after == 2 * 2 * DIM * (WIDTH + 1)


@pytest.mark.parametrize("behind", [True, False], ids=["parted behind", "parted before"])
def test_files_repeat_shared_heads_too_unless_tokens_are_parted_before(behind: bool, tmp_path: Path) -> None:
    module, x, path = twin(behind=behind), tokens(2, 5), tmp_path / "blocks.onnx"
    torch.onnx.export(
        module, (x,), str(path), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "batch"}},
    )  # fmt: skip
    report = rewriter.optimize(path, "gqa2").rewrite_report
    assert report is not None and [row.exact for row in report.sites] == [True]
    notes = " ".join(report.sites[0].notes)
    assert ("parted into blocks between the key projection and its heads" in notes) == behind, "why attention is kept"
    assert report.fidelity is not None and report.fidelity.max_abs < 1e-5


def test_inspect_offers_no_heads_that_optimize_would_not_share(tmp_path: Path) -> None:
    for kind, offered in ((Parted, True), (Mapped, False)):
        path = tmp_path / f"{kind.__name__}.onnx"
        torch.onnx.export(kind().eval(), (tokens(2, 5),), str(path), dynamo=False, opset_version=17, input_names=["x"])
        seen = rewriter.inspect(path).to_dict()["sites"]
        (attention,) = (site for site in seen if site["kind"] == "attention")
        assert ("gqa2" in attention["targets"]) is offered and "window" in attention["targets"]
        if not offered:
            with pytest.raises(NothingToRewrite, match="parted into blocks"):
                rewriter.optimize(path, "gqa2")
