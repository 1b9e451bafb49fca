"""Triton kernels compiled ahead of time for absent cards: they fit, nothing spills, matrix units are used."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from codegen.device import DType
from codegen.errors import CompilationFailed, UnsafeInput
from codegen.ops.grouped_query_attention.triton_kernel import kernel_name, signatures, source, tiling
from codegen.spec import GroupedQueryAttention
from codegen.toolchain.triton_aot import Binary, compile_kernel
from tests.covering import covering
from tests.kernels.golden_source import CHANGES, require_golden
from tests.kernels.problems import CAUSAL, EVERYTHING, MULTI_QUERY
from tests.kernels.test_render import HOSTILE

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

DECODER = GroupedQueryAttention(32, 8, 128, 128, 0.088, causal=True)
ENCODER = GroupedQueryAttention(12, 4, 64, 64, 0.125, bias=True)
CAPPED = GroupedQueryAttention(16, 2, 256, 256, 0.0625, causal=True, softcap=50.0)
SPECS = {
    "decoder": (DECODER, DType.BFLOAT16), "encoder": (ENCODER, DType.FLOAT16), "capped": (CAPPED, DType.BFLOAT16),
    "decoder-fp32": (DECODER, DType.FLOAT32),
}  # fmt: skip
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program may take."""
KINDS = {"prefill": "", "decode": "_split"}
"""What a kernel is for, and how its name ends."""


def build(
    folder: Path, spec: GroupedQueryAttention, dtype: DType, arch: str, suffix: str, *, aligned: bool = False
) -> Binary:
    few = bool(suffix)
    cut = tiling(spec, dtype, arch, few_queries=few, aligned=aligned)
    name = str(kernel_name(spec, dtype, arch, few_queries=few, descriptors=cut.descriptors))
    path = folder / f"{name}.py"
    path.write_text(source(spec, dtype, arch, few_queries=few, cut=cut))
    signature = signatures(spec, dtype)[suffix]
    return compile_kernel(path, name + suffix, signature, arch, warps=cut.warps, stages=cut.stages)


@pytest.mark.parametrize(("name", "arch", "kind"), covering(tuple(SPECS), tuple(SHARED), tuple(KINDS)))
def test_binaries_fit_and_spill_nothing(tmp_path: Path, name: str, arch: str, kind: str) -> None:
    made = build(tmp_path, *SPECS[name], arch, KINDS[kind])
    found = made.resources
    assert made.code[:4] == b"\x7fELF"
    assert (found.stack, found.spills) == (0, 0), found
    assert found.registers is not None and found.registers <= (512 if arch.startswith("gfx") else 255)
    assert found.shared <= SHARED[arch], found
    assert found.matrix > 0 and found.vector_copies > 0, found


def test_descriptors_leave_reading_to_the_copy_engine(tmp_path: Path) -> None:
    pointers, found = (build(tmp_path, DECODER, DType.BFLOAT16, "sm_90", "", aligned=a) for a in (False, True))
    assert (found.resources.stack, found.resources.spills) == (0, 0)
    assert found.resources.registers is not None and found.resources.registers <= 255
    assert found.resources.shared <= SHARED["sm_90"] and found.resources.matrix > 0
    assert found.resources.vector_copies < pointers.resources.vector_copies, "one thread copies whole tiles"
    assert "tma" in found.name and "tma" not in pointers.name


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_sum_over_splits_fits_too(tmp_path: Path, arch: str) -> None:
    found = build(tmp_path, DECODER, DType.BFLOAT16, arch, "_join").resources
    assert (found.stack, found.spills, found.matrix) == (0, 0, 0)


