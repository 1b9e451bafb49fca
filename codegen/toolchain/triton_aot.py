"""Compiles Triton kernels ahead of time, for cards that need not be there, and says what the binaries take."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from codegen.errors import CompilationFailed, NoCompiler
from codegen.ops.signature import Signature

REPRODUCIBLE = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
"""Set before Triton is imported: no paths in binaries, and a fixed choice of fused multiply-adds."""

_WARP = {"cuda": 32, "hip": 64}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor.

    Attributes:
        registers, stack: registers and bytes of stack per thread; None where no tool tells.
        shared: bytes of shared memory.
        spills: loads from and stores to local memory in the code; None where no tool tells.
        matrix, vector_copies: instructions of the matrix unit; asynchronous or wide copies of 16 bytes.
    """

    registers: int | None
    stack: int | None
    shared: int
    spills: int | None
    matrix: int
    vector_copies: int

    def to_dict(self) -> dict[str, int | None]:
        return dict(vars(self))


@dataclass(frozen=True)
class Binary:
    """A cubin or an hsaco with the name of its kernel."""

    name: str
    arch: str
    code: bytes
    suffix: str
    resources: Resources


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
    return Binary(name, arch, code, suffix, _resources(compiled, code, backend))


def load_source(path: Path) -> ModuleType:
    """Import a rendered file; Triton reads the source of kernels from disk."""
    spec = importlib.util.spec_from_file_location(f"rewriter_generated_{path.stem}", path)
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
    assembly, usage = _disassembled(code)
    registers = re.search(r"\bREG:(\d+)", usage)
    stack = re.search(r"\bSTACK:(\d+)", usage)
    return Resources(
        int(registers.group(1)) if registers else None,
        int(stack.group(1)) if stack else None,
        int(compiled.metadata.shared),
        len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|DMMA)\b", assembly)),
        len(re.findall(r"\bLDGSTS\.E\.[A-Z0-9.]*128\b|\bUTMALDG\b|\bLDG\.E\.[A-Z0-9.]*128\b", assembly)),
    )


def _disassembled(code: bytes) -> tuple[str, str]:
    """(instructions, resource usage) as cuobjdump, which comes with Triton, prints them."""
    tool = Path(str(_triton().__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        answers = [
            subprocess.run(
                [str(tool), option, file.name], capture_output=True, text=True, timeout=120, check=True
            ).stdout
            for option in ("--dump-sass", "--dump-resource-usage")
        ]
    return answers[0], answers[1]
