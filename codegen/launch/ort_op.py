"""One shared library of ONNX Runtime operators for the kernels that a model needs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codegen import cache
from codegen.device import DType, Isa
from codegen.errors import NotLegal
from codegen.hooks import Lowered
from codegen.ops.grouped_query_attention.onnx_body import function_name
from codegen.registry import Choice
from codegen.render import render, word
from codegen.spec import GroupedQueryAttention
from codegen.toolchain import cxx

TEMPLATE = "ort/library.cpp.j2"
LIBRARY_SOURCE, LIBRARY = "library.cpp", "rewriter_ops.so"

_ONNX_TYPES: Mapping[DType, int] = {DType.FLOAT32: 1, DType.FLOAT16: 10, DType.BFLOAT16: 16}


@dataclass(frozen=True)
class OrtLibrary:
    """A built library.

    Attributes:
        path: what ``SessionOptions.register_custom_ops_library`` takes.
        sources: of the library and of each kernel, by the kernel's name.
    """

    path: Path
    sources: Mapping[str, Path]


def source(choices: Sequence[Choice]) -> str:
    """The library's own file; kernels are linked to it.

    Raises:
        NotLegal: a kernel is not for CPUs, or there is none at all.
    """
    if not choices or any(c.device.kind != "cpu" or not isinstance(c.spec, GroupedQueryAttention) for c in choices):
        raise NotLegal("an ONNX Runtime library takes kernels of grouped-query attention for CPUs, one at least")
    ops: dict[tuple[str, DType], list[Choice]] = {}
    for choice in choices:
        ops.setdefault((function_name(choice.spec), choice.dtype), []).append(choice)
    numbers = {key: number for number, key in enumerate(ops)}
    values: dict[str, Any] = {
        "name": Lowered("rewriter_ops"),
        "ops": [_op(name, dtype, users) for (name, dtype), users in ops.items()],
        "kernels": [_kernel(c, numbers[function_name(c.spec), c.dtype]) for c in choices],
    }
    return render(TEMPLATE, values)


def build(choices: Sequence[Choice]) -> OrtLibrary:
    """The library of these kernels, built if it is not in the cache; all are for one instruction set.

    Raises NotLegal, NoCompiler, CompilationFailed, UnsafeCache, CorruptBinary.
    """
    choices = sorted(dict.fromkeys(choices), key=lambda c: c.name)
    sources = {LIBRARY_SOURCE: source(choices), **{f"{c.name}.cpp": c.source() for c in choices}}
    if len({c.device for c in choices}) != 1:
        raise NotLegal("the kernels of one library are for one instruction set")
    isa = Isa(choices[0].device.arch)
    compiler = cxx.find_compiler()
    parts = {
        "source": "\0".join(sources.values()),
        "compiler": " ".join((*compiler.command, compiler.version)),
        "flags": " ".join(cxx.flags(isa)),
    }

    def make(folder: Path) -> None:
        print(f"rewriter: compiling {len(choices)} kernels for ONNX Runtime …", file=sys.stderr, end="", flush=True)
        start = time.perf_counter()
        for name, text in sources.items():
            (folder / name).write_text(text)
        cxx.build([folder / name for name in sources], folder / LIBRARY, isa)
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    entry = cache.load_or_build(cache.address(f"ort_{isa.value}", parts), make)
    return OrtLibrary(entry.file(LIBRARY), {Path(name).stem: entry.file(name) for name in sources})


def _op(name: str, dtype: DType, users: Sequence[Choice]) -> dict[str, Any]:
    spec = users[0].spec
    return {
        "name": word(name),
        "type": _ONNX_TYPES[dtype],
        "bias": spec.bias,
        "sinks": spec.sinks,
        "softcap": spec.softcap is not None,
    }


def _kernel(choice: Choice, op: int) -> dict[str, Any]:
    spec = choice.spec
    return {
        "name": word(choice.name),
        "op": op,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        "scale": _single(spec.scale),
        "softcap": _single(spec.softcap or 0.0),
    }


def _single(value: float) -> Lowered:
    """As the attribute holds it: rounded to single precision, written exactly."""
    return Lowered(f"{float(np.float32(value)).hex()}f")
