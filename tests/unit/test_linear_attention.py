"""Linear attention against its float64 oracle, the oracle against softmax and the published features, and no leak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegen.ops.grouped_query_attention.reference import grouped_query_attention
from codegen.ops.linear_attention import reference
from codegen.ops.linear_attention.torch_body import linear_attention, resume, settled
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention
from passes.targets.linear_attention import initial, orthogonal

Array = NDArray[Any]
CHUNK = 4
LENGTHS = (0, 1, 3, 4, 8, 9, 23, 40)
FEATURES = [pytest.param(f, id=f.value) for f in FeatureMap]
ORDERS = [pytest.param(True, id="causal"), pytest.param(False, id="both-ways")]


def spec_of(features: FeatureMap = FeatureMap.LEARNED, causal: bool = True, kv_heads: int = 2) -> LinearAttention:
    heads = GroupedQueryAttention(4, kv_heads, 6, 5, 6**-0.5, causal=causal, masked_rows_are_zero=True)
    return LinearAttention(heads, CHUNK, features)


def operands(spec: LinearAttention, queries: int, keys: int, seed: int = 0) -> tuple[list[Array], dict[str, Array]]:
    random, plain = np.random.default_rng(seed), spec.attention
    sizes = ((plain.heads, queries, plain.head_dim), (plain.kv_heads, keys, plain.head_dim))
    found = [random.standard_normal((2, *s)) for s in (*sizes, (plain.kv_heads, keys, plain.value_dim))]
    drawn = {n: a + 0.3 * random.standard_normal(a.shape) for n, a in initial(spec).items()}
    return found, drawn


def body(spec: LinearAttention, given: list[Array], drawn: dict[str, Array], shown: Array | None = None) -> Tensor:
    parameters = {name: torch.from_numpy(a) for name, a in drawn.items()}
    hidden = None if shown is None else torch.from_numpy(shown)
    return linear_attention(spec, *map(torch.from_numpy, given), parameters, hidden)


@pytest.mark.parametrize("causal", ORDERS)
@pytest.mark.parametrize("features", FEATURES)
def test_the_body_is_the_oracle(features: FeatureMap, causal: bool) -> None:
    """Of every length, with shared heads or not, with hidden keys, and for the last queries alone."""
    for kv_heads in (1, 2, 4):
        spec = spec_of(features, causal, kv_heads)
        for keys in LENGTHS:
            for queries in sorted({keys, keys // 3, min(keys, 1)}):
                given, drawn = operands(spec, queries, keys)
                shown = np.random.default_rng(1).random((2, keys)) < 0.7
                for hidden in (None, shown):
                    expected = reference.linear_attention(spec, *given, drawn, hidden)
                    np.testing.assert_allclose(body(spec, given, drawn, hidden).numpy(), expected, atol=1e-10)
    other = reference.linear_attention(replace(spec, chunk=CHUNK + 1), *given, drawn, hidden)  # the control
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize("causal", ORDERS)
@pytest.mark.parametrize("features", FEATURES)
def test_of_two_chunks_it_is_softmax_attention(features: FeatureMap, causal: bool) -> None:
    spec = spec_of(features, causal)
    for keys, same in ((1, True), (2 * CHUNK, True), (3 * CHUNK + 1, False)):
        given, drawn = operands(spec, keys, keys)
        expected = grouped_query_attention(spec.attention, *given)
        apart = np.abs(body(spec, given, drawn).numpy() - expected).max()
        assert apart < 1e-12 if same else apart > 1e-3, keys


@pytest.mark.parametrize("features", FEATURES)
def test_sums_stand_for_all_but_two_chunks(features: FeatureMap) -> None:
    """In pieces of any size, with hidden keys, it is the whole at once; the state is as small as it says."""
    spec = spec_of(features)
    given, drawn = operands(spec, 31, 31)
    parameters = {name: torch.from_numpy(a) for name, a in drawn.items()}
    visible = torch.from_numpy(np.random.default_rng(1).random((2, 31)) < 0.7)
    for shown in (None, visible):
        whole = body(spec, given, drawn, None if shown is None else shown.numpy())
        for pieces in ([1] * 31, [5, 8, 1, 4, 13], [31], [12, 19]):
            held, sums, done, found = [torch.from_numpy(a[:, :, :0]) for a in given[1:]], None, 0, []
            for size in pieces:
                at = slice(done, done + size)
                q, k, v = (torch.from_numpy(a[:, :, at]) for a in given)
                keys, values = torch.cat((held[0], k), 2), torch.cat((held[1], v), 2)
                first, done = done - held[0].shape[2], done + size
                part = None if shown is None else shown[:, first:done]
                output, sums = resume(spec, q, keys, values, parameters, sums, part)
                gone = settled(spec, keys.shape[2])
                held = [x[:, :, gone:] for x in (keys, values)]
                assert held[0].shape[2] < 2 * CHUNK
                found.append(output)
            np.testing.assert_allclose(torch.cat(found, 2).numpy(), whole.numpy(), atol=1e-10)
    assert sums is not None
    lost = resume(spec, q, keys, values, parameters, torch.zeros_like(sums), part)[0]
    assert float((lost - output).abs().max()) > 1e-3  # the control
    with pytest.raises(ValueError, match="causal"):
        resume(spec_of(features, causal=False), q, keys, values, parameters)


@pytest.mark.parametrize("features", FEATURES)
def test_later_tokens_leave_no_trace(features: FeatureMap) -> None:
    """Bit for bit, in float32; the control is the form that sees both ways."""
    for causal in (True, False):
        spec = spec_of(features, causal)
        given, drawn = operands(spec, 30, 30)
        given, drawn = [a.astype(np.float32) for a in given], {n: a.astype(np.float32) for n, a in drawn.items()}
        before = body(spec, given, drawn)
        for place in (7, 8, 21, 29):
            changed = [a.copy() for a in given]
            for array in changed:
                array[:, :, place] += 5
            after = body(spec, changed, drawn)
            assert torch.equal(after[:, :, :place], before[:, :, :place]) == causal
            assert not torch.equal(after[:, :, place], before[:, :, place])


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    spec = spec_of(causal=False)
    given, drawn = operands(spec, 20, 20)
    shown = np.ones((2, 20), bool)
    shown[0] = False
    assert not body(spec, given, drawn, shown)[0].any() and body(spec, given, drawn, shown)[1].all()


def test_random_features_estimate_the_softmax() -> None:
    """The more directions the better, at the rate of an unbiased estimate; they are orthogonal block by block."""
    random = np.random.default_rng(0)
    q, k = random.standard_normal((2, 200, 8)) * 0.25
    exact = np.exp((q * k).sum(-1))
    errors = []
    for count in (8, 4096):
        w = orthogonal(random, count, 8)
        f, g = (np.exp(x @ w.T - (x**2).sum(-1, keepdims=True) / 2) / count**0.5 for x in (q, k))
        errors.append(float(np.abs((f * g).sum(-1) / exact - 1).mean()))
    assert errors[1] < 0.05 < errors[0]
    gram = w[:8] @ w[:8].T
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-10


def test_gradients_reach_every_parameter() -> None:
    for features in FeatureMap:
        spec = spec_of(features)
        given, drawn = operands(spec, 20, 20)
        leaves = {n: torch.from_numpy(a).requires_grad_() for n, a in drawn.items()}
        linear_attention(spec, *map(torch.from_numpy, given), leaves).square().sum().backward()
        assert all(t.grad is not None and bool(t.grad.isfinite().all()) and bool(t.grad.any()) for t in leaves.values())


def test_low_precision_and_autocast_are_computed_in_float32() -> None:
    spec = spec_of()
    given, drawn = operands(spec, 20, 20)
    half = [torch.from_numpy(a).bfloat16() for a in given]
    parameters = {n: torch.from_numpy(a).bfloat16() for n, a in drawn.items()}
    expected = linear_attention(spec, *(a.float() for a in half), {n: a.float() for n, a in parameters.items()})
    assert torch.equal(linear_attention(spec, *half, parameters), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(spec, *half, parameters), expected.bfloat16())


def test_wrong_operands_and_specs_are_refused() -> None:
    spec = spec_of()
    (q, k, v), drawn = operands(spec, 5, 5)
    wrong = [(q[..., :3], k, v, drawn), (q, k[:, :1], v, drawn), (q, k[:, :, :3], v, drawn), (q, k, v, {})]
    for *given, parameters in wrong:
        with pytest.raises(ValueError, match=r"contradict|together"):
            body(spec, given, parameters)
    for change in ({"softcap": 3.0}, {"sinks": True}, {"bias": True}, {"scale": -1.0}):
        with pytest.raises(ValueError, match=r"no pattern|positive"):
            LinearAttention(replace(spec.attention, **change))
    with pytest.raises(ValueError, match="chunk"):
        replace(spec, chunk=0)


def test_work_grows_with_the_length() -> None:
    spec = spec_of()
    assert spec.flops(1, 64 * CHUNK) == 2 * spec.flops(1, 32 * CHUNK) == 64 * spec.flops(1, 1)
