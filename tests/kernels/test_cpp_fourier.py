"""Fourier mixing in C++ against the float64 oracle: over sizes, number formats, instruction sets and threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codegen.device import DType, Isa
from codegen.errors import NotLegal, UnsafeInput
from codegen.launch import fourier_host
from codegen.launch.fourier_op import mix
from codegen.ops.fourier_mixing import torch_body
from codegen.ops.fourier_mixing.cpp_kernel import LARGEST_RADIX, kernel_name, legal, source
from codegen.spec import FourierMixing
from codegen.toolchain import cxx
from tests.covering import covering
from tests.kernels.fourier_problems import IN_SINGLE, distance, draw
from tests.kernels.golden_source import require_golden
from tests.kernels.problems import here
from tests.kernels.test_render import HOSTILE

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

PRIME = 37
SINGLE = IN_SINGLE[torch.float32]
assert PRIME > LARGEST_RADIX, "its transform is a convolution"

LENGTHS = [1, 2, 3, 7, 8, 16, 30, 31, 33, 64, 65, PRIME, 2 * PRIME, 100, 121, 256, 509]
FULL = FourierMixing(40, gain=True, bias=True)


@pytest.mark.parametrize(
    ("kind", "dtype"), covering(("fourier", "hartley"), (torch.float32, torch.float16, torch.bfloat16))
)
def test_every_length_is_the_oracle(kind: str, dtype: torch.dtype) -> None:
    spec = replace(FULL, hartley=kind == "hartley")
    for tokens in LENGTHS:
        operands = draw(spec, dtype, 2, tokens)
        found = fourier_host.launch(spec, *operands)
        assert found.dtype == dtype and distance(spec, *operands, found) < IN_SINGLE[dtype], tokens
        other = (operands[0] * 1.03, *operands[1:])
        assert distance(spec, *other, found) > IN_SINGLE[dtype], "the control: three per cent are seen"


@pytest.mark.parametrize("hidden", [1, 2, 15, 17, 2 * PRIME, 130])
def test_every_width_is_the_oracle(hidden: int) -> None:
    spec = FourierMixing(hidden, hartley=hidden % 2 == 0, gain=hidden % 3 == 0, bias=hidden > 15)
    for tokens in (1, 5, 70):
        operands = draw(spec, torch.float32, 3, tokens)
        assert distance(spec, *operands, fourier_host.launch(spec, *operands)) < SINGLE


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=st.integers(0, 9), tokens=st.integers(0, 150), threads=st.integers(1, 4), seed=st.integers(0, 9))
def test_any_batch_on_any_number_of_threads(batch: int, tokens: int, threads: int, seed: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        operands = draw(FULL, torch.float32, batch, tokens)
        assert distance(FULL, *operands, fourier_host.launch(FULL, *operands)) < SINGLE
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_beside_the_result() -> None:
    """Each row's neighbours in a larger buffer stay as they were."""
    x = torch.randn(2, 21, 40)
    around = torch.full((4, 21, 40), 7.0)
    around[1:3] = fourier_host.launch(FourierMixing(40), x)
    again = torch.empty_like(around)
    for _ in range(20):
        again[1:3] = fourier_host.launch(FourierMixing(40), x)
        assert torch.equal(again[1:3], around[1:3]), "twice the same"


def test_rows_need_not_be_dense() -> None:
    spec = FourierMixing(24)
    x = torch.randn(2, 10, 40)[:, ::2, 8:32]
    assert distance(spec, x, None, None, fourier_host.launch(spec, x)) < SINGLE
    turned = torch.randn(2, 24, 6).transpose(1, 2)
    assert distance(spec, turned, None, None, fourier_host.launch(spec, turned)) < SINGLE


def test_what_is_beyond_the_kernel_says_so() -> None:
    assert legal(FourierMixing(768), DType.FLOAT32) is None
    assert "features" in str(legal(FourierMixing(1 << 20), DType.FLOAT32))
    with pytest.raises(NotLegal, match="float64"):
        mix(FourierMixing(4), torch.zeros(1, 3, 4, dtype=torch.float64), kernels="cpp")
    with pytest.raises(ValueError, match="contradict"):
        fourier_host.launch(FourierMixing(5), torch.zeros(1, 3, 4))


def test_the_kernel_runs_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []
    run = fourier_host.launch

    def counting(spec: FourierMixing, x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        called.append(tuple(x.shape))
        return run(spec, x, *rest)

    monkeypatch.setattr(fourier_host, "launch", counting)
    spec, large, small = FourierMixing(64), torch.randn(4, 256, 64), torch.randn(1, 4, 64)
    right = torch_body.fourier_mixing(spec, large)
    with torch.no_grad():
        torch.testing.assert_close(mix(spec, large), right, atol=1e-2, rtol=1e-4)
        assert torch.equal(mix(spec, large, kernels="off"), right) and len(called) == 1
        mix(spec, small)
        assert len(called) == 1, "small ones are left to torch"
        mix(spec, small, kernels="cpp")
        assert len(called) == 2
    leaf = large.clone().requires_grad_()
    mix(spec, leaf, kernels="cpp").sum().backward()
    assert leaf.grad is not None and len(called) == 2, "gradients are torch's"


@pytest.mark.parametrize("isa", list(Isa), ids=lambda isa: isa.value)
def test_every_instruction_set(isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    from codegen.device import Device

    if isa not in here():
        pytest.skip(f"this processor has no {isa.value}")
    monkeypatch.setattr("codegen.launch.operands.host", lambda: Device("cpu", isa.value))
    for tokens in (3, 33, 64, PRIME, 100):
        operands = draw(FULL, torch.float32, 2, tokens)
        assert distance(FULL, *operands, fourier_host.launch(FULL, *operands)) < SINGLE


# ---------------------------------------------------------------------- sources


def test_golden_source() -> None:
    text = source(FourierMixing(20, gain=True), DType.BFLOAT16, Isa.AVX2)
    require_golden("fourier_bf16_avx2.cpp.txt", text)


@pytest.mark.parametrize("change", [{"hidden": 640}, {"hartley": True}, {"gain": True}, {"bias": True}], ids=str)
def test_every_field_changes_the_source(change: dict[str, int]) -> None:
    base = FourierMixing(768)
    texts = [
        "\n".join(
            line
            for line in source(s, DType.FLOAT32, Isa.AVX512).splitlines()
            if not line.startswith("//") and "EXPORT" not in line and "_work" not in line and "_start" not in line
        )
        for s in (base, replace(base, **change))  # type: ignore[arg-type]
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["hidden", "hartley", "gain", "bias"])
def test_nothing_but_numbers_and_flags_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = FourierMixing(8)
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.BFLOAT16, Isa.AVX2)


def test_names_differ_where_specs_do() -> None:
    specs = [FULL, replace(FULL, hidden=41), replace(FULL, hartley=True), replace(FULL, gain=False)]
    assert len({str(kernel_name(s, DType.FLOAT32, Isa.AVX2)) for s in specs}) == len(specs)
    assert cxx.flags(Isa.AVX2) != cxx.flags(Isa.AVX512)
