"""Fourier mixing in CUDA C++ without a graphics card: run by the host's compiler against the oracle, and compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codegen.device import DType, Language
from codegen.errors import NotLegal, UnsafeInput
from codegen.launch import fourier_op
from codegen.launch.fourier_cuda import launch
from codegen.launch.fourier_op import mix
from codegen.ops.fourier_mixing import cuda_kernel
from codegen.ops.fourier_mixing.cuda_kernel import (
    COMPOSITES,
    MOST_TOKENS,
    RADICES,
    Cut,
    kernel_name,
    legal,
    plan,
    radices,
    source,
)
from codegen.spec import FourierMixing
from tests.kernels import cuda_on_host
from tests.kernels.fourier_problems import distance, draw
from tests.kernels.golden_source import require_golden
from tests.kernels.test_render import HOSTILE

K = 2.0
"""In single precision between the kernels' roundings: those of the operand between them and of the result are left."""

SIZES = {
    "published": (1, 512, 768, None),
    "a warp to a transform": (2, 128, 192, Cut(bundle=2, feature_threads=32, token_threads=16, columns=4)),
    "odd": (3, 45, 75, None),
    "idle threads": (2, 96, 60, Cut(bundle=3, feature_threads=7, token_threads=11, columns=2)),
    "two tokens": (1, 2, 2, None),
    "tokens are not cut": (1, 40, 10, Cut(bundle=1, columns=16)),
    "long": (1, 2048, 24, None),
}


@pytest.mark.parametrize("size", SIZES)
def test_it_is_within_rounding_of_the_oracle(size: str) -> None:
    batch, tokens, hidden, cut = SIZES[size]
    dtype = torch.float16 if tokens % 2 else torch.bfloat16
    spec = FourierMixing(hidden, gain=True, bias=tokens % 4 == 0)
    operands = draw(spec, dtype, batch, tokens)
    found = launch(spec, *operands, arch="sm_90", cut=cut, load=cuda_on_host.load)
    assert distance(spec, *operands, found) < K
    other = (operands[0].roll(1, 1) + 0.5, *operands[1:])
    assert distance(spec, *other, found) > K, "the control: another sequence has another spectrum"


def test_rows_need_not_be_dense() -> None:
    spec = FourierMixing(24)
    x = torch.randn(2, 20, 40).half()[:, ::2, 8:32]
    assert distance(spec, x, None, None, launch(spec, x, arch="sm_80", load=cuda_on_host.load)) < K


def test_radices_are_few_and_make_the_length() -> None:
    assert radices(512) == (8, 8, 8) and radices(768) == (8, 8, 12) and radices(2048) == (8, 16, 16)
    assert radices(7) is None and radices(1) is None and radices(2 * 3 * 11) is None
    for length in range(2, 1000):
        found = radices(length)
        smooth = length
        for prime in (2, 3, 5):
            while smooth % prime == 0:
                smooth //= prime
        assert (found is not None) == (smooth == 1)
        if found is not None:
            assert set(found) <= set(RADICES) and torch.tensor(found).prod() == length
    assert all(left * right == points for points, (left, right) in COMPOSITES.items())


@pytest.mark.parametrize("hidden", [2, 15, 768, 1080, 4050, 4096])
def test_every_length_fits_a_block(hidden: int) -> None:
    for tokens in (n for n in range(2, MOST_TOKENS + 1) if radices(n) is not None):
        it = plan(FourierMixing(hidden), tokens, "sm_86")
        assert max(it.feature_shared, it.token_shared) <= 99 << 10
        assert 1 <= it.feature_block <= 1024 and 1 <= it.token_block <= 1024
        assert it.cut.bundle * it.rest == tokens and (it.in_registers or it.width % it.cut.columns == 0)


