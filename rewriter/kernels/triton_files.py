"""Sources and binaries of one spec for a graphics card: for attention prefill, split-key decode and the sum over
splits; for Fourier mixing a pass over features and one over tokens; for linear and mixed chunk attention sums of chunks
and the rest; for routed feed-forward blocks the products of both sides and the sum over experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codegen.ops.fourier_mixing import triton_kernel as fourier
from codegen.ops.grouped_query_attention import triton_kernel as attention
from codegen.ops.linear_attention import triton_kernel as linear
from codegen.ops.mixed_chunk_attention import triton_kernel as chunks
from codegen.ops.routed_feed_forward import triton_kernel as routed
from codegen.ops.signature import Signature
from codegen.registry import Choice
from codegen.routed import RoutedFeedForward
from codegen.spec import FourierMixing, GroupedQueryAttention, LinearAttention, MixedChunkAttention
from codegen.toolchain.triton_aot import compile_kernel
from rewriter.kernels.folder import described, digest
from rewriter.whole_file import write_whole


@dataclass(frozen=True)
class _File:
    """One source file: its name, its text, its kernels by the suffix of their names, and how they are launched."""

    name: str
    text: str
    signatures: Mapping[str, Signature]
    warps: int
    stages: int
    tiles: Mapping[str, int]


def write(choice: Choice, output: Path, arch: str) -> list[dict[str, Any]]:
    """Compile for operands that are dense and aligned to 16; returns one row of the manifest per binary.

    Raises NoCompiler without Triton, CompilationFailed if it refuses the source.
    """
    rows = []
    for file in _FILES[type(choice.spec)](choice, arch):
        source = write_whole(file.text, output / f"{file.name}.py")
        for suffix, signature in file.signatures.items():
            made = compile_kernel(source, file.name + suffix, signature, arch, warps=file.warps, stages=file.stages)
            binary = write_whole(made.code, output / f"{made.name}.{made.suffix}")
            rows.append(
                {
                    "name": made.name,
                    "spec": described(choice),
                    "arch": arch,
                    "isa": arch,
                    "source": source.name,
                    "binary": binary.name,
                    "sha256": digest(binary),
                    "arguments": signature.types,
                    "launch": {"warps": file.warps, **file.tiles},
                    "resources": made.resources.to_dict(),
                }
            )
    return rows


def _attention(choice: Choice, arch: str) -> Iterator[_File]:
    spec, dtype = choice.spec, choice.dtype
    signatures = attention.signatures(spec, dtype)
    for few, suffixes in ((False, ("",)), (True, ("_split", "_join"))):
        cut = attention.tiling(spec, dtype, arch, few_queries=few)
        yield _File(
            str(attention.kernel_name(spec, dtype, arch, few_queries=few)),
            attention.source(spec, dtype, arch, few_queries=few),
            {suffix: signatures[suffix] for suffix in suffixes},
            cut.warps,
            cut.stages,
            {"rows": cut.row_tile, "keys": cut.key_tile},
        )


def _mixing(choice: Choice, arch: str) -> Iterator[_File]:
    spec, dtype = choice.spec, choice.dtype
    cut = fourier.tiling(arch)
    name, text = str(fourier.kernel_name(spec, dtype, arch)), fourier.source(spec, dtype, arch)
    tiles = {"rows": cut.rows, "columns": cut.columns}
    yield _File(name, text, fourier.signatures(spec, dtype), cut.warps, cut.stages, tiles)


def _by_chunks(kernels: Any, choice: Choice, arch: str) -> Iterator[_File]:
    spec, dtype = choice.spec, choice.dtype
    cut = kernels.tiling(spec, dtype, arch)
    name, text = str(kernels.kernel_name(spec, dtype, arch)), kernels.source(spec, dtype, arch)
    tiles = {f"{part.removesuffix('_tile')}s": size for part, size in asdict(cut).items() if part.endswith("_tile")}
    yield _File(name, text, kernels.signatures(spec, dtype), cut.warps, cut.stages, tiles)


def _routed(choice: Choice, arch: str) -> Iterator[_File]:
    spec, dtype = choice.spec, choice.dtype
    assert isinstance(spec, RoutedFeedForward)
    cut = routed.tiling(spec, dtype, arch)
    name, text = str(routed.kernel_name(spec, dtype, arch)), routed.source(spec, dtype, arch)
    tiles = {"rows": cut.rows, "columns": cut.columns, "down_columns": cut.down_columns}
    tiles |= {} if spec.once else {"tokens": cut.tokens, "wide": cut.wide}
    yield _File(name, text, routed.signatures(spec, dtype), cut.warps, cut.stages, tiles)


_FILES: Mapping[type, Callable[[Choice, str], Iterator[_File]]] = {
    GroupedQueryAttention: _attention,
    FourierMixing: _mixing,
    LinearAttention: functools.partial(_by_chunks, linear),
    MixedChunkAttention: functools.partial(_by_chunks, chunks),
    RoutedFeedForward: _routed,
}
