"""Compiles CUDA C++ for cards that need not be there: by NVRTC, the compiler as a library, or else by nvcc."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from codegen.errors import CompilationFailed, NoCompiler
from codegen.scratch import scratch_folder

FLAGS = ("--std=c++17",)
"""Passed to either compiler besides the arch; part of every cache key."""

VARIABLE = "REWRITER_NVCC"
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Compiler:
    """One CUDA compiler.

    Attributes:
        place: NVRTC's library or the program nvcc.
        version: of either; part of every cache key.
        library: whether it is NVRTC.
    """

    place: str
    version: str
    library: bool


def find_compiler() -> Compiler:
    """The nvcc that REWRITER_NVCC names, else NVRTC (from NVIDIA's wheels, PyTorch's among them, or the toolkit), else
    the first nvcc.

    Raises:
        NoCompiler: there is none, or it does not start.
    """
    return _find(os.environ.get(VARIABLE, ""), os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", ""))


@functools.lru_cache(maxsize=8)
def _find(named: str, path: str, home: str) -> Compiler:
    toolkit = Path(home or "/usr/local/cuda")
    library = None if named else _nvrtc(toolkit)
    if library is not None:
        return library
    candidates = [named] if named else ["nvcc", str(toolkit / "bin" / "nvcc")]
    program = next((found for name in candidates if (found := shutil.which(name)) is not None), None)
    if program is None:
        raise NoCompiler(
            f"there is no CUDA compiler: neither NVRTC nor {named or 'nvcc'} was found",
            hint="pip install nvidia-cuda-nvrtc, install CUDA's toolkit, or name an nvcc in REWRITER_NVCC",
        )
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompiler(f"{program} does not start: {error}", hint="name another in REWRITER_NVCC") from error
    return Compiler(program, f"nvcc {done.stdout.strip().splitlines()[-1]}", library=False)


def _nvrtc(toolkit: Path) -> Compiler | None:
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in wheels.submodule_search_locations or ()] if wheels else []
    candidates = [str(p) for folder in folders for p in sorted(folder.glob("*/lib/libnvrtc.so.*"), reverse=True)]
    candidates += [str(p) for lib in ("lib64", "lib") for p in sorted((toolkit / lib).glob("libnvrtc.so*"))]
    candidates += [name] if (name := ctypes.util.find_library("nvrtc")) else []
    for candidate in candidates:
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return Compiler(candidate, f"nvrtc {major.value}.{minor.value}", library=True)
    return None


def compile_source(text: str, name: str, arch: str, *, compiler: Compiler | None = None) -> bytes:
    """The cubin of one source file for "sm_90" and the like; `name` is for messages.

    Raises:
        NoCompiler: there is none.
        CompilationFailed: it refused the source, or took too long.
    """
    compiler = compiler or find_compiler()
    made = _by_library if compiler.library else _by_program
    return made(compiler.place, text, name, arch)


def _by_library(place: str, text: str, name: str, arch: str) -> bytes:
    nvrtc = ctypes.CDLL(place)
    program = ctypes.c_void_p()
    options = [f"--gpu-architecture={arch}".encode(), *(flag.encode() for flag in FLAGS)]
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None) != 0:
        raise CompilationFailed(f"NVRTC took no source of {name}")
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if code != 0:
            said = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            raise CompilationFailed(f"NVRTC refused {name} for {arch}: {_first_error(said)}", hint="report the spec")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of: Callable[..., int], content_of: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    content_of(program, content)
    return content.raw


def _by_program(place: str, text: str, name: str, arch: str) -> bytes:
    with scratch_folder() as folder:
        source, output = folder / f"{name}.cu", folder / f"{name}.cubin"
        source.write_text(text, encoding="utf-8")
        command = [place, *FLAGS, f"--gpu-architecture={arch}", "-cubin", str(source), "-o", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise CompilationFailed(f"{place} took longer than {TIMEOUT_S:g} s over {name}") from error
        except OSError as error:
            raise NoCompiler(f"{place} does not start: {error}", hint="name another in REWRITER_NVCC") from error
        if done.returncode != 0 or not output.is_file():
            first = _first_error(done.stderr)
            raise CompilationFailed(f"nvcc refused {name} for {arch}: {first}", hint="report the spec")
        return output.read_bytes()


def _first_error(said: str) -> str:
    return next((line for line in said.splitlines() if "error" in line), said.strip()[:300])
