"""Grouped-query attention in torch against the float64 oracle, and the oracle against first principles."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegen.ops.grouped_query_attention import reference
from codegen.ops.grouped_query_attention.torch_body import (
    grouped_query_attention,
    grouped_query_attention_with_weights,
)
from codegen.spec import GroupedQueryAttention

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Relative to the largest output; a few units in the last place of each dtype."""

Operands = tuple[Tensor, Tensor, Tensor]

BIASES = ["none", "padding", "square", "per-head", "additive", "additive-per-head"]


def _spec(heads: int, kv_heads: int, *, value_dim: int = 8, **kw: object) -> GroupedQueryAttention:
    return replace(GroupedQueryAttention(heads, kv_heads, 8, value_dim, scale=8**-0.5), **kw)  # type: ignore[arg-type]


def _operands(spec: GroupedQueryAttention, s: int, t: int, dtype: torch.dtype, batch: int = 2) -> Operands:
    generator = torch.Generator().manual_seed(100 * s + t)

    def draw(tokens: int, heads: int, dim: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)

    return (
        draw(s, spec.heads, spec.head_dim),
        draw(t, spec.kv_heads, spec.head_dim),
        draw(t, spec.kv_heads, spec.value_dim),
    )


def _bias(kind: str, heads: int, s: int, t: int, dtype: torch.dtype, batch: int = 2) -> Tensor | None:
    """A score bias that leaves every row at least its first key."""
    generator = torch.Generator().manual_seed(7)
    shape = {
        "padding": (batch, 1, 1, t),
        "square": (batch, 1, s, t),
        "per-head": (1, heads, s, t),
        "additive": (batch, 1, s, t),
        "additive-per-head": (batch, heads, s, t),
    }.get(kind)
    if shape is None:
        return None
    if kind.startswith("additive"):
        return torch.randn(shape, generator=generator).to(dtype)
    keep = torch.rand(shape, generator=generator) > 0.4
    keep[..., 0] = True
    return keep


def _oracle(spec: GroupedQueryAttention, operands: Operands, bias: Tensor | None) -> NDArray[np.float64]:
    q, k, v = (x.double().numpy() for x in operands)
    mask = None if bias is None else bias.numpy() if bias.dtype == torch.bool else bias.double().numpy()
    return reference.grouped_query_attention(spec, q, k, v, mask)


def _error(ours: Tensor, oracle: NDArray[np.float64]) -> float:
    return float(np.abs(ours.detach().double().numpy() - oracle).max() / np.abs(oracle).max())


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s", "t"), [(1, 1), (1, 13), (7, 7), (5, 11), (13, 13)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_torch_equals_the_oracle(kv_heads: int, s: int, t: int, causal: bool, kind: str) -> None:
    spec = _spec(8, kv_heads, causal=causal, bias=kind != "none")
    operands = _operands(spec, s, t, torch.float32)
    bias = _bias(kind, 8, s, t, torch.float32)
    oracle = _oracle(spec, operands, bias)
    assert _error(grouped_query_attention(spec, *operands, bias), oracle) < TOLERANCE[torch.float32]
    output, weights = grouped_query_attention_with_weights(spec, *operands, bias)
    assert _error(output, oracle) < TOLERANCE[torch.float32]
    assert weights.shape == (2, 8, s, t)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("s", "t"), [(1, 17), (9, 9), (3, 10)])
def test_every_group_size_in_every_dtype(group: int, dtype: torch.dtype, s: int, t: int) -> None:
    spec = _spec(3 * group, 3, value_dim=5, causal=True)
    operands = _operands(spec, s, t, dtype)
    ours = grouped_query_attention(spec, *operands)
    assert ours.dtype == dtype
    assert _error(ours, _oracle(spec, operands, None)) < TOLERANCE[dtype]


@pytest.mark.parametrize("change", ["kv order", "scale", "causal", "value"])
def test_control_the_comparison_sees_a_perturbation(change: str) -> None:
    spec = _spec(8, 2, causal=True)
    operands = _operands(spec, 7, 7, torch.float32)
    oracle = _oracle(spec, operands, None)
    if change == "kv order":  # query head h must read head h // group, not h % kv_heads
        operands = (operands[0], operands[1].flip(1), operands[2].flip(1))
    elif change == "scale":
        spec = replace(spec, scale=spec.scale * 1.001)
    elif change == "causal":
        spec = replace(spec, causal=False)
    else:
        operands[2][0, 0, 0, 0] += 1e-3
    assert _error(grouped_query_attention(spec, *operands), oracle) > 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["none", "square", "additive"])
@pytest.mark.parametrize(("s", "t"), [(1, 9), (6, 6)])
def test_softcap(kind: str, s: int, t: int) -> None:
    spec = _spec(6, 2, softcap=0.7, bias=kind != "none")
    operands = _operands(spec, s, t, torch.float32)
    bias = _bias(kind, 6, s, t, torch.float32)
    oracle = _oracle(spec, operands, bias)
    assert _error(grouped_query_attention(spec, *operands, bias), oracle) < TOLERANCE[torch.float32]
    uncapped = grouped_query_attention(replace(spec, softcap=None), *operands, bias)
    assert _error(uncapped, oracle) > 1e-3


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_a_row_without_keys_gives_zeros_and_leaves_the_others_alone(kv_heads: int, softcap: float | None) -> None:
    spec = _spec(6, kv_heads, bias=True, softcap=softcap, masked_rows_are_zero=True)
    operands = _operands(spec, 5, 9, torch.float32)
    keep = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    keep[1, :, 3] = False
    oracle = _oracle(spec, operands, keep)
    assert (oracle[1, :, 3] == 0).all()
    for bias in (keep, torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)):
        ours = grouped_query_attention(spec, *operands, bias)
        assert (ours[1, :, 3] == 0).all()
        assert _error(ours, oracle) < TOLERANCE[torch.float32]


