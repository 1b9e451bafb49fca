"""Kernels built by clang instead of g++, where there is one: the same oracles, and the onnxruntime library."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codegen.device import DType, Isa
from codegen.launch import chunk_host, fourier_host, host, linear_host, operands
from codegen.launch.ort_op import build
from codegen.spec import FourierMixing, GroupedQueryAttention
from codegen.toolchain import cxx
from tests.kernels import chunk_problems, fourier_problems, linear_problems, problems
from tests.kernels.test_ort_chunks import CAUSAL as CHUNKS
from tests.kernels.test_ort_linear import LEARNED, Run

pytestmark = [
    pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang"),
    pytest.mark.skipif(not problems.here(), reason="no instruction set that there are kernels for"),
]

FEW_ROWS = GroupedQueryAttention(4, 1, 40, 24, 0.2, causal=True)
ATTENTIONS = {
    "every modifier, f16, avx2": (problems.EVERYTHING, DType.FLOAT16, Isa.AVX2),
    "few rows, bf16, avx512_bf16": (FEW_ROWS, DType.BFLOAT16, Isa.AVX512_BF16),
    "many and few rows, bf16, amx": (replace(FEW_ROWS, kv_heads=2, bias=True), DType.BFLOAT16, Isa.AMX),
    "patterns by head, f32, avx512": (problems.SPARSE["by head"], DType.FLOAT32, Isa.AVX512),
}


@pytest.fixture(scope="module", autouse=True)
def clang() -> Iterator[None]:
    """Kernels that g++ built are not to be met, nor those of clang afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWRITER_CXX", "clang++")
        for kept in (host.load, operands._loaded):
            kept.cache_clear()
        assert "clang" in cxx.find_compiler().version
        yield
    for kept in (host.load, operands._loaded):
        kept.cache_clear()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    spec, dtype, isa = ATTENTIONS[name]
    if isa not in problems.here():
        pytest.skip(f"this processor has no {isa.value}")
    made = problems.choice(spec, dtype, isa)
    for queries, keys in ((1, 1), (1, 700), (7, 7), (40, 190)):
        x = problems.operands(spec, problems.TORCH[dtype], 2, queries, keys)
        assert problems.distance(made, x) <= problems.K, (queries, keys)
    assert problems.distance(made, replace(x, v=1.1 * x.v), problems.run(made, x)) > problems.K  # the control


def test_linear_attention() -> None:
    x = linear_problems.draw(LEARNED, torch.float32, 2, 33, 41, hide=True)
    found = linear_host.launch(LEARNED, x.q, x.k, x.v, x.parameters, x.shown)
    assert linear_problems.distance(LEARNED, x, found) <= linear_problems.K
    assert linear_problems.distance(LEARNED, replace(x, v=1.1 * x.v), found) > linear_problems.K


def test_mixed_chunk_attention() -> None:
    x = chunk_problems.draw(CHUNKS, torch.float32, 2, 40)
    found = chunk_host.launch(CHUNKS, x.gate, x.value, x.heads, x.bias(CHUNKS), None)
    assert chunk_problems.distance(CHUNKS, x, found) <= chunk_problems.K
    assert chunk_problems.distance(CHUNKS, replace(x, value=1.1 * x.value), found) > chunk_problems.K


def test_fourier_mixing() -> None:
    spec = FourierMixing(24, gain=True, bias=True)
    x, gain, bias = fourier_problems.draw(spec, torch.float32, 2, 37)
    found, limit = fourier_host.launch(spec, x, gain, bias), fourier_problems.IN_SINGLE[torch.float32]
    assert fourier_problems.distance(spec, x, gain, bias, found) <= limit
    assert fourier_problems.distance(spec, 1.1 * x, gain, bias, found) > limit


def test_the_library_for_onnxruntime(tmp_path: Path) -> None:
    x = linear_problems.draw(LEARNED, torch.float32, 2, 30, 40)
    fast = Run(LEARNED, x, build([problems.choice(LEARNED, DType.FLOAT32)]).path, tmp_path)
    found = fast(x)
    assert linear_problems.distance(LEARNED, x, found) <= linear_problems.K
    assert linear_problems.distance(LEARNED, replace(x, v=1.1 * x.v), found) > linear_problems.K
