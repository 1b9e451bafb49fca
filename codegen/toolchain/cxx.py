"""Finds a C++ compiler and builds shared libraries with it, one variant per instruction set."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from codegen.device import Isa
from codegen.errors import CompilationFailed, NoCompiler

COMPILERS = ("g++", "clang++", "c++")
VARIABLES = ("REWRITER_CXX", "CXX")
TIMEOUT = "REWRITER_CXX_TIMEOUT"
TIMEOUT_S = 120.0

BASE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
)

LINK_FLAGS = ("-shared",)

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")

ISA_FLAGS: Mapping[Isa, Sequence[str]] = {
    Isa.AVX2: ("-mavx2", "-mfma", "-mf16c"),
    Isa.AVX512: ("-mavx2", "-mfma", "-mf16c", *_AVX512),
    Isa.AVX512_BF16: ("-mavx2", "-mfma", "-mf16c", *_AVX512, "-mavx512bf16"),
    Isa.AMX: ("-mavx2", "-mfma", "-mf16c", *_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}


@dataclass(frozen=True)
class Compiler:
    """One C++ compiler.

    Attributes:
        command: the program and arguments that stand before all others.
        version: the first line it prints about itself; part of every cache key.
    """

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """The compiler that REWRITER_CXX or CXX names, else the first of g++, clang++ and c++ on the path.

    Raises:
        NoCompiler: there is none, or it does not start.
    """
    return _find(*(os.environ.get(name, "") for name in VARIABLES), os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=8)
def _find(*settings: str) -> Compiler:
    named = next((setting for setting in settings[:-1] if setting.strip()), None)
    candidates = [tuple(shlex.split(named))] if named else [(name,) for name in COMPILERS]
    for command in candidates:
        program = shutil.which(command[0])
        if program is not None:
            return Compiler((program, *command[1:]), _version(program))
    wanted = named or " or ".join(COMPILERS)
    raise NoCompiler(
        f"there is no C++ compiler: {wanted} is not on the path",
        hint='install g++ (12 or newer), name a compiler in REWRITER_CXX, or use kernels="off"',
    )


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompiler(f"{program} does not start: {error}", hint="name another compiler in REWRITER_CXX") from error
    return done.stdout.splitlines()[0].strip() if done.stdout else program


def flags(isa: Isa) -> tuple[str, ...]:
    """Everything that is passed besides file names; part of every cache key."""
    return (*BASE_FLAGS, *ISA_FLAGS[isa], *LINK_FLAGS)


def build(sources: Sequence[Path], output: Path, isa: Isa, *, timeout: float | None = None) -> None:
    """Compile and link `sources` into the shared library `output`; several are compiled at a time.

    Raises:
        NoCompiler: there is none.
        CompilationFailed: it refused the source, crashed, or took longer than `timeout` seconds
            (by default REWRITER_CXX_TIMEOUT, else two minutes).
    """
    timeout = _timeout() if timeout is None else timeout
    compiler = find_compiler()
    if len(sources) == 1:
        _run_all(compiler, [[*flags(isa), str(sources[0]), "-o", str(output)]], timeout)
    else:
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            objects = [str(Path(folder, f"{number}.o")) for number in range(len(sources))]
            alone = [*BASE_FLAGS, *ISA_FLAGS[isa], "-c"]
            _run_all(compiler, [[*alone, str(s), "-o", o] for s, o in zip(sources, objects, strict=True)], timeout)
            _run_all(compiler, [[*flags(isa), *objects, "-o", str(output)]], timeout)
    if not output.is_file():
        raise CompilationFailed(
            f"{compiler.command[0]} reported success and wrote nothing", hint="name another in REWRITER_CXX"
        )


def _run_all(compiler: Compiler, calls: Sequence[Sequence[str]], timeout: float) -> None:
    """As many calls at a time as there are processors."""
    program, width = compiler.command[0], os.cpu_count() or 1
    for first in range(0, len(calls), width):
        commands = [[*compiler.command, *call] for call in calls[first : first + width]]
        try:
            results = _run(commands, timeout)
        except subprocess.TimeoutExpired as error:
            raise CompilationFailed(
                f"{program} took longer than {timeout:g} s", hint=f'set {TIMEOUT} to more seconds, or use kernels="off"'
            ) from error
        except OSError as error:
            raise NoCompiler(f"{program} does not start: {error}") from error
        for code, said in results:
            _require_success(program, code, said)


def _require_success(program: str, code: int, said: str) -> None:
    if code < 0:
        raise CompilationFailed(f"{program} was ended by signal {-code}", hint="free some memory, then try again")
    if code != 0:
        first = next((line for line in said.splitlines() if "error" in line), said.strip()[:300])
        raise CompilationFailed(
            f"{program} refused a kernel: {first}", hint="g++ 12 or newer is needed; name one in REWRITER_CXX"
        )


def _timeout() -> float:
    try:
        return float(os.environ.get(TIMEOUT, "") or TIMEOUT_S)
    except ValueError as error:
        raise NoCompiler(f"{TIMEOUT} is no number of seconds", hint=f"unset it, or write {TIMEOUT}=600") from error


def _run(commands: Sequence[Sequence[str]], timeout: float) -> list[tuple[int, str]]:
    """(exit code, standard error) of each, run at the same time. A compiler is several processes; on a timeout or an
    interruption all of them go."""
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as started:
        processes: list[subprocess.Popen[str]] = []
        try:
            for command in commands:
                process = subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                    start_new_session=True,
                )  # fmt: skip
                processes.append(started.enter_context(process))
            said = [p.communicate(timeout=max(deadline - time.monotonic(), 0.0))[1] for p in processes]
        except BaseException:
            for process in processes:
                if process.returncode is None:  # of the others the number may be somebody else's by now
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            raise
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]
