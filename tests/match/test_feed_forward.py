"""Feed-forward blocks: found and described in models of many makes, refused with a reason, or not mentioned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from torch.nn import functional as F

import rewriter
from passes.dataflow import Array, Flow, Value
from passes.feed_forward_site import FeedForwardSite, HiddenInput
from passes.match.feed_forward import FeedForwards, confirm_feed_forward, find_feed_forward
from passes.nonlinearities import NONLINEARITIES, erf
from rewriter.capture import onnx_file, onnx_load, torch_export
from rewriter.onnx_rewrite import match_capture, match_feed_forward
from tests.match.doors import Seen, through_torch
from tests.zoo.feeds import INNER, WIDTH
from tests.zoo.models import ZOO

REPLAY_LIMIT = 1e-5
FUSED = "gated, gate and up in one projection"

# ------------------------------------------------------------------ models of the zoo

ZOO_BLOCKS = {
    "bert-sdpa": (["encoder.layer.0.feed_forward", "encoder.layer.1.feed_forward"], "plain", "gelu", INNER),
    "gpt2-sdpa": (["transformer.h.0.mlp", "transformer.h.1.mlp"], "plain", "gelu_tanh", INNER),
    "llama-gqa-sdpa": (["model.layers.0.mlp", "model.layers.1.mlp"], "gated", "silu", INNER),
    "phi3-sdpa": (["model.layers.0.mlp", "model.layers.1.mlp"], FUSED, "silu", INNER),
    "gemma2-eager": (["model.layers.0.mlp", "model.layers.1.mlp"], "gated", "gelu_tanh", INNER),
    "modernbert-sdpa": (["layers.0.mlp", "layers.1.mlp"], FUSED, "gelu", INNER),
    "cohere-sdpa": (["model.layers.0.mlp", "model.layers.1.mlp"], "gated", "silu", INNER),
    "gptj-eager": (["transformer.h.0.mlp", "transformer.h.1.mlp"], "plain", "gelu_tanh", 4 * WIDTH),
    "vit-sdpa": (["layers.0.mlp", "layers.1.mlp"], "plain", "gelu", INNER),
    "clip-text-sdpa": (["encoder.layers.0.mlp", "encoder.layers.1.mlp"], "plain", "gelu_quick", INNER),
    "whisper-sdpa": (
        [f"model.{side}.layers.{i}.feed_forward" for side in ("encoder", "decoder") for i in (0, 1)],
        "plain",
        "gelu",
        INNER,
    ),
    "bart-sdpa": (
        [f"model.{side}.layers.{i}.feed_forward" for side in ("encoder", "decoder") for i in (0, 1)],
        "plain",
        "gelu",
        INNER,
    ),
    "t5-eager": (
        [
            *(f"encoder.block.{i}.layer.1.DenseReluDense" for i in (0, 1)),
            *(f"decoder.block.{i}.layer.2.DenseReluDense" for i in (0, 1)),
        ],
        "plain",
        "relu",
        INNER,
    ),
    "torch-encoder-padded": (
        ["encoder.layers.0.feed_forward", "encoder.layers.1.feed_forward"],
        "plain",
        "relu",
        INNER,
    ),
    "nanogpt-softmax": (["h.0.mlp", "h.1.mlp"], "plain", "gelu", INNER),
    "x-rotary-sdpa": (["attn_layers.layers.1.1.ff", "attn_layers.layers.3.1.ff"], "plain", "gelu", 2 * WIDTH),
    "mlp": (["mlp"], "plain", "gelu", INNER),
}
FILES = [
    ("bert-sdpa", "dynamo18"),
    ("gpt2-sdpa", "torchscript17"),
    ("llama-gqa-sdpa", "dynamo18"),
    ("phi3-sdpa", "dynamo18"),
    ("nanogpt-softmax", "torchscript17"),
]


def blocks_of(seen: Seen) -> FeedForwards:
    return find_feed_forward(seen.flow, seen.matches.names)


@pytest.mark.parametrize("name", ZOO_BLOCKS)
def test_blocks_of_the_zoo(name: str) -> None:
    names, style, activation, hidden = ZOO_BLOCKS[name]
    found = blocks_of(through_torch(ZOO[name]))
    assert [s.name for s in found.sites] == names and found.refusals == ()
    for site in found.sites:
        assert (site.style, site.activation.name, site.width, site.hidden) == (style, activation, WIDTH, hidden)
        assert site.replay_error < REPLAY_LIMIT and site.residual is not None
        assert str(site.layer) in site.name.split(".") or name == "mlp"


@pytest.mark.parametrize(("name", "exporter"), [pytest.param(*f, id="-".join(f)) for f in FILES])
def test_files_show_the_same_blocks(name: str, exporter: str, zoo_onnx: Callable[..., Path]) -> None:
    captured = onnx_file.capture(onnx_load.load(zoo_onnx(ZOO[name], exporter)))
    found = match_feed_forward(captured, match_capture(captured))
    _, style, activation, hidden = ZOO_BLOCKS[name]
    torch_sites = blocks_of(through_torch(ZOO[name])).sites
    assert len(found.sites) == len(torch_sites) == 2 and found.refusals == ()
    for site, other in zip(found.sites, torch_sites, strict=True):
        assert (site.style, site.activation.name, site.hidden) == (style, activation, hidden)
        assert site.name.endswith(other.name) and site.layer == other.layer
        assert np.array_equal(site.up.columns, other.up.columns)
        assert site.replay_error < REPLAY_LIMIT


def test_a_recording_grows_by_two_values_for_each_block(zoo_onnx: Callable[..., Path]) -> None:
    from passes.match.feed_forward_blocks import blocks, recorded_values

    captured = onnx_file.capture(onnx_load.load(zoo_onnx(ZOO["bert-sdpa"], "dynamo18")))
    assert len(blocks(captured.flow)) == 2 and len(recorded_values(captured.flow)) <= 4


# ------------------------------------------------------------------ blocks of every make


def features(tokens: int = 5) -> Tensor:
    return torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(1))


def find(module: nn.Module, *inputs: Tensor) -> FeedForwards:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return find_feed_forward(torch_export.capture(module.eval(), inputs or (features(),), {}).flow)


def only(found: FeedForwards) -> FeedForwardSite:
    assert found.refusals == ()
    (site,) = found.sites
    return site


class Plain(nn.Module):
    """``x + scale * W2·act(W1·norm(x))`` with dropout on the way."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu, hidden: int = 24, scale: float = 1.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, hidden), nn.Linear(hidden, 16)
        self.act, self.dropout, self.scale = act, nn.Dropout(0.1), scale

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.act(self.up(self.norm(x))))
        return x + self.dropout(self.down(hidden)) * self.scale


