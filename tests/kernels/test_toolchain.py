"""Finding a compiler and what is said when there is none, or when it refuses; which variants a processor runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from codegen import device
from codegen.device import Device, DType, Isa, Language, isa_of
from codegen.errors import CompilationFailed, NoCompiler
from codegen.registry import KERNELS, select, why_not
from codegen.spec import GroupedQueryAttention
from codegen.toolchain import cxx
from tests.kernels.problems import PLAIN


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_no_compiler_is_said_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cxx.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompiler) as refused:
        cxx.find_compiler()
    assert "install g++" in refused.value.hint


def test_a_named_compiler_wins_and_its_version_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _script(tmp_path / "mycxx", "echo 'mycxx 42.0'; exit 0")
    monkeypatch.setenv("REWRITER_CXX", f"{program} -pipe")
    found = cxx.find_compiler()
    assert found.command == (str(program), "-pipe") and found.version == "mycxx 42.0"
    monkeypatch.setenv("REWRITER_CXX", "no-such-compiler")
    with pytest.raises(NoCompiler, match="no-such-compiler"):
        cxx.find_compiler()


def test_a_refused_source_is_said_with_the_compilers_first_error(tmp_path: Path) -> None:
    (tmp_path / "k.cpp").write_text("int main( {")
    with pytest.raises(CompilationFailed, match="error"):
        cxx.build([tmp_path / "k.cpp"], tmp_path / "k.so", Isa.AVX2)


@pytest.mark.parametrize("line", ["exec sleep 60", "sleep 60 & echo $! > child; wait"], ids=["alone", "with a child"])
def test_a_compiler_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """With whatever it started: g++ is a driver, and what takes long is its child."""
    program = _script(tmp_path / "slow", f'case "$1" in --version) echo slow 1;; *) {line};; esac')
    monkeypatch.setenv("REWRITER_CXX", str(program))
    monkeypatch.setenv("REWRITER_CXX_TIMEOUT", "0.5")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompilationFailed, match="longer than"):
        cxx.build([tmp_path / "k.cpp"], tmp_path / "k.so", Isa.AVX2)
    if (tmp_path / "child").exists() and (number := (tmp_path / "child").read_text().strip()):
        assert _ends(Path(f"/proc/{number}/stat"))


def _ends(state: Path) -> bool:
    """Whether a process that was killed is gone within some seconds: a busy machine takes its time."""
    for _ in range(100):
        try:
            if state.read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("line", "words"),
    [("kill -9 $$", "signal 9"), ("exit 0", "wrote nothing"), ("echo error: bad >&2; exit 1", "error: bad")],
    ids=["killed", "silent", "failing"],
)
def test_a_compiler_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str) -> None:
    program = _script(tmp_path / "bad", f'case "$1" in --version) echo bad 1;; *) {line};; esac')
    monkeypatch.setenv("REWRITER_CXX", str(program))
    with pytest.raises(CompilationFailed, match=words):
        cxx.build([tmp_path / "k.cpp"], tmp_path / "k.so", Isa.AVX2)


def test_the_variant_follows_the_processor() -> None:
    small = frozenset({"avx2", "fma", "f16c", "sse4_2"})
    large = small | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert isa_of(frozenset({"sse4_2"})) is None and isa_of(frozenset()) is None
    assert isa_of(small) is Isa.AVX2
    assert isa_of(small | {"avx512f"}) is Isa.AVX2, "half of what the variant uses is not enough"
    assert isa_of(large) is Isa.AVX512 and isa_of(large | {"avx512_bf16"}) is Isa.AVX512_BF16
    assert isa_of(large | {"avx512_bf16", "amx_tile", "amx_bf16"}) is Isa.AMX
    assert isa_of(large | {"avx512_bf16", "amx_tile", "amx_int8"}) is Isa.AVX512_BF16


@pytest.mark.parametrize(("leave", "isa"), [(True, Isa.AMX), (False, Isa.AVX512_BF16)], ids=["granted", "refused"])
def test_matrix_units_are_used_with_leave_of_the_system(monkeypatch: pytest.MonkeyPatch, leave: bool, isa: Isa) -> None:
    """A tile instruction without it ends the process."""
    flags = frozenset().union(*device.FLAGS.values())
    monkeypatch.setattr(device, "_processor_flags", lambda: flags)
    monkeypatch.setattr(device, "_may_use_tiles", lambda: leave)
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    assert device.host.__wrapped__().arch == isa.value


@pytest.mark.parametrize(
    ("spec", "device", "language", "reason"),
    [
        (PLAIN, Device("metal", "m4"), None, "no kernel for metal"),
        (PLAIN, Device("cuda", "sm_30"), None, "has none of sm_80"),
        (PLAIN, Device("cpu", ""), None, "has none of avx2"),
        (PLAIN, Device("cpu", "avx2"), Language.TRITON, "no triton kernel"),
        (GroupedQueryAttention(2, 1, 1024, 64, 0.1), Device("cpu", "avx2"), None, "512"),
        (GroupedQueryAttention(2, 1, 64, 64, 0.1, softcap=-1.0), Device("cpu", "avx2"), None, "positive"),
        (object(), Device("cpu", "avx2"), None, "object"),
    ],
)
def test_what_is_not_legal_is_not_selected(spec: object, device: Device, language: Language, reason: str) -> None:
    assert select(spec, device, DType.FLOAT32, language) is None
    assert reason in why_not(spec, device, DType.FLOAT32, language)


def test_what_is_legal_is_selected() -> None:
    for kernel in KERNELS:
        for arch in kernel.archs:
            for dtype in kernel.dtypes:
                found = select(PLAIN, Device(kernel.device_kind, arch), dtype)
                assert found is not None and found.name in found.source()
