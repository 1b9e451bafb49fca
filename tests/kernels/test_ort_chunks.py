"""What is between the projections of mixed chunk attention, in the library of onnxruntime operators: a unit in a file
beside its function and the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from codegen.device import DType
from codegen.launch.ort_op import build, source
from codegen.ops.mixed_chunk_attention import onnx_body, reference
from codegen.spec import MixedChunkAttention, PositionBias
from tests.kernels.ort_sessions import operators_run, profiled_session
from tests.kernels.problems import CAUSAL as ATTENTION
from tests.kernels.problems import choice, here
from tests.unit.gated_problems import distance, hidden_of, model, weights_of

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

CLOSE = 3e-6
CAUSAL = MixedChunkAttention(12, 20, 6, chunk=7, causal=True, bias=PositionBias.TOEPLITZ, span=5)
SPECS = {
    "causal": CAUSAL,
    "both ways": MixedChunkAttention(12, 34, 8, chunk=9, bias=PositionBias.ROTARY),
    "summed": MixedChunkAttention(8, 530, 8, chunk=33, causal=True, averaged=False),
}


@pytest.fixture(scope="module")
def library(kernel_cache: Path) -> Path:
    return build([choice(s, DType.FLOAT32) for s in SPECS.values()]).path


def _session(spec: MixedChunkAttention, weights: Any, library: Path | None, folder: Path, **how: Any) -> Any:
    return profiled_session(model(spec, weights, 18, **how), library, folder)


@pytest.mark.parametrize("name", SPECS)
def test_with_the_library_the_kernel_runs_and_without_it_the_function(name: str, library: Path, tmp_path: Path) -> None:
    spec = SPECS[name]
    weights = weights_of(spec)
    plain, fast = (_session(spec, weights, lib, tmp_path) for lib in (None, library))
    for tokens in (1, 6, 7, 8, 40, 70):
        x = hidden_of(spec, 2, tokens)
        right = reference.mixed_chunk_attention(spec, x, weights)
        for session in (plain, fast):
            assert distance(session.run(None, {"x": x})[0], right) < CLOSE, tokens
    other = replace(spec, chunk=spec.chunk + 1)
    kept = {role: weights[role] for role in other.shapes}
    assert distance(fast.run(None, {"x": x})[0], reference.mixed_chunk_attention(other, x, kept)) > 1e-3  # the control
    assert onnx_body.chunks_name(spec) in (ran := operators_run(fast)) and "CumSum" not in ran
    assert onnx_body.chunks_name(spec) not in operators_run(plain)


def test_a_unit_in_half_precision_is_computed_in_single_between_its_projections(library: Path, tmp_path: Path) -> None:
    weights, x = weights_of(CAUSAL), hidden_of(CAUSAL, 2, 40).astype(np.float16)
    session = _session(CAUSAL, weights, library, tmp_path, dtype=ir.DataType.FLOAT16)
    found = session.run(None, {"x": x})[0]
    right = reference.mixed_chunk_attention(CAUSAL, x.astype(np.float32), weights)
    assert found.dtype == np.float16 and distance(found.astype(np.float64), right) < 3e-3
    assert distance(found.astype(np.float64) * 1.01, right) > 3e-3  # the control
    assert onnx_body.chunks_name(CAUSAL) in operators_run(session)
    assert session.run(None, {"x": x[:, :0]})[0].shape == (2, 0, 12)


def test_what_the_library_lacks_is_said(library: Path, tmp_path: Path) -> None:
    wide = replace(CAUSAL, expanded=24)
    with pytest.raises(Exception, match=r"chunks of 7 tokens of 24 features.*rewriter kernels"):
        _session(wide, weights_of(wide), library, tmp_path)


def test_the_source_holds_what_is_needed_and_no_more() -> None:
    text = source([choice(CAUSAL, DType.FLOAT32)])
    assert "namespace chunks" in text and "namespace attention" not in text and "namespace linear" not in text
    assert "namespace chunks" not in source([choice(ATTENTION, DType.FLOAT32)])
