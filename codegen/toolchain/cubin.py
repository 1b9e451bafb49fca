"""What a CUDA binary takes of a multiprocessor, read off its machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from codegen.errors import NoCompiler
from codegen.scratch import scratch_folder


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


def resources(code: bytes, name: str, shared: int) -> Resources:
    """Of the kernel `name` in a cubin; `shared` bytes of shared memory are what a launch asks for.

    Raises NoCompiler if there is no cuobjdump, which comes with Triton and with CUDA's toolkit.
    """
    assembly, usage = (_of(name, text) for text in disassembled(code))
    registers = re.search(r"\bREG:(\d+)", usage)
    stack = re.search(r"\bSTACK:(\d+)", usage)
    return Resources(
        int(registers.group(1)) if registers else None,
        int(stack.group(1)) if stack else None,
        shared,
        len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|DMMA)\b", assembly)),
        len(re.findall(r"\bLDGSTS\.E\.[A-Z0-9.]*128\b|\bUTMALDG\b|\bLDG\.E\.[A-Z0-9.]*128\b", assembly)),
    )


def disassembled(code: bytes) -> tuple[str, str]:
    """(instructions, resource usage) as cuobjdump prints them."""
    tool = _cuobjdump()
    with scratch_folder() as folder:
        file = folder / "kernel.cubin"
        file.write_bytes(code)
        answers = [
            subprocess.run([tool, option, str(file)], capture_output=True, text=True, timeout=120, check=True).stdout
            for option in ("--dump-sass", "--dump-resource-usage")
        ]
    return answers[0], answers[1]


def _of(name: str, text: str) -> str:
    """What cuobjdump says of one function, of a text with several."""
    parts = re.split(r"\bFunction\s*:?\s*(\w+)\s*:?", text)
    return next(body for found, body in zip(parts[1::2], parts[2::2], strict=True) if found == name)


def _cuobjdump() -> str:
    found = importlib.util.find_spec("triton")
    homes = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    if found is not None and found.origin is not None:
        homes.insert(0, Path(found.origin).parent / "backends" / "nvidia" / "bin")
    tool = next((str(p) for home in homes if (p := home / "cuobjdump").exists()), shutil.which("cuobjdump"))
    if tool is None:
        raise NoCompiler("there is no cuobjdump", hint="install Triton or CUDA's toolkit")
    return tool
