"""Generated CUDA C++ built by the host's compiler, `cuda_on_host.h` in the place of a card: for its numbers only."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

from codegen import cache
from codegen.launch.cuda_driver import Argument, Kernel
from codegen.toolchain.cxx import find_compiler

HEADER = Path(__file__).with_name("cuda_on_host.h")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fno-exceptions", "-w")


class HostKernel:
    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._call = getattr(library, name)

    def __call__(
        self, grid: tuple[int, int, int], block: int, shared: int, arguments: Sequence[Argument], *, early: bool = False
    ) -> None:
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._call(places, (ctypes.c_uint * 5)(*grid, block, shared))


def load(name: str, text: str, arch: str, shared: dict[str, int]) -> dict[str, Kernel]:
    """In the place of `codegen.launch.cuda_binary.on_card`; on one thread, a few microseconds a barrier and thread."""
    exports = "".join(f"KERNEL(host{suffix}, {name}{suffix})\n" for suffix in shared)
    define = "-DBFLOAT16" if "bits of a bfloat16" in text else "-DFLOAT16"
    compiler = find_compiler()

    def write(folder: Path) -> None:
        source = folder / "kernel.cpp"
        source.write_text(f'#include "{HEADER}"\n{text}\n{exports}', encoding="utf-8")
        command = [*compiler.command, *FLAGS, define, str(source), "-o", str(folder / "kernel.so")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    parts = {"source": text, "exports": exports, "header": HEADER.read_text(), "compiler": compiler.version}
    library = ctypes.CDLL(str(cache.load_or_build(cache.address(f"host_{name}", parts), write).file("kernel.so")))
    return {suffix: HostKernel(library, f"host{suffix}") for suffix in shared}