def test_what_is_beyond_the_kernel_says_so() -> None:
    assert "Hartley" in str(legal(FourierMixing(8, hartley=True), DType.FLOAT16))
    assert "float32" in str(legal(FourierMixing(8), DType.FLOAT32))
    assert "shared memory" in str(legal(FourierMixing(8192), DType.FLOAT16))
    assert "7" in str(legal(FourierMixing(7), DType.FLOAT16))
    assert legal(FourierMixing(768), DType.BFLOAT16) is None
    with pytest.raises(NotLegal, match="14 tokens"):
        launch(FourierMixing(4), torch.zeros(1, 14, 4).half(), arch="sm_90")
    with pytest.raises(NotLegal, match="graphics card"):
        mix(FourierMixing(4), torch.zeros(1, 8, 4).half(), kernels="cuda")
    with pytest.raises(ValueError, match="contradict"):
        launch(FourierMixing(5), torch.zeros(1, 8, 4).half(), arch="sm_90")
    assert launch(FourierMixing(4), torch.zeros(0, 8, 4).half(), arch="sm_90").shape == (0, 8, 4)


def test_auto_takes_what_was_measured_at_lengths_that_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(tokens: int, dtype: DType = DType.BFLOAT16) -> Language | None:
        return fourier_op._measured(torch.empty(1, tokens, 8), "sm_90", dtype)

    monkeypatch.setattr(fourier_op, "FASTER_ON", {"sm_90": Language.CUDA})
    assert [taken(n) for n in (512, 513, 500, 8192)] == [Language.CUDA, None, None, None]
    assert taken(512, DType.FLOAT32) is None
    monkeypatch.setattr(fourier_op, "FASTER_ON", {})
    assert taken(512) is None


# ---------------------------------------------------------------------- binaries and sources

BASE = FourierMixing(768, gain=True, bias=True)
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


@pytest.mark.parametrize(("arch", "tokens"), [("sm_80", 128), ("sm_90", 2048), ("sm_100", 512)])
def test_binaries_fit_and_spill_nothing(arch: str, tokens: int) -> None:
    from codegen.errors import NoCompiler
    from codegen.launch.cuda_binary import built
    from codegen.toolchain import cubin, cuda_compiler

    try:
        cuda_compiler.find_compiler()
        name = str(kernel_name(BASE, DType.BFLOAT16, arch, tokens=tokens))
        code = built(name, source(BASE, DType.BFLOAT16, arch, tokens=tokens), arch)
        cut = plan(BASE, tokens, arch)
        sizes = {"_features": cut.feature_shared, "_tokens": cut.token_shared}
        found = {suffix: cubin.resources(code, name + suffix, size) for suffix, size in sizes.items()}
    except NoCompiler as error:
        pytest.skip(str(error))
    for it in found.values():
        assert (it.stack, it.spills) == (0, 0) and it.shared <= SHARED[arch], it
        assert it.registers is not None and it.registers <= 80, it


def test_golden_source() -> None:
    require_golden("fourier_bf16_sm_90.cu", source(FourierMixing(20, bias=True), DType.BFLOAT16, "sm_90", tokens=24))


@pytest.mark.parametrize("change", [{"hidden": 640}, {"gain": False}, {"bias": False}], ids=str)
def test_every_field_changes_the_source(change: dict[str, int]) -> None:
    texts = [_code(s, DType.FLOAT16, "sm_90") for s in (BASE, replace(BASE, **change))]  # type: ignore[arg-type]
    assert texts[0] != texts[1]


def test_length_format_and_arch_change_the_source() -> None:
    variants = [(d, arch, tokens) for d in cuda_kernel.DTYPES for arch in ("sm_80", "sm_90") for tokens in (32, 64)]
    assert len({_code(BASE, d, arch, tokens=tokens) for d, arch, tokens in variants}) == len(variants)


def _code(spec: FourierMixing, dtype: DType, arch: str, *, tokens: int = 512) -> str:
    name = str(kernel_name(spec, dtype, arch, tokens=tokens))
    text = source(spec, dtype, arch, tokens=tokens).replace(name, "NAME")
    return "\n".join(line for line in text.splitlines() if not line.startswith("//"))


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["hidden", "gain", "bias"])
def test_nothing_but_numbers_and_flags_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = FourierMixing(8)
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.BFLOAT16, "sm_90")
