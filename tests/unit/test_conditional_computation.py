"""Soft top-k, conditional feed-forward and attention: properties, torch bodies against float64 oracles, work saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from codegen.conditional import ConditionalAttention, ConditionalFeedForward, Router
from codegen.ops.conditional_attention import reference as attention_oracle
from codegen.ops.conditional_attention import torch_body as attention_body
from codegen.ops.conditional_feed_forward import reference as block_oracle
from codegen.ops.conditional_feed_forward import torch_body as block_body
from codegen.ops.conditional_routing import reference as routing_oracle
from codegen.ops.conditional_routing import torch_body as routing_body
from codegen.spec import Activation

QUARTER = Router(fraction=1 / 4)
BLOCK = ConditionalFeedForward(12, 6, 20, QUARTER)
ATTENTION = ConditionalAttention(
    12, 4, 1, 3, queries=QUARTER, keys=Router(fraction=1 / 2), radius=3, buckets=8, farthest=6
)
SPECS = [
    pytest.param(BLOCK, id="gated"),
    pytest.param(replace(BLOCK, gated=False, activation=Activation.RELU, router=Router(1.0)), id="plain-all-routed"),
    pytest.param(replace(BLOCK, up_bias=True, down_bias=True), id="gated-with-biases"),
    pytest.param(replace(BLOCK, gated=False, up_bias=True), id="plain-with-inner-biases"),
    pytest.param(ATTENTION, id="attention"),
    pytest.param(replace(ATTENTION, bias=True, output_bias=True), id="attention-with-biases"),
    pytest.param(replace(ATTENTION, buckets=0, radius=0, scale=0.5), id="attention-without-bias"),
    pytest.param(replace(ATTENTION, radius=40, light_heads=2), id="attention-wider-than-long"),
]
Conditional = ConditionalFeedForward | ConditionalAttention


def bodies(spec: Conditional) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    if isinstance(spec, ConditionalFeedForward):
        return block_oracle.conditional_feed_forward, block_body.conditional_feed_forward
    return attention_oracle.conditional_attention, attention_body.conditional_attention


def problem(spec: Conditional, tokens: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(tokens)
    x = torch.randn(2, tokens, spec.hidden, dtype=dtype)
    return x, {name: torch.randn(shape, dtype=dtype) * 0.5 for name, shape in spec.shapes.items()}


def expected(spec: Conditional, x: Tensor, held: dict[str, Tensor], shown: Tensor | None, *, soft: bool) -> Any:
    arrays = {name: p.detach().numpy() for name, p in held.items()}
    return bodies(spec)[0](spec, x.detach().numpy(), None if shown is None else shown.numpy(), soft=soft, **arrays)


# ------------------------------------------------------------------ soft top-k


@pytest.mark.parametrize("tokens", [pytest.param(n, id=f"{n}-tokens") for n in (1, 16, 100)])
def test_soft_weights_lie_between_zero_and_one_and_add_up_to_k(tokens: int) -> None:
    router, scores = Router(fraction=1 / 8), torch.randn(5, tokens, dtype=torch.float64) * 2
    found = routing_body.soft_top_k(router, scores)
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())
    assert torch.allclose(found.sum(-1), torch.full((5,), float(router.budget(tokens)), dtype=found.dtype), rtol=0.02)
    assert np.allclose(found.numpy(), routing_oracle.soft_top_k(router, scores.numpy()), atol=1e-12)
    order = scores.argsort(dim=-1)
    assert bool((found.gather(-1, order).diff(dim=-1) >= -1e-12).all())  # a higher score never weighs less
    if tokens > 1:  # the control: a softmax of weight k does not keep below 1
        assert not bool((router.budget(tokens) * (3 * scores).softmax(-1) <= 1).all())


def test_soft_becomes_hard_as_the_temperature_falls() -> None:
    scores = torch.tensor([[0.9, -1.0, 0.2, 2.0, 0.5, -0.3, 1.4, 0.0]], dtype=torch.float64)
    hard = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)

    def error(epsilon: float, iterations: int) -> float:
        found = routing_body.soft_top_k(Router(1 / 4, epsilon, iterations), scores)
        return (found - hard).abs().max().item()

    errors = [error(1.0, 50), error(0.1, 500), error(0.01, 5000)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[0] > 0.1 and errors[2] < 5e-4
    assert error(0.01, 1) > 0.1  # the control: a low temperature takes its iterations


def test_gradients_flow_through_the_soft_selection_only() -> None:
    scores = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: routing_body.soft_top_k(QUARTER, s), (scores,))
    shown = torch.arange(8).expand(2, 8) < 6
    assert torch.autograd.gradcheck(lambda s: routing_body.soft_top_k(QUARTER, s, shown), (scores,))
    assert routing_body.chosen(QUARTER, scores, soft=True).weight.requires_grad
    assert not routing_body.chosen(QUARTER, scores).weight.requires_grad


def test_who_is_routed() -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0, -1.0, 0.5, 0.25] * 2])
    hard = routing_body.chosen(QUARTER, scores)
    assert hard.index.tolist() == [[1, 3, 9, 11]] and hard.weight.tolist() == [[1.0] * 4]
    ties = torch.arange(4096)[None] % 2 / 2  # long enough for a sort that is not stable to show
    assert routing_body.chosen(QUARTER, ties).index.tolist() == [list(range(1, 2048, 2))]
    soft = routing_body.chosen(QUARTER, scores, soft=True)
    assert soft.index.tolist() == [[1, 3, 9, 11, 4]]  # 9 / 8 times 4, rounded up
    assert routing_body.chosen(replace(QUARTER, surplus=1.0), scores, soft=True).index.shape == (1, 4)
    shown = torch.ones_like(scores, dtype=torch.bool)
    shown[:, [1, 9]] = False
    assert routing_body.chosen(QUARTER, scores, shown).index.tolist() == [[3, 11, 4, 12]]
    nobody = routing_body.chosen(QUARTER, scores, torch.zeros_like(shown), soft=True)
    assert nobody.weight.tolist() == [[0.0] * 5]


def test_impossible_specs_are_refused() -> None:
    for wrong in ({"fraction": 0.0}, {"fraction": 1.5}, {"epsilon": 0.0}, {"iterations": 0}, {"surplus": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(QUARTER, **wrong)  # type: ignore[arg-type]
    for given, wrong in (
        (BLOCK, {"light": 0}),
        (ATTENTION, {"heavy_heads": 0}),
        (ATTENTION, {"radius": -1}),
        (ATTENTION, {"buckets": 6}),
        (ATTENTION, {"farthest": 2}),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(given, **wrong)  # type: ignore[type-var]


# ------------------------------------------------------------------ both layers


@pytest.mark.parametrize("soft", [pytest.param(False, id="hard"), pytest.param(True, id="soft")])
@pytest.mark.parametrize("spec", SPECS)
def test_torch_computes_what_the_oracle_computes(spec: Conditional, soft: bool) -> None:
    for tokens in (1, 7, 16, 21):
        x, held = problem(spec, tokens, torch.float64)
        shown = torch.arange(tokens) < torch.tensor([[tokens], [(tokens + 2) // 3]])
        for mask in (None, shown):
            found = bodies(spec)[1](spec, x, mask, soft=soft, **held)
            assert np.allclose(found.numpy(), expected(spec, x, held, mask, soft=soft), atol=1e-9)
        narrow = bodies(spec)[1](spec, x.float(), shown, soft=soft, **{n: p.float() for n, p in held.items()})
        assert narrow.dtype == torch.float32
        assert np.allclose(narrow.numpy(), expected(spec, x, held, shown, soft=soft), atol=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(replace(BLOCK, up_bias=True, down_bias=True), id="feed-forward"),
        pytest.param(replace(ATTENTION, bias=True, output_bias=True), id="attention"),
    ],
)
def test_what_the_comparison_would_notice(spec: Conditional) -> None:
    """Controls: each parameter, the mask and the kind of selection change the oracle by more than tolerances."""
    x, held = problem(spec, 16, torch.float64)
    right = expected(spec, x, held, None, soft=True)
    for name in held:
        changed = held | {name: -held[name]}
        assert not np.allclose(expected(spec, x, changed, None, soft=True), right, atol=1e-2), name
    assert not np.allclose(expected(spec, x, held, None, soft=False), right, atol=1e-2)
    shown = torch.arange(16).expand(2, 16) < 9
    assert not np.allclose(expected(spec, x, held, shown, soft=True)[:, :9], right[:, :9], atol=1e-2)


@pytest.mark.parametrize("spec", [pytest.param(BLOCK, id="feed-forward"), pytest.param(ATTENTION, id="attention")])
def test_padding_changes_no_token(spec: Conditional) -> None:
    """But for its count, by which k is told: here it is fixed to the same number."""
    x, held = problem(spec, 16, torch.float64)
    shown = torch.arange(16).expand(2, 16) < 9
    body = bodies(spec)[1]
    one = body(spec, x, shown, soft=True, **held)[:, :9]
    other = torch.where(shown[..., None], x, 5 * torch.randn_like(x))
    assert torch.allclose(body(spec, other, shown, soft=True, **held)[:, :9], one, atol=1e-10)
    assert not torch.allclose(body(spec, other, soft=True, **held)[:, :9], one, atol=1e-2)  # the control


@pytest.mark.parametrize("spec", [pytest.param(BLOCK, id="feed-forward"), pytest.param(ATTENTION, id="attention")])
def test_every_parameter_learns_softly_and_routers_do_not_learn_hard(spec: Conditional) -> None:
    for soft in (True, False):
        x, held = problem(spec, 16, torch.float64)
        held = {name: p.requires_grad_() for name, p in held.items()}
        bodies(spec)[1](spec, x, soft=soft, **held).square().sum().backward()
        without = {name for name, p in held.items() if p.grad is None or not bool(p.grad.any())}
        assert without == (set() if soft else {name for name in held if "router" in name})


@pytest.mark.parametrize("spec", [pytest.param(BLOCK, id="feed-forward"), pytest.param(ATTENTION, id="attention")])
def test_heavy_branches_work_on_routed_tokens_only(spec: Conditional) -> None:
    x, held = problem(spec, 32, torch.float32)
    for soft in (False, True):
        with FlopCounterMode(display=False) as counted:
            bodies(spec)[1](spec, x, soft=soft, **held)
        routers = sum("router" in name for name in held)  # products with vectors, which torch does not count
        assert counted.get_total_flops() == spec.flops(2, 32, soft=soft) - routers * 2 * x.numel()
    assert spec.flops(2, 32) < spec.flops(2, 32, soft=True)
    whole = Router(1.0)
    if isinstance(spec, ConditionalFeedForward):
        assert replace(spec, router=whole).flops(2, 32) > 2 * spec.flops(2, 32)
    else:
        assert replace(spec, queries=whole, keys=whole).flops(2, 32) > 1.4 * spec.flops(2, 32)


def test_operands_that_contradict_the_spec_are_refused() -> None:
    for spec in (BLOCK, ATTENTION):
        x, held = problem(spec, 8, torch.float32)
        first = next(iter(held))
        for given, parameters in (
            (x[..., :-1], held),
            (x, {n: p for n, p in held.items() if n != first}),
            (x, held | {first: held[first][:-1]}),
            (x, held | {"more": x}),
        ):
            with pytest.raises(ValueError, match="contradict"):
                bodies(spec)[1](spec, given, **parameters)
            with pytest.raises(ValueError, match="contradict"):
                bodies(spec)[0](spec, given.numpy(), **{n: p.numpy() for n, p in parameters.items()})


# ------------------------------------------------------------------ attention


def test_local_attention_is_attention_within_the_radius() -> None:
    spec = replace(ATTENTION, buckets=0)
    x, held = problem(spec, 21, torch.float64)
    seen = torch.ones(2, 21, dtype=torch.bool)
    q, k, v = (
        (x @ held[f"light_{role}_weight"]).unflatten(-1, (-1, 4)).transpose(1, 2) for role in ("query", "key", "value")
    )
    distance = (torch.arange(21)[:, None] - torch.arange(21)).abs()
    for radius, same in ((3, True), (4, False)):
        near = distance <= radius
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near, scale=1.0)
        merged = theirs.transpose(1, 2).flatten(2) @ held["light_output_weight"]
        assert torch.allclose(attention_body.local_attention(spec, x, seen, held), merged, atol=1e-10) is same


def test_distances_fall_into_t5s_buckets() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    spec = replace(ATTENTION, buckets=32, farthest=128)
    theirs = T5Attention._relative_position_bucket(distance, True, 32, 128)
    assert attention_oracle.bucket(spec, distance.numpy()).tolist() == theirs.tolist()
    other = T5Attention._relative_position_bucket(distance, True, 32, 64)
    assert attention_oracle.bucket(spec, distance.numpy()).tolist() != other.tolist()  # the control