class Gated(nn.Module):
    """Gate and up as the pieces that `split` cuts one projection into."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor]], bias: bool = True) -> None:
        super().__init__()
        self.both, self.down, self.split = nn.Linear(16, 48, bias=bias), nn.Linear(24, 16), split

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.split(self.both(x))
        return x + self.down(F.silu(gate) * up)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu2": lambda x: torch.where(x > 0, x, torch.zeros_like(x)).square(),
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "leaky_relu": F.leaky_relu,
}


def test_every_named_activation_is_told_apart() -> None:
    assert set(ACTIVATIONS) == set(NONLINEARITIES) - {"identity"}
    assert {name: only(find(Plain(act))).activation.name for name, act in ACTIVATIONS.items()} == {
        name: name for name in ACTIVATIONS
    }


def test_named_functions_are_what_torch_computes() -> None:
    x = torch.linspace(-9, 9, 401, dtype=torch.float64)
    for name, act in ACTIVATIONS.items():
        assert np.abs(NONLINEARITIES[name](x.numpy()) - act(x).numpy()).max() < 2e-6, name
    assert np.abs(erf(x.numpy()) - torch.erf(x).numpy()).max() < 2e-7


def test_an_activation_without_a_name_is_the_program_itself() -> None:
    def snake(x: Tensor) -> Tensor:
        return x + torch.sin(x).square()

    class Snake(Gated):
        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.split(self.both(x))
            return x + self.down(up * snake(gate))

    for module in (Plain(snake), Snake(lambda p: (p[..., :24], p[..., 24:]))):
        site = only(find(module))
        points = np.linspace(-3, 3, 1001).reshape(7, 143)
        assert site.activation.name is None and site.activation.of is not None
        assert np.abs(site.activation.of(points) - (points + np.sin(points) ** 2)).max() < 1e-5
        assert site.replay_error < REPLAY_LIMIT


SPLITS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], list[int], list[int]]] = {
    "gate first": (lambda p: p.chunk(2, -1), list(range(24)), list(range(24, 48))),
    "up first": (lambda p: p.chunk(2, -1)[::-1], list(range(24, 48)), list(range(24))),
    "interleaved": (lambda p: (p[..., ::2], p[..., 1::2]), list(range(0, 48, 2)), list(range(1, 48, 2))),
    "pairs": (lambda p: p.unflatten(-1, (24, 2)).unbind(-1), list(range(0, 48, 2)), list(range(1, 48, 2))),
}


@pytest.mark.parametrize("name", SPLITS)
def test_one_projection_may_hold_gate_and_up_in_any_order(name: str) -> None:
    split, gate, up = SPLITS[name]
    site = only(find(Gated(split)))
    assert site.gate is not None and site.style == FUSED
    assert (site.gate.columns.tolist(), site.up.columns.tolist()) == (gate, up)


def test_a_bias_behind_the_split_is_the_projections() -> None:
    class Late(Gated):
        def __init__(self) -> None:
            super().__init__(lambda p: p.chunk(2, -1), bias=False)
            self.late = nn.Parameter(torch.zeros(24))

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.split(self.both(x))
            return x + self.down(F.silu(gate) * (up + self.late))

    site = only(find(Late()))
    index = site.up.projection.bias_index
    assert index is not None and index.tolist() == [-1] * 24 + list(range(24))
    assert site.replay_error < REPLAY_LIMIT


def test_scaling_and_other_branches_stand_outside() -> None:
    assert only(find(Plain(F.gelu, scale=0.5))).replay_error < REPLAY_LIMIT

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix, self.up, self.down = (
                nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return x + self.mix(h) + self.down(F.relu(self.up(h)))

    assert only(find(Parallel())).hidden == 24


def test_a_program_that_is_nothing_but_a_block_is_one() -> None:
    site = only(find(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))))
    assert site.residual is None and site.name.startswith("feed_forward.")


def test_blocks_that_share_their_weights_are_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Plain(F.gelu)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    found = find(Twice())
    assert [s.name for s in found.sites] == ["block", "block#1"] and found.refusals == ()


# ------------------------------------------------------------------ refused, or not mentioned


class NormInside(Plain):
    def __init__(self) -> None:
        super().__init__(F.gelu)
        self.inner = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(self.act(self.up(x))))


class ReadElsewhere(Plain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.act(self.up(x))
        return x + self.down(hidden), hidden.mean(-1)


class SharedWeight(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x))) + F.linear(x.cumsum(1), self.up.weight).sum(-1, keepdim=True)


class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(16, 24, 3, padding=1), nn.Conv1d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x + self.down(F.relu(self.up(x)))


class DepthwiseInside(Plain):
    def __init__(self) -> None:
        super().__init__(F.gelu)
        self.depthwise = nn.Conv1d(24, 24, 3, padding=1, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.depthwise(self.up(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(mixed))


class OverTokensInside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)).cumsum(1))


class PerFeature(Plain):
    def __init__(self) -> None:
        super().__init__(nn.PReLU(24))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return x + self.down(torch.where(hidden > 0, hidden, hidden * self.act.weight))  # type: ignore[attr-defined]


class NoProduct(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.split(self.both(x))
        return x + self.down(torch.maximum(gate, up))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm inside": (NormInside, "a norm stands between"),
    "hidden features read": (ReadElsewhere, "read outside of it"),
    "a shared weight": (SharedWeight, "read by something else"),
    "convolutions": (OneDimensional, "are convolutions"),
    "a depthwise convolution": (DepthwiseInside, "a convolution over tokens"),
    "a sum over tokens": (OverTokensInside, "not elementwise"),
    "a number for each feature": (PerFeature, "of its own for each feature"),
    "no product": (lambda: NoProduct(lambda p: p.chunk(2, -1)), "otherwise than by a product"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_like_a_block_and_is_none_is_refused(name: str) -> None:
    build, reason = REFUSED[name]
    found = find(build())
    assert found.sites == () and len(found.refusals) == 1
    assert reason in found.refusals[0].reason


@pytest.mark.parametrize("name", ["router", "gpt-oss-eager", "deepseek-v3-sdpa"])
def test_mixtures_of_experts_are_named_as_such(name: str) -> None:
    reasons = {r.reason for r in blocks_of(through_torch(ZOO[name])).refusals}
    assert len(reasons) == 1 and "a mixture" in reasons.pop()


class Head(nn.Module):
    """A classifier of two layers on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.dense(x)))


