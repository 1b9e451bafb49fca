"""One shared library of ONNX Runtime operators for the kernels that a model needs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codegen import cache
from codegen.device import DType, Isa, host
from codegen.errors import NotLegal
from codegen.hooks import Lowered
from codegen.launch import ort_card
from codegen.ops.fourier_mixing import onnx_body as mixing_body
from codegen.ops.grouped_query_attention import onnx_tiles as attention_body
from codegen.ops.grouped_query_attention.onnx_sight import sparse_numbers
from codegen.ops.linear_attention import onnx_body as linear_body
from codegen.ops.linear_attention.cpp_kernel import MAP_LANES
from codegen.ops.mixed_chunk_attention import onnx_body as chunks_body
from codegen.registry import Choice
from codegen.render import render, word
from codegen.spec import (
    FeatureMap,
    FourierMixing,
    GroupedQueryAttention,
    LinearAttention,
    MixedChunkAttention,
    PositionBias,
)
from codegen.toolchain import cxx, triton_aot

TEMPLATE = "ort/library.cpp.j2"
LIBRARY_SOURCE, LIBRARY, BINARIES_SOURCE = "library.cpp", "rewriter_ops.so", "card_binaries.cpp"

_ONNX_TYPES: Mapping[DType, int] = {DType.FLOAT32: 1, DType.FLOAT16: 10, DType.BFLOAT16: 16}


@dataclass(frozen=True)
class Kind:
    """One kind of operator.

    Attributes:
        name: of its values in the template, and of its namespace there.
        function_names: of the functions in files that it takes the place of.
        of_operator: template values that follow from a function's name and a spec; of_kernel: from a spec alone;
            of_all: from all of them.
    """

    name: str
    function_names: Callable[[Any], Sequence[str]]
    of_operator: Callable[[str, Any], dict[str, Any]]
    of_kernel: Callable[[Any], dict[str, Any]]
    of_all: Callable[[Sequence[Any]], dict[str, Any]] = lambda _: {}


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
        NotLegal: a kernel is neither for x86 CPUs nor what `ort_card.why_not` lets through, or there is none at all.
    """
    cards = _on_cards(choices)
    if not choices or any(c.device.kind != "cpu" or type(c.spec) not in KINDS for c in choices if c not in cards):
        raise NotLegal("an ONNX Runtime library takes kernels for CPUs or cards, one at least")
    for choice in cards:
        if reason := ort_card.why_not(choice):
            raise NotLegal(reason)
    values: dict[str, Any] = {"name": Lowered("rewriter_ops"), "cards": bool(cards)}
    for spec, kind in KINDS.items():
        values[kind.name] = _part([c for c in choices if type(c.spec) is spec], kind)
    return render(TEMPLATE, values)


def build(choices: Sequence[Choice]) -> OrtLibrary:
    """The library of these kernels, built if it is not in the cache; those for CPUs are for one instruction set.

    Kernels for NVIDIA cards (see `ort_card.why_not`) become operators of onnxruntime's CUDA provider.

    Raises NotLegal, NoCompiler, CompilationFailed, UnsafeCache, CorruptBinary.
    """
    choices = sorted({c.name: c for c in choices}.values(), key=lambda c: c.name)
    cards = _on_cards(choices)
    own = [c for c in choices if c not in cards]
    sources = {LIBRARY_SOURCE: source(choices), **{f"{c.name}.cpp": c.source() for c in own}}
    if len({c.device for c in own}) > 1:
        raise NotLegal("the kernels of one library are for one instruction set")
    isa = Isa((own[0].device if own else host()).arch or Isa.AVX2)
    compiler = cxx.find_compiler()
    parts = {
        "source": "\0".join([*sources.values(), *ort_card.sources(cards).values()]),
        "compiler": " ".join((*compiler.command, compiler.version, *([triton_aot.version()] if cards else []))),
        "flags": " ".join(cxx.flags(isa)),
    }

    def make(folder: Path) -> None:
        print(f"rewriter: compiling {len(choices)} kernels for ONNX Runtime …", file=sys.stderr, end="", flush=True)
        start = time.perf_counter()
        written = {**sources, **({BINARIES_SOURCE: ort_card.compiled(cards, folder)} if cards else {})}
        for name, text in written.items():
            (folder / name).write_text(text)
        cxx.build([folder / name for name in written], folder / LIBRARY, isa)
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    entry = cache.load_or_build(cache.address(f"ort_{isa.value}", parts), make)
    return OrtLibrary(entry.file(LIBRARY), {Path(name).stem: entry.file(name) for name in sources})


