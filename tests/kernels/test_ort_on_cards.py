"""Operators of onnxruntime's CUDA provider, without a card: the library is built for the provider that is here, and a
stand-in for the driver hands each launch, as the library made it, to Triton's interpreter.

tests/kernels/test_on_a_card.py runs the same library where there is a card and onnxruntime for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from codegen.device import Device, DType
from codegen.errors import NotLegal
from codegen.launch import ort_card
from codegen.launch.ort_op import build, source
from codegen.ops.grouped_query_attention.reference import grouped_query_attention
from codegen.registry import Choice, select
from codegen.sight import Sight
from codegen.spec import FourierMixing, GroupedQueryAttention
from codegen.toolchain.cxx import BASE_FLAGS, LINK_FLAGS, find_compiler
from tests.kernels.problems import choice, here
from tests.kernels.test_ort_library import _feeds, _model, _session

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

ARCH = "sm_90"
CAUSAL = GroupedQueryAttention(8, 2, 64, 64, 0.125, causal=True)
WIDE = GroupedQueryAttention(4, 1, 128, 128, 0.09, masked_rows_are_zero=True)
EVERYTHING = GroupedQueryAttention(
    6, 3, 5, 7, 0.4, causal=True, bias=True, softcap=3.0, masked_rows_are_zero=True, sinks=True
)
PAIRS = {"causal": (CAUSAL, DType.FLOAT16), "descriptors": (WIDE, DType.FLOAT16), "all": (EVERYTHING, DType.FLOAT32)}
LENGTHS = {"prefill": (40, 40), "decode": (1, 200), "no keys": (3, 0), "no queries": (0, 5)}
TYPES = {DType.FLOAT32: (ir.DataType.FLOAT, np.float32), DType.FLOAT16: (ir.DataType.FLOAT16, np.float16)}
LIMIT = {DType.FLOAT32: 2e-6, DType.FLOAT16: 2e-3}


def on_card(spec: GroupedQueryAttention, dtype: DType, arch: str = ARCH) -> Choice:
    found = select(spec, Device("cuda", arch), dtype)
    assert found is not None
    return found


CHOICES = [on_card(spec, dtype) for spec, dtype in PAIRS.values()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The stand-in for the driver, and the library with its operators for cards given to the CPU's provider."""
    folder = tmp_path_factory.mktemp("card")
    files = {"library.cpp": source(CHOICES), "card_binaries.cpp": ort_card.compiled(CHOICES, folder)}
    for name, text in files.items():
        (folder / name).write_text(text)
    driver = [str(Path(__file__).with_name("driver_on_host.cpp")), "-Wl,-soname,libcuda.so.1", "-fvisibility=default"]
    library = [*(str(folder / name) for name in files), '-DCARD_PROVIDER="CPUExecutionProvider"']
    made = {}
    for name, sources in (("driver", driver), ("library", library)):
        made[name] = str(folder / f"{name}.so")
        command = [*find_compiler().command, *BASE_FLAGS, *LINK_FLAGS, "-O1", *sources, "-o", made[name]]
        subprocess.run(command, check=True, capture_output=True)
    return made


def run(built: dict[str, str], folder: Path, cases: Sequence[tuple[str, str]], arch: int = 90) -> dict[str, Any]:
    """What the worker answers; cases are names of `PAIRS` and `LENGTHS`."""
    described = []
    for name, length in cases:
        spec, dtype = PAIRS[name]
        stem = f"{name}-{length}".replace(" ", "-")
        (folder / f"{stem}.onnx").write_bytes(_model(spec, TYPES[dtype][0]))
        np.savez(folder / f"{stem}.npz", **_feeds(spec, *LENGTHS[length], TYPES[dtype][1]))
        described.append(
            {
                "spec": asdict(spec),
                "dtype": dtype.value,
                "model": str(folder / f"{stem}.onnx"),
                "feeds": str(folder / f"{stem}.npz"),
            }
        )
    task = {**built, "arch": arch, "built_for": ARCH, "cases": described}
    command = [sys.executable, "-m", "tests.kernels.card_worker"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, input=json.dumps(task) + "\n", capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def right(spec: GroupedQueryAttention, feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}
    return grouped_query_attention(spec, wide["q"], wide["k"], wide["v"], wide.get("bias"), wide.get("sinks"))


def test_launches_compute_what_the_oracle_does(built: dict[str, str], tmp_path: Path) -> None:
    cases = [(name, length) for name in PAIRS for length in LENGTHS]
    answer = run(built, tmp_path, cases)
    for (name, length), found in zip(cases, answer["cases"], strict=True):
        spec, dtype = PAIRS[name]
        assert not found.get("trouble") and "error" not in found, (name, length, found)
        suffixes = {kernel.rsplit("_", 1)[-1] for kernel in found["launched"]} & {"split", "join"}
        wanted: set[str] = {"split", "join"} if length == "decode" else set()
        assert suffixes == wanted and bool(found["launched"]) == (length in ("prefill", "decode")), found["launched"]
        feeds = _feeds(spec, *LENGTHS[length], TYPES[dtype][1])
        out = np.load(found["output"])
        expected = right(spec, feeds)
        assert out.shape == expected.shape
        if length in ("prefill", "decode"):
            assert np.abs(out - expected).max() < LIMIT[dtype]
            other = right(replace(spec, scale=spec.scale * 1.05), feeds)
            assert np.abs(out - other).max() > LIMIT[dtype], "the control: another scale"
        else:
            assert (out == 0).all(), "an empty sum"
    assert answer["live"] == 0, "memory between kernels is given back"


def test_a_card_of_another_generation_is_told(built: dict[str, str], tmp_path: Path) -> None:
    (found,) = run(built, tmp_path, [("causal", "prefill")], arch=100)["cases"]
    assert "on this device" in found["error"] and "rewriter kernels" in found["error"] and not found["launched"]


def test_one_library_serves_processors_too(kernel_cache: Path, tmp_path: Path) -> None:
    """Without a card and a driver, the operator for processors runs."""
    spec, dtype = CAUSAL, DType.FLOAT16
    made = build([choice(spec, dtype), on_card(spec, dtype)])
    feeds = _feeds(spec, 5, 40, np.float16)
    found = _session(spec, made.path, tmp_path, ir.DataType.FLOAT16).run(None, feeds)[0]
    assert np.abs(found - right(spec, feeds)).max() < LIMIT[dtype]
    assert sorted(made.sources) == sorted(["library", choice(spec, dtype).name])


def test_what_has_no_operator_for_cards() -> None:
    sparse = replace(CAUSAL, pattern=(Sight(reach=9, ordered=True),))
    with pytest.raises(NotLegal, match="sparse"):
        source([on_card(sparse, DType.FLOAT16)])
    mixing = select(FourierMixing(64), Device("cuda", ARCH), DType.FLOAT16)
    assert mixing is not None
    with pytest.raises(NotLegal, match="FourierMixing"):
        source([mixing])