class NoResidual(nn.Module):
    """A projector, as stands between a vision tower and a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)))))


class OverTokens(nn.Module):
    """The first half of an MLP-Mixer's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(5, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class LowRank(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(self.up(x)) * 2)


SILENT: dict[str, Callable[[], nn.Module]] = {
    "head": Head,
    "adapter": lambda: Plain(hidden=4),
    "no residual": NoResidual,
    "over tokens": OverTokens,
    "no activation": LowRank,
    "attention": lambda: nn.TransformerEncoderLayer(16, 2, 8, batch_first=True),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_of_what_is_no_block(name: str) -> None:
    assert find(SILENT[name]()) == FeedForwards()


def test_no_block_is_seen_in_an_image_network() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(F.relu(self.first(x)))

    assert find(Residual(), torch.randn(1, 3, 8, 8)) == FeedForwards()


# ------------------------------------------------------------------ controls


def altered(flow: Flow, value: Value, change: Callable[[Array], Array]) -> Flow:
    return replace(flow, read=lambda name: change(flow.read(name)) if name == value else flow.read(name))


def test_a_weight_that_is_not_the_recorded_one_does_not_replay() -> None:
    module = Gated(lambda p: p.chunk(2, -1))
    flow = torch_export.capture(module.eval(), (features(),), {}).flow
    site = only(find_feed_forward(flow))
    for projection in (site.up.projection, site.down):
        for value in (projection.weight, projection.bias):
            assert value is not None
            found = find_feed_forward(altered(flow, value, lambda a: a + 0.01))
            assert found.sites == () and "does not replay" in found.refusals[0].reason


def test_a_block_that_differs_at_a_second_size_is_refused() -> None:
    module = Gated(lambda p: p.chunk(2, -1)).eval()
    first, second = (find_feed_forward(torch_export.capture(module, (features(n),), {}).flow) for n in (5, 7))
    assert confirm_feed_forward(first, second).sites == (
        replace(first.sites[0], replay_error=max(s.sites[0].replay_error for s in (first, second))),
    )
    site = second.sites[0]
    turned = HiddenInput(site.up.projection, site.up.columns[::-1])
    other_activation = replace(site.activation, name="gelu")
    for changed in (replace(site, up=turned), replace(site, activation=other_activation)):
        refused = confirm_feed_forward(first, replace(second, sites=(changed,)))
        assert refused.sites == () and "differs from one size" in refused.refusals[0].reason
    assert confirm_feed_forward(first, FeedForwards()).sites == ()


# ------------------------------------------------------------------ files as optimisers leave them


def written(tmp_path: Path, nodes: list[onnx.NodeProto], hidden: int, **weights: Array) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 16])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def matrices(hidden: int = 24) -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {
        "w1": random.normal(size=(16, hidden)) * 0.3, "b1": random.normal(size=hidden) * 0.3,
        "w2": random.normal(size=(hidden, 16)) * 0.3, "b2": random.normal(size=16) * 0.3,
    }  # fmt: skip


