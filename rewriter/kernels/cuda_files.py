"""CUDA C++ sources and binaries of one spec for an NVIDIA card: attention of few queries, or Fourier mixing at a few
lengths, since such a kernel knows its length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codegen.device import Device, Language
from codegen.errors import NoCompiler
from codegen.launch.cuda_binary import built
from codegen.ops.fourier_mixing import cuda_kernel as fourier
from codegen.ops.grouped_query_attention import cuda_kernel as attention
from codegen.registry import Choice, select
from codegen.spec import FourierMixing
from codegen.toolchain import cubin, cuda_compiler
from rewriter.kernels.folder import described, digest
from rewriter.whole_file import write_whole

LENGTHS = (128, 512, 2048)
"""Tokens that kernels of Fourier mixing are written for."""


@dataclass(frozen=True)
class _File:
    """One source file: its name and text, and per kernel, by the suffix of its name, threads and shared bytes."""

    name: str
    text: str
    launches: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, int]


def compiler() -> cuda_compiler.Compiler | None:
    """What compiles CUDA C++ here, if anything does."""
    try:
        return cuda_compiler.find_compiler()
    except NoCompiler:
        return None


def write(choice: Choice, output: Path, arch: str, *, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """One row of the manifest per kernel; none where there is no kernel in CUDA C++ of this.

    Raises NoCompiler without a compiler, CompilationFailed if it refuses a source.
    """
    spec, dtype = choice.spec, choice.dtype
    if select(spec, Device(choice.device.kind, arch), dtype, Language.CUDA) is None:
        return []
    rows = []
    for file in _mixing(choice, arch, lengths) if isinstance(spec, FourierMixing) else _attention(choice, arch):
        source = write_whole(file.text, output / f"{file.name}.cu")
        code = built(file.name, file.text, arch)
        binary = write_whole(code, output / f"{file.name}.cubin")
        for suffix, (threads, shared) in file.launches.items():
            rows.append(
                {
                    "name": file.name + suffix,
                    "spec": described(choice),
                    "arch": arch,
                    "isa": arch,
                    "source": source.name,
                    "binary": binary.name,
                    "sha256": digest(binary),
                    "launch": {"threads": threads, **file.sizes},
                    "resources": cubin.resources(code, file.name + suffix, shared).to_dict(),
                }
            )
    return rows


def _attention(choice: Choice, arch: str) -> Iterator[_File]:
    spec, cut = choice.spec, attention.cut_for(choice.spec, arch)
    yield _File(
        str(attention.kernel_name(spec, choice.dtype, arch)),
        attention.source(spec, choice.dtype, arch),
        {"_split": (32 * cut.warps, attention.shared_memory(spec, cut)), "_join": (spec.value_dim, 0)},
        {"rows": attention.ROWS, "keys": attention.KEYS * cut.warps},
    )


def _mixing(choice: Choice, arch: str, lengths: Sequence[int]) -> Iterator[_File]:
    spec, dtype = choice.spec, choice.dtype
    for tokens in lengths:
        plan = fourier.plan(spec, tokens, arch)
        yield _File(
            str(fourier.kernel_name(spec, dtype, arch, tokens=tokens)),
            fourier.source(spec, dtype, arch, tokens=tokens),
            {
                "_features": (plan.feature_block, plan.feature_shared),
                "_tokens": (plan.token_block, plan.token_shared),
            },
            {"tokens": tokens, "bundle": plan.cut.bundle, "columns": plan.cut.columns},
        )
