"""Attention in CUDA C++ without a graphics card: run by the host's compiler against the oracle, and compiled."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codegen.device import Device, DType, Language
from codegen.errors import CompilationFailed, NoCompiler, NotLegal, UnsafeInput
from codegen.launch.attention_cuda import launch
from codegen.launch.cuda_binary import built
from codegen.ops.grouped_query_attention.cuda_kernel import (
    SUFFIXES,
    Cut,
    cut_for,
    kernel_name,
    legal,
    shared_memory,
    source,
)
from codegen.registry import select
from codegen.spec import FourierMixing, GroupedQueryAttention
from codegen.toolchain import cubin, cuda_compiler
from rewriter.kernels import cuda_files
from tests.kernels import cuda_on_host
from tests.kernels.golden_source import require_golden
from tests.kernels.problems import K, operands
from tests.kernels.test_render import HOSTILE
from tests.kernels.test_triton_attention import WEIGHTS, distance

PLAIN = GroupedQueryAttention(8, 2, 64, 64, 0.125)
EVERYTHING = GroupedQueryAttention(
    6, 3, 96, 128, 0.1, causal=True, bias=True, softcap=3.0, masked_rows_are_zero=True, sinks=True
)
PROBLEMS = {
    "decode": (PLAIN, 2, 1, 133, 8, torch.bfloat16),
    "multi-query, two tiles of rows": (
        GroupedQueryAttention(32, 1, 128, 128, 0.09, causal=True), 1, 1, 300, 2, torch.bfloat16,
    ),
    "causal, few queries": (GroupedQueryAttention(6, 6, 32, 64, 0.125, causal=True), 1, 5, 77, 2, torch.float16),
    "everything": (EVERYTHING, 2, 3, 50, 4, torch.float16),
    "prefill": (GroupedQueryAttention(3, 1, 32, 64, 0.17, sinks=True), 1, 20, 70, 3, torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_within_rounding_of_the_oracle(name: str) -> None:
    spec, batch, queries, keys, processors, dtype = PROBLEMS[name]
    x = operands(spec, dtype, batch, queries, keys)
    card = {"arch": "sm_90", "processors": processors}
    found = launch(spec, x.q, x.k, x.v, x.bias, x.sinks, **card, load=cuda_on_host.load)  # type: ignore[arg-type]
    assert distance(spec, x, found) < K
    nudged = found.clone()
    nudged[0, -1, -1, -1] += 30 * WEIGHTS[dtype] * float(x.v.abs().max())
    assert distance(spec, x, nudged) > K, "the control: a small error in one number is seen"


def test_every_cut_gives_the_same() -> None:
    x = operands(PLAIN, torch.float16, 1, 2, 200)
    for processors, cut in ((1, Cut(4, 3, 1)), (16, Cut(4, 3, 4)), (3, Cut(2, 2, 1)), (1, Cut(1, 4, 8))):
        found = launch(PLAIN, x.q, x.k, x.v, arch="sm_90", processors=processors, cut=cut, load=cuda_on_host.load)
        assert distance(PLAIN, x, found) < K


@pytest.mark.parametrize(("queries", "keys"), [(1, 0), (3, 0), (1, 1), (2, 1), (17, 16), (7, 5)])
def test_lengths_at_the_edges(queries: int, keys: int) -> None:
    """With more queries than keys the first rows see nothing, under a causal order."""
    for spec in (EVERYTHING, GroupedQueryAttention(4, 1, 64, 64, 0.2, causal=True)):
        x = operands(spec, torch.float16, 1, queries, keys)
        found = launch(spec, x.q, x.k, x.v, x.bias, x.sinks, arch="sm_90", processors=2, load=cuda_on_host.load)
        assert distance(spec, x, found) < K


@pytest.mark.parametrize("bias", ["per head", "boolean"])
def test_biases_broadcast_and_booleans_hide(bias: str) -> None:
    spec = replace(PLAIN, bias=True)
    x = operands(spec, torch.float16, 2, 3, 40, bias=bias)
    found = launch(spec, x.q, x.k, x.v, x.bias, arch="sm_90", processors=1, load=cuda_on_host.load)
    assert distance(spec, x, found) < K
    assert x.bias is not None
    assert distance(spec, replace(x, bias=x.bias.roll(1, -1)), found) > 10 * K, "the control: another mask"


def test_rows_at_odd_places_are_read_right() -> None:
    x = operands(PLAIN, torch.bfloat16, 1, 3, 40)
    wide = [torch.randn(*t.shape[:3], 131).to(torch.bfloat16) for t in (x.q, x.k, x.v)]
    for w, t in zip(wide, (x.q, x.k, x.v), strict=True):
        w[..., 3:67] = t
    odd = [w[..., 3:67] for w in wide]
    found = launch(PLAIN, *odd, arch="sm_90", processors=1, load=cuda_on_host.load)
    assert distance(PLAIN, x, found) < K


def test_what_is_beyond_the_kernel_says_so() -> None:
    assert "float32" in str(legal(PLAIN, DType.FLOAT32))
    assert "128" in str(legal(replace(PLAIN, head_dim=256), DType.FLOAT16))
    assert "32, 64" in str(legal(replace(PLAIN, head_dim=40), DType.FLOAT16))
    assert "32, 64" in str(legal(replace(PLAIN, value_dim=96), DType.FLOAT16))
    assert legal(PLAIN, DType.BFLOAT16) is None
    x = operands(replace(PLAIN, head_dim=40), torch.float16, 1, 1, 5)
    with pytest.raises(NotLegal, match="128 features"):
        launch(replace(PLAIN, head_dim=40), x.q, x.k, x.v, arch="sm_90", processors=1)


# ---------------------------------------------------------------------- binaries and sources

DECODER = GroupedQueryAttention(32, 8, 128, 128, 0.088, causal=True)
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


@pytest.fixture(scope="module")
def compiler() -> cuda_compiler.Compiler:
    try:
        return cuda_compiler.find_compiler()
    except NoCompiler as error:
        pytest.skip(str(error))


def build(spec: GroupedQueryAttention, arch: str, cut: Cut) -> dict[str, cubin.Resources]:
    name = str(kernel_name(spec, DType.BFLOAT16, arch))
    code = built(name, source(spec, DType.BFLOAT16, arch, cut=cut), arch)
    try:
        return {s: cubin.resources(code, name + s, shared_memory(spec, cut) if s == "_split" else 0) for s in SUFFIXES}
    except NoCompiler as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", SHARED)
def test_binaries_fit_and_spill_nothing(compiler: cuda_compiler.Compiler, arch: str) -> None:
    spec = DECODER if arch != "sm_90" else replace(EVERYTHING, head_dim=128)
    found = build(spec, arch, cut_for(spec, arch))
    for it in found.values():
        assert (it.stack, it.spills) == (0, 0) and it.shared <= SHARED[arch], it
        assert it.registers is not None and it.registers <= 200, it
    assert found["_split"].matrix > 0 and found["_split"].vector_copies >= 32
    assert found["_join"].matrix == 0


def test_a_source_that_does_not_compile_is_a_typed_error(compiler: cuda_compiler.Compiler) -> None:
    text = source(DECODER, DType.BFLOAT16, "sm_90").replace("int place = 0;", "int place = nothing;")
    with pytest.raises(CompilationFailed, match=r"refused broken for sm_90: .*error"):
        cuda_compiler.compile_source(text, "broken", "sm_90")


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_compiler.VARIABLE, "/no/such/nvcc")
    with pytest.raises(NoCompiler, match="/no/such/nvcc") as caught:
        cuda_compiler.find_compiler()
    assert "nvidia-cuda-nvrtc" in caught.value.hint


def test_golden_source() -> None:
    require_golden("everything_f16_sm_90.cu", source(EVERYTHING, DType.FLOAT16, "sm_90"))


CHANGES: list[dict[str, object]] = [
    {"heads": 12}, {"heads": 12, "kv_heads": 6}, {"head_dim": 64}, {"value_dim": 64}, {"scale": 0.5}, {"causal": False},
    {"bias": False}, {"softcap": None}, {"softcap": 4.0}, {"masked_rows_are_zero": False}, {"sinks": False},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_changes_the_source(change: dict[str, object]) -> None:
    texts = []
    for spec in (EVERYTHING, replace(EVERYTHING, **change)):  # type: ignore[arg-type]
        name = str(kernel_name(spec, DType.BFLOAT16, "sm_90"))
        lines = source(spec, DType.BFLOAT16, "sm_90").replace(name, "NAME").splitlines()
        texts.append([line for line in lines if not line.startswith("//")])
    # the number of K/V heads is the grid's, and only the group is the kernel's own
    assert texts[0] != texts[1] or change == {"heads": 12, "kv_heads": 6}


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["heads", "head_dim", "scale", "causal", "softcap", "sinks"])
def test_nothing_but_numbers_and_flags_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = replace(PLAIN)
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.BFLOAT16, "sm_90")


def test_sources_and_binaries_are_written(compiler: cuda_compiler.Compiler, tmp_path: Path) -> None:
    for spec in (DECODER, FourierMixing(24)):
        choice = select(spec, Device("cuda", "sm_90"), DType.BFLOAT16, Language.CUDA)
        assert choice is not None
        rows = cuda_files.write(choice, tmp_path, "sm_90", lengths=(16,))
        assert len(rows) == 2 and len({row["binary"] for row in rows}) == 1
        for row in rows:
            code = (tmp_path / row["binary"]).read_bytes()
            assert hashlib.sha256(code).hexdigest() == row["sha256"] and row["name"].encode() in code
            assert row["name"] in (tmp_path / row["source"]).read_text()
            assert (row["resources"]["stack"], row["resources"]["spills"]) == (0, 0)
    wide = select(replace(DECODER, head_dim=40), Device("cuda", "sm_90"), DType.BFLOAT16)
    assert wide is not None and cuda_files.write(wide, tmp_path, "sm_90") == [], "there is only a Triton kernel of it"