def in_file(path: Path) -> FeedForwards:
    captured = onnx_file.capture(onnx_load.load(path))
    return match_feed_forward(captured, match_capture(captured))


def test_a_fused_bias_and_activation_are_read(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["u"]),
        helper.make_node("BiasGelu", ["u", "b1"], ["h"], domain="com.microsoft"),
        helper.make_node("MatMul", ["h", "w2"], ["p"]),
        helper.make_node("Add", ["p", "b2"], ["o"]),
        helper.make_node("Add", ["o", "x"], ["y"]),
    ]
    site = only(in_file(written(tmp_path, nodes, 24, **matrices())))
    assert (site.activation.name, site.up.projection.bias, site.down.bias) == ("gelu", "b1", "b2")
    assert site.name == "feed_forward.0" and site.replay_error < REPLAY_LIMIT


def test_weights_of_eight_bits_are_read(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"]),
        helper.make_node("Add", ["m", "b1"], ["u"]),
        helper.make_node("Relu", ["u"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["p"]),
        helper.make_node("Add", ["p", "b2"], ["o"]),
        helper.make_node("Add", ["o", "x"], ["y"]),
    ]
    source, out = written(tmp_path, nodes, 24, **matrices()), tmp_path / "int8.onnx"
    quantize_dynamic(source, out, weight_type=QuantType.QInt8)
    site = only(in_file(out))
    assert site.activation.name == "relu" and site.hidden == 24 and site.replay_error < 6e-2


# ------------------------------------------------------------------ what a person sees


def test_inspect_lists_blocks_beside_attentions() -> None:
    found = rewriter.inspect(ZOO["llama-gqa-sdpa"].build())
    rows = found.to_dict()["sites"]
    assert [(r["layer"], r["kind"]) for r in rows] == [(i, k) for i in (0, 1) for k in ("attention", "feed_forward")]
    assert len({frozenset(r) for r in rows}) == 1, "rows of both kinds have the same keys"
    block = rows[1]
    assert block["status"] == "rewritable" and block["heads"] is None and block["causal"] is None
    assert block["layout"] == f"gated, silu, {WIDTH} → {INNER} → {WIDTH}"
    assert block["targets"] == ["gau:pair", "flash-quad:pair", "flash:pair"]
    assert len(found.sites) == 2 and len({r["name"] for r in rows}) == 4


def test_selectors_of_attentions_do_not_see_blocks() -> None:
    model = ZOO["nanogpt-sdpa"].build()
    inputs = ZOO["nanogpt-sdpa"].inputs(2, 7, 0)
    report = rewriter.optimize(model, "mqa", layers="all", example_inputs=inputs).rewrite_report
    assert [row.name for row in report.sites] == ["h.0.attn", "h.1.attn"] and report.refused == ()
    with pytest.raises(rewriter.NothingToRewrite):
        rewriter.optimize(ZOO["mlp"].build(), "mqa", example_inputs=ZOO["mlp"].inputs(2, 7, 0))
