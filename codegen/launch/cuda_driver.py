"""Loads CUDA binaries and launches their kernels on torch's current stream, through the driver's C interface.

The caller has made the operands' device current; torch has made its context.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Protocol

import torch

from codegen.errors import NotLegal

Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_longlong | ctypes.c_float

_SMALL_SHARED = 48 << 10
"""Bytes of shared memory that a kernel gets without asking."""

_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""

_SHARED_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent."""

_STREAM_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class Kernel(Protocol):
    """A kernel that can be launched: on a card, or in tests elsewhere."""

    def __call__(
        self, grid: tuple[int, int, int], block: int, shared: int, arguments: Sequence[Argument], *, early: bool = False
    ) -> None:
        """Start `grid` blocks of `block` threads with `shared` bytes of shared memory.

        Args:
            early: may start before the work ahead of it in the stream has ended; the kernel itself waits for it.
        """
        ...


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Configuration(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_NO_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT."""

_EARLY = _Attribute(_STREAM_SERIALIZATION, 0, 1)


class DriverKernel:
    """One function of a loaded binary."""

    def __init__(self, module: ctypes.c_void_p, name: str, shared: int) -> None:
        self._module = module  # never unloaded: kernels may be in flight when Python ends
        self._function = ctypes.c_void_p()
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), name)
        # the same for all: a multiprocessor that has to divide its memory anew must first run empty
        _check(_driver().cuFuncSetAttribute(self._function, _SHARED_CARVEOUT, 100), name)
        if shared > _SMALL_SHARED:
            _check(_driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared), name)

    def __call__(
        self, grid: tuple[int, int, int], block: int, shared: int, arguments: Sequence[Argument], *, early: bool = False
    ) -> None:
        places = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        configuration = _Configuration(
            grid, (block, 1, 1), shared, torch.cuda.current_stream().cuda_stream, ctypes.pointer(_EARLY), int(early)
        )
        code = _driver().cuLaunchKernelEx(ctypes.byref(configuration), self._function, places, None)
        if code == _NO_CONTEXT:  # torch has not used this thread yet
            _enter_context()
            code = _driver().cuLaunchKernelEx(ctypes.byref(configuration), self._function, places, None)
        _check(code, "a launch")


def load(code: bytes, names: dict[str, int]) -> dict[str, Kernel]:
    """Kernels of a cubin by name, in the current context; `names` says how much shared memory each asks for.

    Raises NotLegal if the driver refuses the binary.
    """
    _enter_context()
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "a binary")
    return {name: DriverKernel(module, name, shared) for name, shared in names.items()}


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NotLegal("there is no CUDA driver", hint='use kernels="auto" or "off"') from error


def _enter_context() -> None:
    """Make torch's context, the device's primary one, current on this thread unless one is."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "a look at the context")
    if not context.value:
        device = ctypes.c_int(torch.cuda.current_device())
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "the device's context")
        _check(_driver().cuCtxSetCurrent(context), "the device's context")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown").decode()
        raise NotLegal(f"the CUDA driver refused {what}: {reason} ({code})", hint='use kernels="triton" or "off"')
