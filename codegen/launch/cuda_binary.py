"""Generated CUDA C++ as loaded kernels: compiled once, kept in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from codegen import cache
from codegen.launch import cuda_driver
from codegen.launch.cuda_driver import Kernel
from codegen.toolchain import cuda_compiler

Load = Callable[[str, str, str, dict[str, int]], dict[str, Kernel]]
"""(name, source, arch, bytes of shared memory by suffix of the kernel's name) to kernels by suffix."""


def built(name: str, text: str, arch: str) -> bytes:
    """The cubin of a rendered source.

    Raises NoCompiler without a compiler, CompilationFailed if it refuses the source, and what `cache` raises.
    """
    compiler = cuda_compiler.find_compiler()
    parts = {"source": text, "compiler": compiler.version, "arch": arch, "flags": " ".join(cuda_compiler.FLAGS)}

    def write(folder: Path) -> None:
        (folder / f"{name}.cu").write_text(text, encoding="utf-8")
        (folder / f"{name}.cubin").write_bytes(cuda_compiler.compile_source(text, name, arch, compiler=compiler))

    return cache.load_or_build(cache.address(name, parts), write).file(f"{name}.cubin").read_bytes()


def on_card(name: str, text: str, arch: str, shared: dict[str, int]) -> dict[str, Kernel]:
    """Kernels on the current device, whose driver loads what `built` gives; see `Load`."""
    found = cuda_driver.load(built(name, text, arch), {name + suffix: size for suffix, size in shared.items()})
    return {suffix: found[name + suffix] for suffix in shared}
