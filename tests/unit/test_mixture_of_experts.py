"""The mixture of experts: torch and ONNX bodies against the float64 oracle, over routings, sizes and opsets.

A choice between two nearly equal probabilities may fall differently in float32: problems whose choices are that close
are left out, and ties are tested where they are exact.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from codegen.ops.mixture_of_experts import microsoft_moe, torch_body
from codegen.ops.mixture_of_experts.onnx_body import DOMAIN, attributes, function, function_name, stored_as
from codegen.ops.mixture_of_experts.reference import mixture_of_experts as oracle
from codegen.spec import Activation, MixtureOfExperts, Routing
from tests.covering import covering

Array = NDArray[Any]
CLOSE = 3e-6
"""Largest difference in float32, relative to the largest number of the oracle's answer."""

APART = 1e-5
"""How far two probabilities must be apart for float32 to order them as float64 does."""

ROUTINGS = {routing.value: routing for routing in Routing}


@st.composite
def problems(draw: st.DrawFn) -> tuple[MixtureOfExperts, int, int]:
    """(spec, batch, length)"""
    experts = draw(st.integers(1, 6))
    routing = draw(st.sampled_from(Routing))
    spec = MixtureOfExperts(
        hidden=draw(st.integers(1, 12)),
        expert_hidden=draw(st.integers(1, 12)),
        experts=experts,
        routing=routing,
        activation=draw(st.sampled_from(Activation)),
        capacity_factor=draw(st.sampled_from([0.25, 0.5, 1.0, 1.7, 8.0])),
        min_capacity=draw(st.integers(1, 4)),
        group_limit=draw(st.sampled_from([5, 16, 4096])),
        selected=draw(st.integers(1, min(experts, 3))) if routing is Routing.TOKENS_CHOOSE else 1,
        gated=draw(st.booleans()),
        router_bias=draw(st.booleans()),
        up_bias=draw(st.booleans()),
        down_bias=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    return spec, draw(st.integers(1, 3)), draw(st.integers(1, 30))


def operands(spec: MixtureOfExperts, batch: int, length: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (batch, length, spec.hidden), **spec.shapes}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def undecided(spec: MixtureOfExperts, feeds: dict[str, Array]) -> bool:
    """Whether any two probabilities that the routing depends on are too close for float32."""
    logits = feeds["x"].reshape(-1, spec.hidden).astype(np.float64) @ feeds["router_weight"]
    logits = logits + feeds.get("router_bias", 0)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    groups = np.split(probabilities, spec.groups(len(probabilities)))
    if spec.experts == 1:
        return False
    if spec.routing is Routing.TOKENS_CHOOSE:
        gaps = [np.diff(np.sort(probabilities, axis=1)), *(np.diff(np.sort(g.max(axis=1))) for g in groups)]
        return any(bool((gap < APART).any()) for gap in gaps)
    last = spec.capacity(len(groups[0]))
    ordered = [-np.sort(-g, axis=0) for g in groups]
    return last < len(groups[0]) and any(bool((g[last - 1] - g[last] < APART).any()) for g in ordered)


def distance(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def tensors(feeds: dict[str, Array], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(dtype) for name, array in feeds.items()}


# ------------------------------------------------------------------ the oracle itself


def test_experts_take_the_tokens_that_want_them_most() -> None:
    """Four tokens, two experts with room for one token each; the gate is the raw probability."""
    spec = MixtureOfExperts(2, 1, 2, capacity_factor=0.5, min_capacity=1, router_bias=False, activation=Activation.RELU)
    x = np.array([[[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.0, 3.0]]])
    feeds = operands(spec, 1, 4) | {"router_weight": np.eye(2)}
    found = oracle(spec, **{**feeds, "x": x})
    expected = np.zeros((4, 2))
    expected[0, 0] = np.exp(2) / (np.exp(2) + 1)
    expected[3, 1] = np.exp(3) / (np.exp(3) + 1)
    assert distance(found.gates[0], expected) < 1e-12
    assert not found.output[0, 1:3].any() and found.output[0, 0].any()  # nobody took the tokens in the middle
    assert found.balance == 0


def test_tokens_that_are_surer_are_served_first() -> None:
    """All three want expert 0, which has room for two: the last comes before the first."""
    spec = MixtureOfExperts(
        2, 1, 2, Routing.TOKENS_CHOOSE, capacity_factor=4 / 3, min_capacity=1, router_bias=False, bias=True
    )
    x = np.array([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]])
    feeds = operands(spec, 1, 3) | {"router_weight": np.eye(2)}
    assert spec.capacity(3) == 2
    found = oracle(spec, **{**feeds, "x": x})
    assert list(found.gates[0, :, 0] > 0) == [False, True, True] and not found.gates[0, :, 1].any()
    assert np.array_equal(found.output[0, 0], feeds["bias"].astype(np.float64))  # routed nowhere: the common bias only
    swapped = oracle(replace(spec, selected=2), **{**feeds, "x": x})
    assert list(swapped.gates[0, :, 1] > 0) == [False, True, True]  # second choices, in the same order


def test_losses_are_the_papers() -> None:
    """Perfect balance gives 1, all tokens at one expert give its mean probability times the number of experts."""
    spec = MixtureOfExperts(2, 3, 2, Routing.TOKENS_CHOOSE, router_bias=False)
    feeds = operands(spec, 1, 4) | {"router_weight": np.eye(2)}
    even = np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    assert oracle(spec, **{**feeds, "x": even}).balance == pytest.approx(1.0, rel=1e-12)
    uneven = np.array([[[1.0, 0.0]] * 4])
    probability = np.e / (np.e + 1)
    found = oracle(spec, **{**feeds, "x": uneven})
    assert found.balance == pytest.approx(2 * probability, rel=1e-12)
    assert found.z == pytest.approx(np.log(np.e + 1) ** 2, rel=1e-12)


def test_sizes_are_those_of_the_papers_code() -> None:
    base = MixtureOfExperts(512, 2048, 16)
    assert [base.capacity(n) for n in (3, 16, 64, 72, 88, 512, 4096)] == [3, 4, 4, 4, 6, 32, 256]  # half to even
    assert replace(base, capacity_factor=0.5).capacity(512) == 16
    assert [base.groups(n) for n in (1, 4096, 8192, 4098, 10_000)] == [1, 1, 2, 2, 4]
    assert base.groups(4099) == 4099  # a prime number of tokens divides into single ones only
    matrices = 512 * 16 + 16 + 16 * (2 * 512 * 2048 + 512 + 2048)
    assert sum(int(np.prod(shape)) for shape in base.shapes.values()) == matrices
    assert base.flops(512) == 2 * 512 * (512 * 16 + 512 * 2048 * 2)


def test_broken_specs_and_operands_are_refused() -> None:
    for wrong in (
        {"hidden": 0},
        {"capacity_factor": 0.0},
        {"capacity_factor": float("inf")},
        {"selected": 2},
        {"selected": 5, "routing": Routing.TOKENS_CHOOSE},
        {"group_limit": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MixtureOfExperts(**{"hidden": 4, "expert_hidden": 4, "experts": 4, **wrong})  # type: ignore[arg-type]
    spec = MixtureOfExperts(4, 6, 2)
    feeds = operands(spec, 1, 3)
    without = {name: array for name, array in feeds.items() if name != "up_bias"}
    for broken in (without, feeds | {"x": feeds["x"][0]}, feeds | {"bias": feeds["x"][0, 0]}):
        with pytest.raises(ValueError, match="contradict"):
            oracle(spec, **broken)
        with pytest.raises(ValueError, match="contradict"):
            torch_body.mixture_of_experts(spec, **tensors(broken))


# ------------------------------------------------------------------ torch


@given(problem=problems(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_torch_body_equals_the_oracle(problem: tuple[MixtureOfExperts, int, int], seed: int) -> None:
    spec, batch, length = problem
    feeds = operands(spec, batch, length, seed)
    assume(not undecided(spec, feeds))
    expected = oracle(spec, **feeds)
    found = torch_body.routed(spec, **tensors(feeds))
    assert distance(found.output.numpy(), expected.output) < CLOSE
    assert float(found.balance) == pytest.approx(expected.balance, rel=1e-5, abs=1e-6)
    assert float(found.z) == pytest.approx(expected.z, rel=1e-5)
    unused = 1 - (expected.gates > 0).any(-1).mean()
    assert float(found.left_behind) == pytest.approx(unused, abs=1e-6)
    if expected.gates.any():  # the control: gates that are off by a hundredth
        scaled = oracle(replace(spec, bias=False), **{n: a for n, a in feeds.items() if n != "bias"}).output / 100
        if distance(expected.output + scaled, expected.output) > 1e-4:
            assert distance(found.output.numpy(), expected.output + scaled) > 1e-5


@pytest.mark.parametrize("routing", Routing, ids=list(ROUTINGS))
def test_exact_ties_go_to_the_lower_token_and_expert(routing: Routing) -> None:
    """A router of zeros finds everything equal, whatever the tokens are."""
    spec = MixtureOfExperts(5, 7, 3, routing, capacity_factor=0.4, min_capacity=1, selected=1)
    feeds = operands(spec, 2, 10) | {
        "router_weight": np.zeros((5, 3), np.float32),
        "router_bias": np.zeros(3, np.float32),
    }
    expected = oracle(spec, **feeds)
    capacity = spec.capacity(20)
    used = np.argwhere(expected.gates.reshape(20, 3) > 0)
    chosen = [(t, e) for t in range(capacity) for e in range(3 if routing is Routing.EXPERTS_CHOOSE else 1)]
    assert [tuple(int(n) for n in pair) for pair in used] == chosen
    assert distance(torch_body.mixture_of_experts(spec, **tensors(feeds)).numpy(), expected.output) < CLOSE
    for opset in (12, 18):
        assert distance(run(model(spec, opset), feeds), expected.output) < CLOSE


@pytest.mark.parametrize("routing", Routing, ids=list(ROUTINGS))
def test_gradients_are_those_of_finite_differences(routing: Routing) -> None:
    """The losses' too; the router learns through the gates."""
    spec = MixtureOfExperts(3, 4, 3, routing, min_capacity=2, gated=True, bias=True)
    feeds = {name: t.requires_grad_() for name, t in tensors(operands(spec, 1, 7), torch.float64).items()}

    def call(*given_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch_body.routed(spec, **dict(zip(feeds, given_, strict=True)))
        return found.output, found.loss

    assert torch.autograd.gradcheck(call, tuple(feeds.values()))
    call(*feeds.values())[0].sum().backward()
    grad = feeds["router_weight"].grad
    assert grad is not None and bool(grad.abs().max() > 1e-3)


def test_training_balances_a_router_that_sends_all_to_one() -> None:
    """The auxiliary loss does what it is for."""
    spec = MixtureOfExperts(6, 8, 4, Routing.TOKENS_CHOOSE)
    feeds = tensors(operands(spec, 4, 32))
    feeds["router_bias"] = torch.tensor([4.0, 0.0, 0.0, 0.0]).requires_grad_()
    optimiser = torch.optim.Adam([feeds["router_bias"]], lr=0.25)
    before = torch_body.routed(spec, **feeds).balance.item()
    for _ in range(25):
        optimiser.zero_grad()
        torch_body.routed(spec, **feeds).balance.backward()
        optimiser.step()
    after = torch_body.routed(spec, **feeds).balance.item()
    assert before > 1.8 and after < 1.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("routing", Routing, ids=list(ROUTINGS))
def test_half_precisions_route_in_float32(routing: Routing, dtype: torch.dtype) -> None:
    spec = MixtureOfExperts(16, 24, 4, routing)
    feeds = tensors(operands(spec, 2, 20), dtype)
    found = torch_body.mixture_of_experts(spec, **feeds)
    assert found.dtype == dtype
    expected = oracle(spec, **{name: t.float().numpy() for name, t in feeds.items()})
    assert distance(found.float().numpy(), expected.output) < 2e-2


@pytest.mark.parametrize("routing", Routing, ids=list(ROUTINGS))
def test_a_captured_graph_takes_any_length(routing: Routing) -> None:
    spec = MixtureOfExperts(6, 8, 3, routing, min_capacity=2)
    feeds = operands(spec, 2, 10, seed=1)
    parameters = {name: t for name, t in tensors(feeds).items() if name != "x"}

    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_body.mixture_of_experts(spec, x, **parameters)

    tokens = torch.export.Dim("tokens", min=2, max=1024)
    program = torch.export.export(Block(), (torch.from_numpy(feeds["x"]),), dynamic_shapes=({1: tokens},))
    for length in (10, 17, 64):
        x = operands(spec, 2, length)["x"]
        assert not undecided(spec, feeds | {"x": x})
        expected = oracle(spec, **feeds | {"x": x}).output
        assert distance(program.module()(torch.from_numpy(x)).detach().numpy(), expected) < CLOSE


# ------------------------------------------------------------------ ONNX


def model(spec: MixtureOfExperts, opset: int, dtype: ir.DataType = ir.DataType.FLOAT, by: Any = None) -> bytes:
    """One call of the function (or of another: with its inputs' shapes and a call's attributes), on x of any size;
    parameters are inputs."""
    body, shapes, described = by or (function(spec, opset), spec.shapes, attributes(dtype))

    def value(name: str, shape: tuple[Any, ...], kind: ir.DataType) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))

    x = value("x", (None, None, spec.hidden), dtype)
    held = [value(name, shape, stored_as(name, dtype)) for name, shape in shapes.items()]
    node = ir.Node(DOMAIN, body.name, [x, *held], described, num_outputs=1)
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", ir.TensorType(dtype), ir.Shape([None, None, spec.hidden])
    opsets = {"": opset, DOMAIN: 1} | body.opset_imports
    graph = ir.Graph([x, *held], [output], nodes=[node], name="g", opset_imports=opsets)
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=8, functions=[body]))
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def run(content: bytes, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


ROOMS = {"experts choose": 1.0, "tokens choose": 1.0, "tokens choose, all served": 4.0}
"""Capacity factors for four experts."""


@pytest.mark.parametrize(("case", "opset"), covering(tuple(ROOMS), (12, 13, 15, 16, 18, 21, 24)))
def test_the_function_equals_the_oracle_at_every_opset(case: str, opset: int) -> None:
    routing = Routing.EXPERTS_CHOOSE if case == "experts choose" else Routing.TOKENS_CHOOSE
    more = {"selected": 2 if routing is Routing.TOKENS_CHOOSE else 1, "capacity_factor": ROOMS[case]}
    spec = MixtureOfExperts(6, 9, 4, routing, group_limit=30, gated=True, bias=True, **more)  # type: ignore[arg-type]
    assert spec.drops_nothing == (case == "tokens choose, all served")
    content = model(spec, opset)
    for length in (1, 2, 7, 16, 31, 40):
        feeds = operands(spec, 2, length, seed=length)
        assert not undecided(spec, feeds)
        expected = oracle(spec, **feeds).output
        assert distance(run(content, feeds), expected) < CLOSE
        moved = feeds | {"router_weight": np.roll(feeds["router_weight"], 1, axis=1)}
        assert distance(run(content, moved), expected) > 1e-3  # the control: other experts


@given(problem=problems(), opset=st.sampled_from([13, 17]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_function_equals_the_oracle_at_any_size(
    problem: tuple[MixtureOfExperts, int, int], opset: int, seed: int
) -> None:
    spec, batch, length = problem
    feeds = operands(spec, batch, length, seed)
    assume(not undecided(spec, feeds))
    assert distance(run(model(spec, opset), feeds), oracle(spec, **feeds).output) < CLOSE


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("routing", Routing, ids=list(ROUTINGS))
def test_half_precision_files_route_in_float32(routing: Routing, opset: int) -> None:
    spec = MixtureOfExperts(8, 12, 4, routing)
    dtype = ir.DataType.FLOAT16
    feeds = operands(spec, 2, 20)
    feeds = {n: a.astype(np.float16 if n == "x" else stored_as(n, dtype).numpy()) for n, a in feeds.items()}
    found = run(model(spec, opset, dtype), feeds)
    assert found.dtype == np.float16
    assert distance(found.astype(np.float64), oracle(spec, **feeds).output) < 1e-2


FUSED = {Activation.GELU: "Gelu", Activation.GELU_TANH: "FastGelu", Activation.SILU: "QuickGelu"}


@pytest.mark.parametrize("opset", [12, 21])
@pytest.mark.parametrize("activation", FUSED, ids=[a.value for a in FUSED])
def test_the_runtime_finds_one_operator_in_what_an_activation_is_spelled_as(
    activation: Activation, opset: int, tmp_path: Path
) -> None:
    """Each of the passes it is spelled as goes over all features inside. The control: not optimised they are there."""

    def operators(level: ort.GraphOptimizationLevel) -> set[str]:
        spec = MixtureOfExperts(6, 9, 2, Routing.EXPERTS_CHOOSE, activation=activation)
        options = ort.SessionOptions()
        options.graph_optimization_level, options.log_severity_level = level, 3
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        ort.InferenceSession(model(spec, opset), options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}

    spelled, found = {"Erf", "Tanh", "Sigmoid"}, operators(ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    assert FUSED[activation] in found and not found & spelled
    assert operators(ort.GraphOptimizationLevel.ORT_DISABLE_ALL) & spelled


def test_the_portable_evaluator_agrees() -> None:
    from onnx.reference import ReferenceEvaluator

    for routing in Routing:
        spec = MixtureOfExperts(4, 5, 3, routing, activation=Activation.SILU)
        feeds = operands(spec, 1, 9)
        found = ReferenceEvaluator(onnx.load_from_string(model(spec, 18))).run(None, feeds)[0]
        assert distance(np.asarray(found), oracle(spec, **feeds).output) < CLOSE


def test_names_differ_where_specs_do() -> None:
    base = MixtureOfExperts(4, 5, 3)
    others = [
        replace(base, capacity_factor=0.5),
        replace(base, gated=True),
        replace(base, routing=Routing.TOKENS_CHOOSE),
    ]
    assert len({function_name(spec) for spec in (base, *others)}) == 4
    assert function_name(base).startswith("mixture_experts_choose_gelu_tanh_e3_")


# ------------------------------------------------------------------ onnxruntime's own operator


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", microsoft_moe.ACTIVATIONS, ids=[a.value for a in microsoft_moe.ACTIVATIONS])
def test_the_runtimes_own_operator_computes_what_it_is_said_to_fit(activation: Activation, gated: bool) -> None:
    for selected in (1, 2):
        spec = MixtureOfExperts(
            8, 12, 4, Routing.TOKENS_CHOOSE, activation, capacity_factor=4.0, selected=selected, min_capacity=1,
            gated=gated, router_bias=selected == 1, up_bias=selected == 2, down_bias=selected == 1, bias=selected == 2,
        )  # fmt: skip
        feeds = operands(spec, 2, 10)
        if gated and activation is not Activation.SILU:
            assert microsoft_moe.why_not(spec) == f"on CPUs its gate is silu's, not {activation.value}'s"
            continue
        held = microsoft_moe.stored(spec, {n: a for n, a in feeds.items() if n != "x"})
        shapes = {n: a.shape for n, a in held.items()}
        content = model(spec, 18, by=(microsoft_moe.function(spec, 18), shapes, []))
        found = run(content, {"x": feeds["x"], **held})
        assert distance(found, oracle(spec, **feeds).output) < CLOSE
        tight = replace(spec, capacity_factor=0.5)  # the control: a capacity that it does not have
        assert distance(found, oracle(tight, **feeds).output) > 1e-2


def test_the_runtimes_own_operator_is_refused_elsewhere() -> None:
    fits = MixtureOfExperts(8, 12, 4, Routing.TOKENS_CHOOSE, capacity_factor=4.0)
    assert microsoft_moe.why_not(fits) is None
    for spec, reason in (
        (replace(fits, capacity_factor=3.9), "capacity"),
        (replace(fits, routing=Routing.EXPERTS_CHOOSE), "capacity"),
        (replace(fits, activation=Activation.GELU), "gelu"),
        (replace(fits, gated=True), "gate"),
    ):
        with pytest.raises(ValueError, match=reason):
            microsoft_moe.function(spec, 18)
    assert "float16" in (microsoft_moe.why_not(fits, ir.DataType.FLOAT16) or "")
