"""Compiles Triton kernels ahead of time, for cards that need not be there, and says what the binaries take."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from codegen.errors import CompilationFailed, NoCompiler
from codegen.ops.signature import Signature
from codegen.toolchain import cubin
from codegen.toolchain.cubin import Resources

REPRODUCIBLE = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
"""Set before Triton is imported: no paths in binaries, and a fixed choice of fused multiply-adds."""

_WARP = {"cuda": 32, "hip": 64}


@dataclass(frozen=True)
class Binary:
    """A cubin or an hsaco with the name of its kernel.

    Attributes:
        threads: of a block.
        scratch: bytes of the card's memory that each block wants, where tensor descriptors lie.
    """

    name: str
    arch: str
    code: bytes
    suffix: str
    resources: Resources
    threads: int
    scratch: int


def version() -> str:
    """Triton's version; part of every cache key. Raises NoCompiler if it is not installed."""
    return str(_triton().__version__)


def compile_kernel(path: Path, name: str, signature: Signature, arch: str, *, warps: int, stages: int) -> Binary:
    """Compile the kernel `name` of a rendered source file for "sm_80", "gfx942" and the like.

    Raises:
        NoCompiler: Triton is not installed.
        CompilationFailed: it refused the source.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = "hip" if arch.startswith("gfx") else "cuda"
    number: Any = arch if backend == "hip" else int(arch.removeprefix("sm_"))
    kernel = getattr(load_source(path), name)
    order = list(signature.types)
    attributes = {(order.index(argument),): [["tt.divisibility", 16]] for argument in signature.aligned}
    constants = {(order.index(argument),): value for argument, value in signature.constants.items()}
    made = ASTSource(fn=kernel, signature=dict(signature.types), constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    try:
        compiled = triton.compile(made, target=GPUTarget(backend, number, _WARP[backend]), options=options)
    except Exception as error:  # Triton's errors share no public base class
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CompilationFailed(f"Triton refused {name} for {arch}: {first}", hint="report the spec") from error
    suffix = "hsaco" if backend == "hip" else "cubin"
    code = compiled.asm[suffix]
    told = compiled.metadata
    threads, scratch = told.num_warps * _WARP[backend], int(getattr(told, "global_scratch_size", 0))
    return Binary(name, arch, code, suffix, _resources(compiled, code, backend), threads, scratch)


class _WithoutBytecode(SourceFileLoader):
    """Leaves nothing beside the source, whose folder holds what a manifest lists and no more."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        pass


def load_source(path: Path) -> ModuleType:
    """Import a rendered file; Triton reads the source of kernels from disk."""
    name = f"rewriter_generated_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_WithoutBytecode(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _triton() -> ModuleType:
    import os

    for name, value in REPRODUCIBLE.items():
        os.environ.setdefault(name, value)
    try:
        import triton
    except ImportError as error:
        raise NoCompiler("Triton is not installed", hint="pip install 'rewriter[kernels]' on Linux") from error
    found: ModuleType = triton
    return found


def _resources(compiled: Any, code: bytes, backend: str) -> Resources:
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)|\.sgpr_spill_count:\s*(\d+)", text)
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        stack = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return Resources(
            int(registers.group(1)) if registers else None,
            int(stack.group(1)) if stack else None,
            int(compiled.metadata.shared),
            sum(int(a or b) for a, b in spilled),
            len(re.findall(r"\bv_mfma_", text)),
            len(re.findall(r"\b(?:buffer|global)_load_dwordx4\b", text)),
        )
    return cubin.resources(code, str(compiled.metadata.name), int(compiled.metadata.shared))
