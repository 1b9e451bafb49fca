"""Builds, loads and calls C++ kernels in this process; knows memory addresses, not tensors."""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codegen import cache
from codegen.device import Isa
from codegen.errors import NotLegal
from codegen.registry import Choice
from codegen.toolchain import cxx

SOURCE, BINARY = "kernel.cpp", "kernel.so"


class Launch(ctypes.Structure):
    """The argument block of templates/cpp/launch.h.j2, field by field."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "bias", "sinks", "out")],
        *[(name, ctypes.c_int64) for name in ("batch", "queries", "keys", "sink_columns")],
        *[(f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")],
        *[(f"{name}_stride", ctypes.c_int64 * 4) for name in ("bias", "sink")],
        ("bias_is_boolean", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        *[(name, ctypes.c_int64) for name in ("splits", "groups", "head_blocks", "query_blocks", "query_rows")],
        ("workspace", ctypes.c_void_p),
        ("next", ctypes.c_int64),
    )


class MixingLaunch(ctypes.Structure):
    """The argument block of templates/cpp/mixing_launch.h.j2, field by field."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "gain", "bias", "out")],
        *[(name, ctypes.c_int64) for name in ("batch", "tokens")],
        *[(f"{name}_stride", ctypes.c_int64 * 2) for name in ("x", "out")],
        ("threads", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("next", "workers")],
    )


class LinearLaunch(ctypes.Structure):
    """The argument block of templates/cpp/linear_launch.h.j2, field by field."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "shown", "query_map", "key_map", "gain", "out")],
        *[(name, ctypes.c_int64) for name in ("batch", "queries", "keys")],
        *[(f"{name}_stride", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")],
        ("shown_stride", ctypes.c_int64),
        *[(name, ctypes.c_float) for name in ("scale", "query_scale", "key_scale")],
        ("threads", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("next", "workers")],
    )


class ChunkLaunch(ctypes.Structure):
    """The argument block of templates/cpp/chunk_launch.h.j2, field by field."""

    _heads = ("quadratic_query", "linear_query", "quadratic_key", "linear_key")
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("gate", "value", *_heads, "bias", "shown", "out", "state")],
        *[(name, ctypes.c_int64) for name in ("batch", "tokens", "before")],
        *[(f"{name}_stride", ctypes.c_int64 * 2) for name in ("gate", "value", *_heads, "out")],
        ("threads", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("next", "workers")],
    )


class ProjectionLaunch(ctypes.Structure):
    """The argument block of templates/cpp/projection_launch.h.j2, field by field."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")],
        *[(name, ctypes.c_int64) for name in ("batch", "tokens", "weight_stride")],
        *[(f"{name}_stride", ctypes.c_int64 * 2) for name in ("x", "out")],
        ("threads", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("next", "workers")],
    )


class RoutedLaunch(ctypes.Structure):
    """The argument block of templates/cpp/routed_launch.h.j2, field by field."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "gate", "up", "down", "base")],
        *[(name, ctypes.c_void_p) for name in ("gate_bias", "up_bias", "down_bias", "weights", "rows", "out")],
        *[(name, ctypes.c_int64) for name in ("tokens", "places", "threads")],
        ("workspace", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("next", "workers", "second")],
    )


@dataclass(frozen=True)
class HostKernel:
    """A loaded kernel.

    Attributes:
        name: of its functions.
        folder: where source and binary lie.
        plan, run: take the address of a `Launch` or a `MixingLaunch`, as the kernel's template has it.
    """

    name: str
    folder: Path
    plan: Any
    run: Any


@functools.lru_cache(maxsize=256)
def load(choice: Choice) -> HostKernel:
    """Build the kernel, or find it built, and load it.

    A build is announced on standard error, since it takes a second or two.

    Raises:
        NoCompiler, CompilationFailed, UnsafeCache, CorruptBinary: see there.
    """
    entry = built(choice)
    library = ctypes.CDLL(str(entry.file(BINARY)))
    plan, run = library[f"{choice.name}_plan"], library[f"{choice.name}_run"]
    plan.argtypes, plan.restype = [ctypes.c_void_p], ctypes.c_int64
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    return HostKernel(choice.name, entry.folder, plan, run)


def built(choice: Choice) -> cache.Entry:
    """The kernel's cache entry, built if need be.

    Raises:
        NotLegal: it is no kernel of a CPU.
    """
    if choice.device.kind != "cpu":
        raise NotLegal(f"{choice.name} is no kernel of a CPU")
    isa = Isa(choice.device.arch)
    compiler, source = cxx.find_compiler(), choice.source()
    parts = {"source": source, "compiler": " ".join((*compiler.command, compiler.version)), "isa": isa.value}
    name = cache.address(choice.name, {**parts, "flags": " ".join(cxx.flags(isa))})

    def build(folder: Path) -> None:
        print(f"rewriter: compiling {choice.name} …", file=sys.stderr, end="", flush=True)
        start = time.perf_counter()
        path = folder / SOURCE
        path.write_text(source)
        cxx.build([path], folder / BINARY, isa)
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)

    return cache.load_or_build(name, build)


@functools.cache
def thread_pool() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that this process uses already; None without one.

    A pool of our own beside it would fight it for the cores: its threads go on spinning after each operator. Clang's
    and Intel's runtimes export the same function.
    """
    try:
        running = ctypes.CDLL(None)
        found = ctypes.cast(running.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
    return found