def _on_cards(choices: Sequence[Choice]) -> list[Choice]:
    return [c for c in choices if c.device.kind == "cuda"]


def _part(choices: Sequence[Choice], kind: Kind) -> dict[str, Any]:
    """Operators and kernels of one kind: all kernels of the same function, number format and kind of device are one
    operator's."""
    places = [((name, c.dtype, c.device.kind), c) for c in choices for name in kind.function_names(c.spec)]
    ops = {key: choice.spec for key, choice in places}
    numbers = {key: number for number, key in enumerate(ops)}
    cards = [choice for _, choice in places if choice.device.kind == "cuda"]
    return {
        "name": word(kind.name),
        **kind.of_all([c.spec for c in choices]),
        "ops": [
            {"name": word(name), "type": _ONNX_TYPES[dtype], "on_card": on != "cpu", **kind.of_operator(name, spec)}
            for (name, dtype, on), spec in ops.items()
        ],
        "kernels": [
            {
                "name": word(c.name),
                "op": numbers[key],
                "number": number,
                "on_card": c in cards,
                "card": cards.index(c) if c in cards else -1,
                **(ort_card.values(c) if c in cards else {}),
                **kind.of_kernel(c.spec),
            }
            for number, (key, c) in enumerate(places)
        ],
    }


def _attention_operator(_: str, spec: GroupedQueryAttention) -> dict[str, Any]:
    return {"bias": spec.bias, "sinks": spec.sinks, "softcap": spec.softcap is not None}


def _attention_kernel(spec: GroupedQueryAttention) -> dict[str, Any]:
    return {
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "value_dim": spec.value_dim,
        "scale": _single(spec.scale),
        "softcap": _single(spec.softcap or 0.0),
        "pattern": [
            {"name": word(name), "each": [getattr(sight, name) for sight in spec.pattern]}
            for name in sparse_numbers(spec.pattern)
        ],
    }


def _attention_all(specs: Sequence[GroupedQueryAttention]) -> dict[str, Any]:
    sights = [len(spec.pattern) for spec in specs]
    return {"patterns": any(sights), "most_sights": max([1, *sights])}


def _mixing_operator(_: str, spec: FourierMixing) -> dict[str, Any]:
    return {"hartley": spec.hartley, "gain": spec.gain, "bias": spec.bias}


def _mixing_kernel(spec: FourierMixing) -> dict[str, Any]:
    return {"hidden": spec.hidden}


def _linear_names(spec: LinearAttention) -> list[str]:
    return [linear_body.function_name(spec, shown) for shown in (False, True)]


def _linear_operator(name: str, spec: LinearAttention) -> dict[str, Any]:
    return {"learned": spec.features is FeatureMap.LEARNED, "shown": name == linear_body.function_name(spec, True)}


def _linear_kernel(spec: LinearAttention) -> dict[str, Any]:
    plain = spec.attention
    sizes = {"heads": plain.heads, "kv_heads": plain.kv_heads, "head_dim": plain.head_dim, "value_dim": plain.value_dim}
    return {"chunk": spec.chunk, **sizes}


def _chunks_operator(_: str, spec: MixedChunkAttention) -> dict[str, Any]:
    return {"bias": spec.bias is not PositionBias.NONE}


def _chunks_kernel(spec: MixedChunkAttention) -> dict[str, Any]:
    return {"chunk": spec.chunk, "base": spec.base, "expanded": spec.expanded}


def _single(value: float) -> Lowered:
    """As the attribute holds it: rounded to single precision, written exactly."""
    return Lowered(f"{float(np.float32(value)).hex()}f")


KINDS: Mapping[type, Kind] = {
    GroupedQueryAttention: Kind(
        "attention", attention_body.function_names, _attention_operator, _attention_kernel, _attention_all
    ),
    FourierMixing: Kind("mixing", lambda s: [mixing_body.function_name(s)], _mixing_operator, _mixing_kernel),
    LinearAttention: Kind(
        "linear", _linear_names, _linear_operator, _linear_kernel, lambda _: {"map_lanes": MAP_LANES}
    ),
    MixedChunkAttention: Kind("chunks", lambda s: [chunks_body.chunks_name(s)], _chunks_operator, _chunks_kernel),
}
"""What a library can hold, by spec."""
