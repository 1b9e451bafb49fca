"""ONNX functions of gated units, quadratic and by chunks: the float64 oracle at every opset; no leak; names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.ops.gated_attention import onnx_body as unit_onnx
from codegen.ops.gated_attention.reference import gated_attention
from codegen.ops.mixed_chunk_attention import onnx_body as chunk_onnx
from codegen.ops.mixed_chunk_attention.reference import mixed_chunk_attention
from codegen.spec import Activation, GatedAttention, MixedChunkAttention, PositionBias
from tests.unit.gated_problems import Array, Gated, distance, hidden_of, model, opened, run, specs, weights_of

CLOSE = 1e-5
"""Largest difference in float32, relative to the largest number of the oracle's answer."""

FORMS: dict[str, Gated] = {
    "quadratic": GatedAttention(6, 8, 4, length=9, causal=True, bias=PositionBias.TOEPLITZ, span=5),
    "chunks": MixedChunkAttention(6, 8, 4, chunk=8, causal=True, bias=PositionBias.TOEPLITZ, span=5),
}


def oracle(spec: Gated, x: Array, weights: dict[str, Array]) -> Array:
    body: Callable[..., Any] = mixed_chunk_attention if isinstance(spec, MixedChunkAttention) else gated_attention
    return np.asarray(body(spec, x, weights))


@pytest.mark.parametrize("opset", [12, 13, 17, 18, 21, 23, 24])
@pytest.mark.parametrize("form", FORMS)
def test_the_function_equals_the_oracle_at_every_opset(form: str, opset: int) -> None:
    spec, weights = FORMS[form], weights_of(FORMS[form])
    file = opened(model(spec, weights, opset))
    wrong = opened(model(spec, {**weights, "scale": weights["scale"][::-1] + 1}, opset))
    for tokens in (1, 8, 27):
        x = hidden_of(spec, 2, tokens)
        expected = oracle(spec, x, weights)
        assert distance(run(file, x), expected) < CLOSE
        if tokens > 1:  # the control
            assert distance(run(wrong, x), expected) > 1e-3


@pytest.mark.parametrize("chunked", [False, True], ids=list(FORMS))
@given(data=st.data(), tokens=st.integers(1, 30), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_the_function_equals_the_oracle(chunked: bool, data: st.DataObject, tokens: int, seed: int) -> None:
    """Whatever the order, the bias, the activations and the sizes."""
    spec = data.draw(specs(chunked=chunked))
    weights, x = weights_of(spec, seed), hidden_of(spec, 2, tokens, seed)
    assert distance(run(model(spec, weights, 17), x), oracle(spec, x, weights)) < CLOSE


@pytest.mark.parametrize("form", FORMS)
def test_the_function_leaks_no_bit(form: str) -> None:
    causal = replace(FORMS[form], hidden=16, expanded=24, base=8)  # enough for every token to count
    x = hidden_of(causal, 1, 60)
    moved = x.copy()
    moved[:, 43] += 3
    for spec in (causal, replace(causal, causal=False)):  # the second is the control
        file = opened(model(spec, weights_of(spec), 18))
        before, after = run(file, x), run(file, moved)
        assert np.array_equal(before[:, :43], after[:, :43]) is spec.causal
        assert not np.allclose(before[:, 43:], after[:, 43:])


def test_names_say_what_the_body_has() -> None:
    quadratic = GatedAttention(2, 2, 2, length=3)
    rotary = replace(quadratic, causal=True, bias=PositionBias.ROTARY, rotary=False)
    plain = replace(quadratic, gate=Activation.GELU_TANH, value=None)
    assert unit_onnx.function_name(GatedAttention(2, 2, 2)) == "GatedAttentionUnitOwnLength"
    assert unit_onnx.function_name(rotary) == "GatedAttentionUnitCausalRotaryBiasUnrotated"
    assert unit_onnx.function_name(plain) == "GatedAttentionUnitGateGeluTanhValuePlain"
    summed = MixedChunkAttention(2, 2, 2, causal=True, averaged=False, bias=PositionBias.TOEPLITZ)
    assert chunk_onnx.function_name(MixedChunkAttention(2, 2, 2)) == "MixedChunkAttention"
    assert chunk_onnx.function_name(summed) == "MixedChunkAttentionSummedCausalDistances"