def test_a_tile_that_is_too_large_is_seen_to_spill(tmp_path: Path) -> None:
    """The control of the budget: the same kernel with 128 rows of float32 to 4 warps."""
    spec, dtype, arch = DECODER, DType.FLOAT32, "sm_80"
    name = str(kernel_name(spec, dtype, arch))
    path = tmp_path / f"{name}.py"
    small = tiling(spec, dtype, arch, few_queries=False)
    path.write_text(re.sub(rf"\b{small.row_tile}\b", "128", source(spec, dtype, arch)))
    found = compile_kernel(path, name, signatures(spec, dtype)[""], arch, warps=4, stages=2).resources
    assert found.stack and found.spills


def test_without_alignment_copies_are_narrow(tmp_path: Path) -> None:
    """The control of the copies: strides that may be odd allow no 16 bytes at once."""
    name = str(kernel_name(DECODER, DType.BFLOAT16, "sm_80"))
    path = tmp_path / f"{name}.py"
    path.write_text(source(DECODER, DType.BFLOAT16, "sm_80"))
    signature = replace(signatures(DECODER, DType.BFLOAT16)[""], aligned=frozenset())
    assert compile_kernel(path, name, signature, "sm_80", warps=8, stages=2).resources.vector_copies == 0


BUILD = """
import hashlib, sys
from pathlib import Path
from tests.kernels.test_triton_binaries import DECODER, DType, build
from tests.kernels.test_triton_routed import SPECS, build as build_routed
attention = build(Path(sys.argv[1]), DECODER, DType.BFLOAT16, "sm_90", "")
routed = build_routed(Path(sys.argv[1]), SPECS["experts"], DType.BFLOAT16, "sm_90")
print(hashlib.sha256(b"".join(made.code for made in (attention, *routed.values()))).hexdigest())
"""


def test_two_builds_in_different_folders_and_processes_are_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "one", tmp_path / "another" / "deeper"
    for folder in (here, there):
        (folder / "cache").mkdir(parents=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(here / "cache"))
    monkeypatch.setattr(sys, "argv", ["build", str(here)])
    exec(BUILD, {})
    digest = capsys.readouterr().out.strip()
    environment = {**os.environ, "TRITON_CACHE_DIR": str(there / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(there)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == digest and len(digest) == 64


def test_a_source_that_does_not_compile_is_a_typed_error(tmp_path: Path) -> None:
    name = str(kernel_name(DECODER, DType.BFLOAT16, "sm_90"))
    path = tmp_path / f"{name}.py"
    path.write_text(source(DECODER, DType.BFLOAT16, "sm_90").replace("tl.dot(q, k)", "tl.dot(q, q)"))
    with pytest.raises(CompilationFailed, match="Triton refused"):
        compile_kernel(path, name, signatures(DECODER, DType.BFLOAT16)[""], "sm_90", warps=4, stages=2)


# ---------------------------------------------------------------------- sources

GOLDEN = {
    "causal_f32_sm_80": (CAUSAL, DType.FLOAT32, "sm_80"),
    "everything_bf16_sm_90": (EVERYTHING, DType.BFLOAT16, "sm_90"),
    "multi_query_f16_gfx942": (MULTI_QUERY, DType.FLOAT16, "gfx942"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_source(name: str) -> None:
    require_golden(f"{name}.py.txt", source(*GOLDEN[name]))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_changes_the_source(change: dict[str, object]) -> None:
    other = replace(EVERYTHING, **change)  # type: ignore[arg-type]
    texts = []
    for spec in (EVERYTHING, other):
        name = str(kernel_name(spec, DType.BFLOAT16, "sm_90"))
        lines = source(spec, DType.BFLOAT16, "sm_90").replace(name, "NAME").splitlines()
        texts.append([line for line in lines if not line.lstrip().startswith(("#", '"""'))])
    # the number of K/V heads is the grid's, and only the group is the kernel's own
    assert texts[0] != texts[1] or change == {"heads": 12, "kv_heads": 6}


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["heads", "head_dim", "scale", "causal", "softcap", "sinks"])
def test_nothing_but_numbers_and_flags_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = replace(CAUSAL)
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.BFLOAT16, "sm_90")
