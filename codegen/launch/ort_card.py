"""Kernels for NVIDIA cards in the library of ONNX Runtime operators: Triton's binaries of attention, as C++ data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codegen.device import Language
from codegen.hooks import Lowered
from codegen.ops.grouped_query_attention import triton_kernel
from codegen.ops.grouped_query_attention.triton_kernel import Tiling
from codegen.registry import Choice
from codegen.render import render, word
from codegen.spec import GroupedQueryAttention
from codegen.toolchain import triton_aot
from codegen.toolchain.triton_aot import Binary

TEMPLATE = "ort/card_binaries.cpp.j2"

PARTS: Sequence[tuple[str, bool]] = (("", False), ("_split", True), ("_join", True))
"""Kernels by the suffix of their names, and whether they are those of few queries; in the library's order."""

_ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Source:
    """One Triton file: of many queries, or of few."""

    name: str
    text: str
    tiling: Tiling


def why_not(choice: Choice) -> str | None:
    """Why the library cannot hold a kernel for a card, or None."""
    if choice.device.kind != "cuda" or not isinstance(choice.spec, GroupedQueryAttention):
        return f"there is no operator for {choice.device.arch} of {type(choice.spec).__name__}"
    if choice.kernel.language is not Language.TRITON:
        return "operators for cards are made of Triton's kernels"
    return "there is no operator for cards of sparse attention" if choice.spec.pattern else None


def values(choice: Choice) -> dict[str, Any]:
    """What the library's template is told of a kernel."""
    few, many = (source_of(choice, few=few).tiling for few in (True, False))
    return {
        "arch": int(choice.device.arch.removeprefix("sm_")),
        "few_rows": few.row_tile,
        "few_keys": few.key_tile,
        "many_rows": many.row_tile,
        "value_block": triton_kernel.block(choice.spec.value_dim),
    }


def sources(choices: Sequence[Choice]) -> Mapping[str, str]:
    """Triton files by name."""
    found = [source_of(choice, few=few) for choice in choices for few in (False, True)]
    return {source.name: source.text for source in found}


def compiled(choices: Sequence[Choice], folder: Path) -> str:
    """The C++ file that holds all binaries; Triton's sources are written to `folder`, which it reads them from.

    Raises NoCompiler without Triton, CompilationFailed if it refuses a source.
    """
    made = []
    for choice in choices:
        signatures = triton_kernel.signatures(choice.spec, choice.dtype)
        binaries = []
        for suffix, few in PARTS:
            source = source_of(choice, few=few)
            path = folder / f"{source.name}.py"
            path.write_text(source.text, encoding="utf-8")
            options = {"warps": source.tiling.warps, "stages": source.tiling.stages}
            signature, arch = signatures[suffix], choice.device.arch
            binaries.append(triton_aot.compile_kernel(path, source.name + suffix, signature, arch, **options))
        made.append({"name": word(choice.name), "binaries": [_described(b) for b in binaries]})
    return render(TEMPLATE, {"name": Lowered("rewriter_ops"), "kernels": made})


def source_of(choice: Choice, *, few: bool) -> Source:
    """For operands that are dense, as onnxruntime's are."""
    spec, dtype, arch = choice.spec, choice.dtype, choice.device.arch
    even = all(dim * _ITEM[dtype.value] % 16 == 0 for dim in (spec.head_dim, spec.value_dim))
    cut = triton_kernel.tiling(spec, dtype, arch, few_queries=few, aligned=even)
    name = triton_kernel.kernel_name(spec, dtype, arch, few_queries=few, descriptors=cut.descriptors)
    return Source(str(name), triton_kernel.source(spec, dtype, arch, few_queries=few, cut=cut), cut)


def _described(binary: Binary) -> dict[str, Any]:
    code = ",".join(map(str, binary.code))  # numbers alone, whatever the file was
    return {
        "name": word(binary.name),
        "code": Lowered(code),
        "threads": binary.threads,
        "shared": binary.resources.shared,
        "scratch": binary.scratch,
    }
