"""Fourier mixing in Triton without a graphics card: interpreted against the oracle, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.device import DType
from codegen.errors import NotLegal, UnsafeInput
from codegen.launch.fourier_op import launch, mix
from codegen.ops.fourier_mixing import torch_body
from codegen.ops.fourier_mixing.triton_kernel import kernel_name, legal, signatures, source, tiling
from codegen.spec import FourierMixing
from codegen.toolchain.triton_aot import compile_kernel
from tests.covering import covering
from tests.kernels.fourier_problems import K, distance, draw
from tests.kernels.golden_source import require_golden
from tests.kernels.test_render import HOSTILE

pytest.importorskip("triton")

Run = Callable[..., Tensor]
WIDTHS = [(1, 1), (2, 3), (7, 16), (16, 40), (65, 64), (33, 130), (128, 20), (3, 200), (2, 2), (64, 64)]


@pytest.fixture(scope="module")
def interpreted(triton_worker: Callable[..., Tensor]) -> Run:
    return lambda spec, *operands: triton_worker("fourier", asdict(spec), operands, arch="sm_90")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(("tokens", "hidden"), WIDTHS)
def test_it_is_within_rounding_of_the_oracle(interpreted: Run, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    for spec in (FourierMixing(hidden), FourierMixing(hidden, gain=True, bias=True)):
        operands = draw(spec, dtype, 2, tokens)
        found = interpreted(spec, *operands)
        assert distance(spec, *operands, found) < K
        other = (operands[0].roll(1, 1) + 0.5, *operands[1:])
        assert distance(spec, *other, found) > K, "the control: another sequence has another spectrum"


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(hidden=st.integers(1, 90), tokens=st.integers(1, 90), gain=st.booleans(), bias=st.booleans())
def test_any_size(interpreted: Run, hidden: int, tokens: int, gain: bool, bias: bool) -> None:
    spec = FourierMixing(hidden, gain=gain, bias=bias)
    operands = draw(spec, torch.float16, 1, tokens)
    assert distance(spec, *operands, interpreted(spec, *operands)) < K


def test_rows_need_not_be_dense(interpreted: Run) -> None:
    spec = FourierMixing(24)
    x = torch.randn(2, 10, 40).half()[:, ::2, 8:32]
    assert distance(spec, x, None, None, interpreted(spec, x)) < K


def test_what_is_beyond_the_kernel_says_so() -> None:
    assert "Hartley" in str(legal(FourierMixing(8, hartley=True), DType.FLOAT16))
    assert "float32" in str(legal(FourierMixing(8), DType.FLOAT32))
    assert "features" in str(legal(FourierMixing(10_000), DType.FLOAT16))
    assert legal(FourierMixing(768), DType.BFLOAT16) is None
    x = torch.randn(1, 5000, 4).half()
    with pytest.raises(NotLegal, match="tokens"):
        launch(FourierMixing(4), x, arch="sm_90")
    with pytest.raises(NotLegal, match="graphics card"):
        mix(FourierMixing(4), x[:, :8], kernels="triton")
    with pytest.raises(ValueError, match="contradict"):
        launch(FourierMixing(5), x, arch="sm_90")


def test_elsewhere_torch_computes_it() -> None:
    spec = FourierMixing(6, gain=True)
    x, gain, _ = draw(spec, torch.float16, 2, 9)
    assert torch.equal(mix(spec, x, gain), torch_body.fourier_mixing(spec, x, gain))
    leaf = x.float().requires_grad_()
    mix(spec, leaf, gain.float() if gain is not None else None).sum().backward()
    assert leaf.grad is not None


# ---------------------------------------------------------------------- binaries and sources

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
BASE = FourierMixing(768, gain=True, bias=True)


@pytest.mark.parametrize(("suffix", "arch"), covering(("_features", "_tokens"), tuple(SHARED)))
def test_binaries_fit_and_spill_nothing(tmp_path: Path, arch: str, suffix: str) -> None:
    name, cut = str(kernel_name(BASE, DType.BFLOAT16, arch)), tiling(arch)
    path = tmp_path / f"{name}.py"
    path.write_text(source(BASE, DType.BFLOAT16, arch))
    signature = signatures(BASE, DType.BFLOAT16)[suffix]
    found = compile_kernel(path, name + suffix, signature, arch, warps=cut.warps, stages=cut.stages).resources
    assert (found.stack, found.spills) == (0, 0), found
    assert found.shared <= SHARED[arch] and found.matrix > 0 and found.vector_copies > 0, found


def test_golden_source() -> None:
    require_golden("fourier_bf16_sm_90.py.txt", source(FourierMixing(20, bias=True), DType.BFLOAT16, "sm_90"))


@pytest.mark.parametrize("change", [{"hidden": 640}, {"gain": False}, {"bias": False}], ids=str)
def test_every_field_changes_the_source(change: dict[str, int]) -> None:
    other = replace(BASE, **change)  # type: ignore[arg-type]
    texts = [
        source(s, DType.FLOAT16, "sm_90").replace(str(kernel_name(s, DType.FLOAT16, "sm_90")), "NAME")
        for s in (BASE, other)
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["hidden", "gain", "bias"])
def test_nothing_but_numbers_and_flags_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = FourierMixing(8)
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.BFLOAT16, "sm_90")
