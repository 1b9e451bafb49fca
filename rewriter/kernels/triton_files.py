"""Sources and binaries of one spec for a graphics card: prefill, split-key decode, and the sum over splits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from codegen.ops.grouped_query_attention import triton_kernel
from codegen.registry import Choice
from codegen.toolchain.triton_aot import compile_kernel
from rewriter.kernels.folder import digest
from rewriter.whole_file import write_whole


def write(choice: Choice, output: Path, arch: str) -> list[dict[str, Any]]:
    """Compile for operands that are dense and aligned to 16; returns one row of the manifest per binary.

    Raises NoCompiler without Triton, CompilationFailed if it refuses the source.
    """
    spec, dtype = choice.spec, choice.dtype
    signatures = triton_kernel.signatures(spec, dtype)
    rows = []
    for few, suffixes in ((False, ("",)), (True, ("_split", "_join"))):
        name = str(triton_kernel.kernel_name(spec, dtype, arch, few_queries=few))
        source = write_whole(triton_kernel.source(spec, dtype, arch, few_queries=few), output / f"{name}.py")
        cut = triton_kernel.tiling(spec, dtype, arch, few_queries=few)
        for suffix in suffixes:
            made = compile_kernel(source, name + suffix, signatures[suffix], arch, warps=cut.warps, stages=cut.stages)
            binary = write_whole(made.code, output / f"{made.name}.{made.suffix}")
            rows.append(
                {
                    "name": made.name,
                    "spec": {"op": type(spec).__name__, **asdict(spec), "dtype": dtype.value},
                    "arch": arch,
                    "isa": arch,
                    "source": source.name,
                    "binary": binary.name,
                    "sha256": digest(binary),
                    "arguments": signatures[suffix].types,
                    "launch": {"warps": cut.warps, "rows": cut.row_tile, "keys": cut.key_tile},
                    "resources": made.resources.to_dict(),
                }
            )
    return rows
