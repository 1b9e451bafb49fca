"""Generated Triton sources as modules: kept in the cache, since Triton reads the source of kernels from disk."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from codegen import cache
from codegen.toolchain import triton_aot


def kept(name: str, text: str) -> ModuleType:
    """The module of a rendered source; `name` is the kernels' common name. Raises NoCompiler without Triton."""
    file = f"{name}.py"

    def write(folder: Path) -> None:
        (folder / file).write_text(text, encoding="utf-8")

    entry = cache.load_or_build(cache.address(name, {"source": text, "triton": triton_aot.version()}), write)
    return triton_aot.load_source(entry.file(file))
