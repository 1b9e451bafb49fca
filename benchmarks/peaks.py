"""The machine's own limits, measured beside everything else: memory read per second, multiply-adds per second."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Clock, timed
from codegen import cache
from codegen.device import Isa, host
from codegen.launch.host import thread_pool
from codegen.toolchain import cxx

SOURCE = Path(__file__).with_name("peaks.cpp")
ROUNDS = 1_000_000
CHUNK = 1 << 16


class _Reading(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("size", "chunk", "next")],
        ("sum", ctypes.c_float),
    )


class _Arithmetic(ctypes.Structure):
    _fields_ = (("rounds", ctypes.c_int64), ("sum", ctypes.c_float))


@dataclass(frozen=True)
class Peaks:
    """Bytes per second read from memory, and floating-point operations per second, by the threads in use."""

    bandwidth: float
    float32: float
    bfloat16: float


@functools.cache
def _library() -> Any:
    isa = Isa(host().arch)
    parts = {"source": hashlib.sha256(SOURCE.read_bytes()).hexdigest(), "flags": " ".join(cxx.flags(isa))}
    entry = cache.load_or_build(
        cache.address("peaks", {**parts, "compiler": cxx.find_compiler().version}),
        lambda folder: cxx.build([SOURCE], folder / "peaks.so", isa),
    )
    return ctypes.CDLL(str(entry.file("peaks.so")))


@functools.cache
def _array() -> torch.Tensor:
    """Half a gigabyte, far beyond any cache."""
    return torch.ones(1 << 27)


def measure(runs: int = 5, clock: Clock = time.perf_counter) -> Peaks:
    """The best of `runs` measurements of each."""
    rates = [_arithmetic(name, runs, clock) for name in ("multiply_add", "multiply_add_pairs")]
    return Peaks(read_bandwidth(runs, clock), *rates)


def read_bandwidth(runs: int, clock: Clock) -> float:
    """Bytes per second."""
    data = _array()
    reading = _Reading(data.data_ptr(), data.numel(), CHUNK, 0, 0.0)

    def read() -> None:
        reading.next = 0
        _call("read_memory", ctypes.byref(reading))

    return data.nbytes / timed(read, runs, clock)[0].minimum


def _arithmetic(name: str, runs: int, clock: Clock) -> float:
    count = _library()[f"{name}_flops"]
    count.restype = ctypes.c_int64
    work = _Arithmetic(ROUNDS, 0.0)
    times, _ = timed(lambda: _call(name, ctypes.byref(work)), runs, clock)
    return float(count() * ROUNDS * torch.get_num_threads() / times.minimum)


def _call(name: str, argument: Any) -> None:
    function = _library()[name]
    pool = thread_pool()
    if pool is None:
        function(argument)
        return
    enter = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(pool)
    enter(ctypes.cast(function, ctypes.c_void_p), ctypes.cast(argument, ctypes.c_void_p), torch.get_num_threads(), 0)