def test_oracle_gives_nan_for_a_row_without_keys_unless_told_otherwise() -> None:
    spec = _spec(2, 1, bias=True)
    q, k, v = (x.double().numpy() for x in _operands(spec, 2, 3, torch.float32))
    keep = np.array([[True, True, True], [False, False, False]])[None, None]
    output = reference.grouped_query_attention(spec, q, k, v, keep)
    assert np.isnan(output[:, :, 1]).all()
    assert np.isfinite(output[:, :, 0]).all()


def test_more_queries_than_keys_under_a_causal_order() -> None:
    spec = _spec(4, 2, causal=True, masked_rows_are_zero=True)
    operands = _operands(spec, 5, 3, torch.float32)
    oracle = _oracle(spec, operands, None)
    assert (oracle[:, :, :2] == 0).all()
    assert _error(grouped_query_attention(spec, *operands), oracle) < TOLERANCE[torch.float32]


def test_oracle_by_hand() -> None:
    """One query, two keys, two query heads on one shared key/value head, numbers small enough to check on paper."""
    spec = GroupedQueryAttention(heads=2, kv_heads=1, head_dim=1, value_dim=1, scale=0.5)
    q = np.array([2.0, 4.0]).reshape(1, 2, 1, 1)
    k = np.array([0.0, math.log(2)]).reshape(1, 1, 2, 1)
    v = np.array([3.0, 9.0]).reshape(1, 1, 2, 1)
    # scores of head 0: 0, log 2 -> weights 1/3, 2/3; of head 1: 0, log 4 -> 1/5, 4/5
    np.testing.assert_allclose(
        reference.grouped_query_attention(spec, q, k, v).ravel(), [3 / 3 + 18 / 3, 3 / 5 + 36 / 5], rtol=1e-14
    )


@pytest.mark.parametrize("kind", ["none", "square", "additive-per-head"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_those_of_repeated_heads(causal: bool, kind: str) -> None:
    spec = _spec(6, 2, causal=causal, bias=kind != "none")
    q, k, v = (x.detach().requires_grad_() for x in _operands(spec, 12, 12, torch.float32))
    bias = _bias(kind, 6, 12, 12, torch.float32)
    probe = torch.randn(2, 6, 12, 8, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((grouped_query_attention(spec, q, k, v, bias) * probe).sum(), (q, k, v))
    wide = replace(spec, kv_heads=6)
    repeated = (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    written_out = grouped_query_attention_with_weights(wide, *repeated, bias)[0]
    plain = torch.autograd.grad((written_out * probe).sum(), (q, k, v))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_decoding_reads_each_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one query the group is folded into rows: sdpa must see the K/V heads as they are."""
    seen: list[tuple[torch.Size, torch.Size, bool]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **kw: object) -> Tensor:
        seen.append((q.shape, k.shape, bool(kw.get("enable_gqa", False))))
        return original(q, k, v, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for kind in ("none", "padding", "additive-per-head"):
        spec = _spec(8, 2, causal=True, bias=kind != "none")
        grouped_query_attention(spec, *_operands(spec, 1, 33, torch.float32), _bias(kind, 8, 1, 33, torch.float32))
    assert seen == [(torch.Size((2, 2, 4, 8)), torch.Size((2, 2, 33, 8)), False)] * 3


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    spec = _spec(4, 2)
    operands = _operands(spec, 5, 300, torch.float32)
    torch.manual_seed(0)
    runs = torch.stack([grouped_query_attention(spec, *operands, dropout=0.5) for _ in range(200)])
    exact = grouped_query_attention(spec, *operands)
    assert not torch.allclose(runs[0], exact, atol=1e-2)
    torch.testing.assert_close(runs.mean(0), exact, rtol=0, atol=0.08)


def test_a_bias_against_the_spec_is_an_error() -> None:
    spec = _spec(4, 2)
    operands = _operands(spec, 3, 3, torch.float32)
    with pytest.raises(ValueError, match="bias"):
        grouped_query_attention(spec, *operands, torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="bias"):
        grouped_query_attention(replace(spec, bias=True), *operands)
    with pytest.raises(ValueError, match="bias"):
        reference.attention_weights(spec, operands[0].numpy(), operands[1].numpy(), np.zeros((1, 1, 3, 3)))


@pytest.mark.parametrize("kind", ["none", "square"])
def test_export_with_a_free_length_stays_right_at_other_lengths(kind: str) -> None:
    class Body(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            return grouped_query_attention(_spec(6, 2, causal=kind == "none", bias=kind != "none"), q, k, v, bias)

    def inputs(length: int) -> tuple[Tensor | None, ...]:
        spec = _spec(6, 2)
        return (*_operands(spec, length, length, torch.float32), _bias(kind, 6, length, length, torch.float32))

    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = ({2: tokens}, {2: tokens}, {2: tokens}, None if kind == "none" else {2: tokens, 3: tokens})
    program = torch.export.export(Body(), inputs(5), dynamic_shapes=shapes, strict=False).module()
    for length in (2, 8, 9, 33):
        torch.testing.assert_close(program(*inputs(length)), Body()(*inputs(length)), rtol=1e-5, atol=1e-6)
