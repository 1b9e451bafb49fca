"""Norms that treat heads apart: what they multiply heads by is found and shrinks with them, through every door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import rewriter
from passes.match.attention import Matches, find_attention
from passes.replay import replay
from passes.weights.head_gains import gains_like, operand_gains
from passes.weights.pooling import mean_pool
from rewriter.capture.torch_export import TorchCapture, capture
from tests.targets.head_norms import DIM, HEADS, NORMS, WIDTH, Model, tie
from tests.targets.lossless_twin import distance, session

SIZES = ((2, 6), (3, 9))
EXACT, MOVED = 1e-5, 1e-3


def features(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(*size, WIDTH, generator=torch.Generator().manual_seed(3))


def made(kind: str, *, packed: bool, tied: bool) -> Model:
    model = Model(kind, packed).eval()
    if tied:
        tie(model, 2)
    return model


def seen(model: nn.Module) -> tuple[TorchCapture, Matches]:
    captured = capture(model.eval(), (features(SIZES[0]),), {})
    return captured, find_attention(captured.flow)


def error(old: nn.Module, new: Any) -> float:
    with torch.no_grad():
        return max(distance(old(x), new(x)) for x in map(features, SIZES))


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("kind", NORMS)
def test_equal_heads_are_merged_without_loss_in_modules_and_graphs_and_others_are_not(kind: str, packed: bool) -> None:
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    for tied in (True, False):
        model = made(kind, packed=packed, tied=tied)
        module = rewriter.optimize(model, "gqa2", example_inputs=(features(SIZES[0]),))
        program = torch.export.export(model, (features(SIZES[0]),), dynamic_shapes=(sizes,))
        graph = rewriter.optimize(program, "gqa2")
        for new, report in ((module, module.rewrite_report), (graph.module(), graph.rewrite_report)):
            assert [row.exact for row in report.sites] == [tied]
            assert error(model, new) < EXACT if tied else error(model, new) > MOVED
        gains = sum(p.numel() // 2 for p in model.attention.k_norm.parameters())
        fewer = 2 * (WIDTH // 2) * (WIDTH + 1) + gains
        change = module.rewrite_report.parameters
        assert change.before - change.after == fewer
        for new in (module, graph):
            assert sum(p.numel() for p in new.parameters()) == sum(p.numel() for p in model.parameters()) - fewer


@pytest.mark.parametrize("kind", ["rms-written", "layer", "by-head"])
def test_files(kind: str, tmp_path: Path) -> None:
    for tied in (True, False):
        model, path, out = made(kind, packed=True, tied=tied), tmp_path / "in.onnx", tmp_path / "out.onnx"
        torch.onnx.export(
            model, (features(SIZES[0]),), path, dynamo=False, opset_version=17, input_names=["x"],
            dynamic_axes={"x": {0: "batch", 1: "tokens"}},
        )  # fmt: skip
        done = rewriter.optimize(path, "gqa2")
        done.save(out)
        onnx.checker.check_model(out, full_check=True)
        opened = session(out)

        def answer(x: torch.Tensor, run: Any = opened) -> torch.Tensor:
            return torch.from_numpy(run.run(None, {"x": x.numpy()})[0])

        assert [row.exact for row in done.rewrite_report.sites] == [tied]
        assert error(model, answer) < EXACT if tied else error(model, answer) > MOVED


@pytest.mark.parametrize("kind", NORMS)
def test_a_shifted_map_of_gains_does_not_replay(kind: str) -> None:
    captured, matches = seen(made(kind, packed=True, tied=False))
    (site,) = matches.sites
    proof = matches.evidence[site.name]
    assert site.k.norm is not None and site.q.norm is not None
    assert site.k.norm.per_head is kind.startswith("by-head") and (site.k.norm.gains is None) is (
        kind == "without-gain"
    )
    assert replay(captured.flow, proof.path, proof.q, proof.k, proof.v).worst < EXACT
    if site.k.norm.gains is None:
        return
    for role in ("q", "k"):
        traced = getattr(proof, role)
        gains = traced.operand.norm.gains
        moved = replace(gains, places=np.roll(gains.places, 1, axis=0))
        operand = replace(traced.operand, norm=replace(traced.operand.norm, gains=moved))
        wrong = {"q": proof.q, "k": proof.k, "v": proof.v, role: replace(traced, operand=operand)}
        assert replay(captured.flow, proof.path, **wrong).worst > 0.05


@pytest.mark.parametrize("kind", ["rms", "layer", "by-head"])
def test_pooled_gains_lie_where_fewer_heads_read_them(kind: str) -> None:
    captured, matches = seen(made(kind, packed=False, tied=False))
    operand = matches.sites[0].k
    assert operand.norm is not None and operand.norm.gains is not None
    stored = captured.flow.value(operand.norm.gains.gain)
    numbers = operand_gains(captured.flow, operand)["gain"]
    pooled = gains_like(operand, mean_pool(numbers, HEADS, 2), stored.shape)
    by_head = stored.reshape(2, HEADS // 2, DIM)
    assert pooled.shape == ((2, DIM) if kind == "by-head" else (2 * DIM,))
    np.testing.assert_allclose(pooled.reshape(2, DIM), by_head.mean(axis=1), rtol=1e-6)
    assert np.abs(pooled.reshape(2, DIM) - by_head[:, 0]).max() > 1e-2, "the control"


class Lengths(nn.Module):
    """Divides by the length of all features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=-1)


class Together(nn.Module):
    """One norm over keys and values at once."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.RMSNorm(2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.norm(self.kv(x))], dim=-1)


def test_what_fewer_heads_would_change_is_refused_for_its_reason() -> None:
    lengths = made("rms", packed=False, tied=False)
    lengths.attention.k_norm = Lengths()
    together = made("without-gain", packed=True, tied=False)
    together.attention.qkv, together.attention.k_norm = Together(), nn.Identity()
    together.attention.q_norm = nn.Identity()
    for model, reason in ((lengths, "fewer heads would be longer"), (together, "all heads and others besides")):
        _, matches = seen(model)
        assert matches.sites == () and [reason in r.reason for r in matches.refusals] == [True]


def test_a_checkpoint_whose_config_sizes_the_norm_stays_a_plain_one(tmp_path: Path) -> None:
    import transformers

    config = transformers.Olmo2Config(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_norm.weight.add_(0.5 * torch.randn(WIDTH))
    ids = torch.arange(10).reshape(1, 10)
    whole = rewriter.optimize(model, "gqa2")
    whole.save_pretrained(tmp_path / "whole")
    plain = transformers.Olmo2ForCausalLM.from_pretrained(tmp_path / "whole")
    assert plain.config.num_key_value_heads == 2 and not (tmp_path / "whole" / "rewrite.json").exists()
    assert plain.model.layers[0].self_attn.k_norm.weight.shape == (2 * DIM,)
    part = rewriter.optimize(model, "gqa2", layers="1")
    part.save_pretrained(tmp_path / "part")
    again = rewriter.load(tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, whole(ids).logits)
        assert torch.equal(again(ids).logits, part(ids).logits)
        assert distance(part(ids).logits, whole(ids).logits) > MOVED, "the control"
