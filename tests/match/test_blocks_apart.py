"""Attention within blocks of tokens that have an axis of their own: Twins ([batch, blocks, heads, ...]), Hiera
([batch, heads, blocks, ...]), with masks by block, fused or not."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import rewriter
from passes.match.attention import find_attention
from passes.replay import TOLERANCES, replay
from passes.targets.grouped_query import BY_BLOCKS
from rewriter.capture.torch_export import capture
from rewriter.errors import NothingToRewrite
from tests.targets.lossless_twin import run_file

WIDTH, HEADS, SIDE = 32, 4, 4
ROWS, COLUMNS = 8, 12


class Blocks(nn.Module):
    """Square blocks of a picture, each of which attends to itself."""

    def __init__(self, *, fused: bool = True, heads_first: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.fused, self.heads_first, self.masked = fused, heads_first, masked
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns = x.shape[0], ROWS // SIDE, COLUMNS // SIDE
        blocks = x.reshape(batch, rows, SIDE, columns, SIDE, WIDTH).transpose(2, 3)
        heads = self.qkv(blocks).reshape(batch, rows * columns, SIDE * SIDE, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(3, 0, 4, 1, 2, 5) if self.heads_first else heads.permute(3, 0, 1, 4, 2, 5)
        mask = self._mask(rows * columns) if self.masked else None
        if self.fused:
            mixed = scaled_dot_product_attention(q, k, v, mask)
        else:
            scores = (q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1)
            mixed = (scores if mask is None else scores + mask).softmax(-1) @ v
        mixed = mixed.permute(0, 2, 3, 1, 4) if self.heads_first else mixed.transpose(2, 3)
        laid = mixed.reshape(batch, rows, columns, SIDE, SIDE, WIDTH).transpose(2, 3)
        out: Tensor = self.proj(laid.reshape(batch, ROWS * COLUMNS, WIDTH))
        return out

    def _mask(self, blocks: int) -> Tensor:
        """Block n does not see its first n tokens."""
        hidden = torch.arange(SIDE * SIDE) < torch.arange(blocks)[:, None]
        return torch.where(hidden, -1e9, 0.0)[:, None, None]


CASES: dict[str, dict[str, bool]] = {
    "blocks before heads": {},
    "written out": {"fused": False},
    "heads before blocks": {"heads_first": True},
    "heads before blocks, written out": {"heads_first": True, "fused": False},
    "masked by block": {"masked": True},
    "masked by block, written out": {"masked": True, "fused": False},
}


def built(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Blocks(**options), Blocks(**options)).eval()


def twin(model: nn.Module) -> nn.Module:
    """With equal key and value heads in each pair."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for layer in found.children():
            for part in (1, 2):
                rows = slice(part * WIDTH, (part + 1) * WIDTH)
                for stored in (layer.qkv.weight[rows], layer.qkv.bias[rows]):
                    heads = stored.view(HEADS, WIDTH // HEADS, -1)
                    heads[1::2] = heads[::2]
    return found


def batch(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, ROWS * COLUMNS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equal_heads_are_shared_without_loss(options: dict[str, bool]) -> None:
    model = built(**options)
    same, x = twin(model), batch(2)
    small = rewriter.optimize(same, "gqa2", example_inputs=(x,))
    assert all(row.exact and row.after == "gqa2" for row in small.rewrite_report.sites)
    program = rewriter.optimize(torch.export.export(same, (x,), strict=False), "gqa2")
    with torch.no_grad():
        for found in (small, program.module()):
            assert torch.allclose(found(x), same(x), atol=1e-5)
        assert torch.allclose(small(batch(3, 2)), same(batch(3, 2)), atol=1e-5)
        assert not torch.allclose(small(x), model(x), atol=1e-2), "the control: other heads"
    shrunk = [sum(p.numel() for p in m.parameters()) for m in (small, same)]
    assert shrunk[1] - shrunk[0] == 2 * (2 * (HEADS // 2) * (WIDTH // HEADS) * (WIDTH + 1))


@pytest.mark.parametrize("name", ["blocks before heads", "heads before blocks", "masked by block"])
def test_a_shifted_map_does_not_replay(name: str) -> None:
    flow = capture(built(**CASES[name]), (batch(2),), {}).flow
    matches = find_attention(flow)
    assert len(matches.sites) == 2 and all(s.by_blocks for s in matches.sites)
    for proof in matches.evidence.values():
        limit = TOLERANCES[flow.dtype]
        assert replay(flow, proof.path, proof.q, proof.k, proof.v).worst < limit
        shifted = replace(proof.k, tokens=replace(proof.k.tokens, rows=np.roll(proof.k.tokens.rows, 1, axis=0)))
        assert replay(flow, proof.path, proof.q, shifted, proof.v).worst > limit


def test_heads_are_merged_by_their_mean() -> None:
    model, x = built(), batch(2)
    small = rewriter.optimize(model, "mqa", example_inputs=(x,))
    for old, new in zip(model.children(), small.children(), strict=True):
        keys = old.qkv.weight[WIDTH : 2 * WIDTH].view(HEADS, WIDTH // HEADS, WIDTH).mean(0)
        stored = [p for p in new.parameters() if p.shape[-1] == WIDTH and p.shape[0] == WIDTH + 2 * WIDTH // HEADS]
        assert len(stored) == 1 and torch.allclose(stored[0][WIDTH : WIDTH + WIDTH // HEADS], keys, atol=1e-6)


def test_attention_with_masks_by_block_behind_heads_is_run_whole() -> None:
    class Other(Blocks):
        def _mask(self, blocks: int) -> Tensor:
            return super()._mask(blocks).transpose(0, 1)[None]

    torch.manual_seed(0)
    model = nn.Sequential(Other(heads_first=True, masked=True)).eval()
    (site,) = rewriter.inspect(model, example_inputs=(batch(2),)).sites
    assert "blocks come before heads" in site.whole and not site.by_blocks


def test_other_targets_say_why_not_and_inspect_lists_none() -> None:
    model, x = built(), batch(2)
    for target in ("fnet", "window:4", "linear", "gau", "dha"):
        with pytest.raises(NothingToRewrite, match=BY_BLOCKS.split(";")[0]):
            rewriter.optimize(model, target, example_inputs=(x,))
    sites = rewriter.inspect(model, example_inputs=(x,)).to_dict()["sites"]
    assert [site["targets"] for site in sites] == [["mqa", "gqa2"]] * 2


@pytest.mark.parametrize(("name", "dynamo"), [("written out", False), ("heads before blocks, written out", True)])
def test_a_file_keeps_its_attention_and_repeats_shared_heads(name: str, dynamo: bool, tmp_path: Path) -> None:
    same, path, out = twin(built(**CASES[name])), tmp_path / "blocks.onnx", tmp_path / "small.onnx"
    more: dict[str, Any] = {"dynamic_axes": {"x": {0: "b"}, "y": {0: "b"}}, "opset_version": 17}
    if dynamo:
        more = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},), "opset_version": 18}
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(same, (batch(2),), str(path), dynamo=dynamo, **names, **more)
    done = rewriter.optimize(path, "gqa2")
    done.save(out)
    report = done.rewrite_report
    assert report is not None and [(row.after, row.exact) for row in report.sites] == [("gqa2", True)] * 2
    assert all("keeps its own attention, which repeats the shared heads" in row.notes[0] for row in report.sites)
    x = batch(3, 2)
    found, wished = (ort.InferenceSession(str(p)).run(None, {"x": x.numpy()})[0] for p in (out, path))
    assert np.abs(found - wished).max() < 1e-5
    with torch.no_grad():
        assert np.abs(found - built(**CASES[name])(x).numpy()).max() > 1e-2, "the control: other heads"
    sizes = [sum(t.size for t in map(numpy_helper.to_array, onnx.load(p).graph.initializer) if t.dtype == np.float32)
             for p in (path, out)]  # fmt: skip
    assert sizes[0] - sizes[1] == 2 * (2 * (HEADS // 2) * (WIDTH // HEADS) * (WIDTH + 1))
    assert rewriter.verify(out, path).ok


def test_a_file_takes_calibration(tmp_path: Path) -> None:
    """Queries and output follow the merge in the attention that stays."""
    path, model = tmp_path / "blocks.onnx", built(fused=False)
    torch.onnx.export(
        model, (batch(2),), str(path), dynamo=False, opset_version=17, input_names=["x"],
        output_names=["y"], dynamic_axes={"x": {0: "b"}, "y": {0: "b"}},
    )  # fmt: skip
    errors = {}
    for merge, data in (("mean", None), ("joint", [{"x": batch(4, seed).numpy()} for seed in range(3)])):
        done = rewriter.optimize(path, "gqa2", calibration=data)
        assert {row.merge for row in done.rewrite_report.sites} == {merge}
        done.save(tmp_path / "new.onnx")
        found = run_file(tmp_path / "new.onnx", {"x": batch(2, 9)})
        errors[merge] = float(np.square(found - model(batch(2, 9)).detach().numpy()).mean())
    assert errors["joint"] < 0.7 * errors["mean"]


class Level(nn.Module):
    """A level of NesT: blocks of tokens, of which the last level has one; heads are joined behind their features."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks, self.qkv, self.proj = blocks, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x.unflatten(1, (self.blocks, -1))).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(3, 0, 4, 1, 2, 5)
        mixed = (q * (WIDTH // HEADS) ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        out: Tensor = self.proj(mixed.permute(0, 2, 3, 4, 1).reshape(x.shape))
        return out


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_level_of_one_block_is_one_of_blocks(blocks: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Level(blocks)).eval(), batch(2)
    same = twin(model)
    small = rewriter.optimize(same, "gqa2", example_inputs=(x,))
    assert small.rewrite_report.sites[0].exact
    with torch.no_grad():
        assert torch.allclose(small(x), same(x), atol=1e-5)
        assert not torch.allclose(small(x), model(x), atol=1e-2), "the control: other heads"


class AlsoRead(Blocks):
    """A second attention, with a temperature that is computed from hidden states (refused), reads the same keys."""

    def __init__(self) -> None:
        super().__init__(fused=False)
        self.heat = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns = x.shape[0], ROWS // SIDE, COLUMNS // SIDE
        blocks = x.reshape(batch, rows, SIDE, columns, SIDE, WIDTH).transpose(2, 3)
        blocks = blocks.reshape(batch, rows * columns, SIDE * SIDE, WIDTH)
        q, k, v = self.qkv(blocks).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(3, 0, 1, 4, 2, 5)
        scores = q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
        first, second = (s.softmax(-1) @ v for s in (scores, scores * self.heat(blocks)[:, :, None]))
        apart = torch.cat([first, second], 2).transpose(2, 3)
        laid = [y.reshape(batch, ROWS * COLUMNS, WIDTH) for y in apart.split(HEADS, 3)]
        out: Tensor = self.proj(laid[0]) + laid[1]
        return out


def test_heads_that_another_attention_reads_are_not_repeated_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.onnx.export(AlsoRead().eval(), (batch(2),), tmp_path / "m.onnx", dynamo=False, input_names=["x"])
    with pytest.raises(NothingToRewrite, match="another attention reads the keys"):
        rewriter.optimize(tmp_path / "m.onnx", "gqa2")
    assert not rewriter.inspect(tmp_path / "m.onnx").sites
