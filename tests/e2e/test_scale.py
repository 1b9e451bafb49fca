"""What large files, long graphs and many rewrites take: memory, work and open files, counted and not timed."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import rewriter
from benchmarks.scale import rewrite_often
from benchmarks.scale_models import Stack, write
from passes import replay
from passes.weights import projection
from rewriter.capture.onnx_file import capture
from rewriter.capture.onnx_load import load
from rewriter.capture.unread import drop_unread
from rewriter.verify.tensors import same_bits

# ------------------------------------------------------------------ memory


def test_a_file_is_rewritten_without_torch(project_root: Path, tmp_path: Path) -> None:
    source = write(Stack(1, hidden=16, inner=16, heads=4), tmp_path / "in.onnx")
    program = (
        "import sys, rewriter; rewriter.optimize(sys.argv[1], 'mqa').save(sys.argv[2]); "
        "print(*{'torch', 'transformers', 'scipy'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", program, str(source), str(tmp_path / "out.onnx")]
    done = subprocess.run(words, cwd=project_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.onnx").exists() and not done.stdout.split()


@pytest.mark.parametrize("transposed", [False, True], ids=["in_first", "out_first"])
def test_weights_are_widened_block_by_block(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    rng = np.random.default_rng(0)
    x, matrix = rng.integers(-9, 9, (3, 50)).astype(np.float64), rng.integers(-9, 9, (50, 7)).astype(np.float32)
    matrix = np.asfortranarray(matrix) if transposed else matrix
    monkeypatch.setattr(replay, "_WIDENED", 64)  # 9 rows at a time, and 5 at the end
    found = replay.widened_product(x, matrix)
    assert found.dtype == np.float64 and (found == x @ matrix).all()
    matrix[49, 6] += 1
    assert (found != x @ matrix).any(), "the last row counts"


def test_products_of_large_single_precision_weights_are_near_enough() -> None:
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((5, 1500)), rng.standard_normal((1500, 700), np.float32)
    exact = x @ matrix.astype(np.float64)
    off = np.abs(replay.widened_product(x, matrix) - exact).max() / np.abs(exact).max()
    assert 0 < off < 1e-6, "float32 within a block"
    assert np.abs(replay.widened_product(x, matrix.astype(np.float64)) - exact).max() < 1e-12
    small = replay.widened_product(x[:, :50], matrix[:50])
    assert np.abs(small - x[:, :50] @ matrix[:50].astype(np.float64)).max() < 1e-12


def test_weights_are_turned_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    matrix, columns = rng.standard_normal((50, 7), np.float32), rng.permutation(7)[:5]
    monkeypatch.setattr(projection, "_BLOCK", 4)
    found = projection.transposed(matrix, columns)
    assert found.dtype == np.float32 and found.flags.c_contiguous and (found == matrix.T[columns]).all()
    assert (found != projection.transposed(matrix, columns[::-1])).any(), "the control"


def _external(
    folder: Path, offset: int, dtype: ir.DataType = ir.DataType.FLOAT, name: str = "data"
) -> ir.TensorProtocol:
    shape = ir.Shape([4])
    return ir.ExternalTensor(name, offset, 16, dtype, shape=shape, name="w", base_dir=str(folder))


def test_one_stretch_of_one_file_is_not_read_to_be_compared(tmp_path: Path) -> None:
    assert same_bits(_external(tmp_path, 0), _external(tmp_path, 0)), "and there is no file"
    (tmp_path / "data").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    assert not same_bits(_external(tmp_path, 0), _external(tmp_path, 16))
    assert not same_bits(_external(tmp_path, 0), _external(tmp_path, 0, ir.DataType.INT32))
    (tmp_path / "copy").write_bytes((tmp_path / "data").read_bytes())
    assert same_bits(_external(tmp_path, 0), _external(tmp_path, 0, name="copy"))


# ------------------------------------------------------------------ work


def _calls(work: Callable[[], object]) -> int:
    """Of functions, built-in ones included, while `work` runs."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def _growth(work: Callable[[int], object]) -> float:
    """What the last 6 of 18 layers take, beside the 6 before; 1 if work grows with their number."""
    work(6)  # what happens once happens here
    six, twelve, eighteen = (_calls(lambda n=n: work(n)) for n in (6, 12, 18))  # type: ignore[misc]
    return (eighteen - twelve) / (twelve - six)


def test_work_grows_with_the_length_of_a_graph(tmp_path: Path) -> None:
    paths = {
        n: write(Stack(n, hidden=16, inner=16, heads=4), tmp_path / f"{n}.onnx", external=False) for n in (6, 12, 18)
    }
    assert _growth(lambda n: rewriter.optimize(paths[n], "mqa")) < 1.05


def test_an_unrecorded_value_is_not_searched_for(tmp_path: Path) -> None:
    """However deep it lies."""

    def calls(layers: int) -> int:
        captured = capture(load(write(Stack(layers, hidden=16, inner=16, heads=4), tmp_path / f"{layers}.onnx")))
        held = captured.constants
        last = captured.model.graph.outputs[0].name or ""

        def ask() -> None:
            with pytest.raises(KeyError):
                held.value(last)

        ask()
        return _calls(ask)

    assert calls(2) == calls(8)


def test_weights_that_nothing_reads_do_not_reach_onnxruntime() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, bool flag, float[2] default) => (float[2] y, float[2] kept)
        <float[2] default = {1, 2}, float[2] kept = {1, 2}, float[2] inner = {1, 2}, float[2] unread = {1, 2}> {
            y = If (flag) <then_branch = a () => (float[2] t) { t = Add(x, inner) },
                           else_branch = b () => (float[2] e) { e = Neg(x) }>
        }"""
    )
    proto = ir.to_proto(model)
    assert drop_unread(proto, model) == {"unread"}
    assert [tensor.name for tensor in proto.graph.initializer] == ["default", "kept", "inner"]
    assert not drop_unread(proto, ir.from_proto(proto))


def test_control_work_that_grows_faster_is_seen() -> None:
    assert _growth(lambda n: [len("") for _ in range(n) for _ in range(n)]) > 1.5


# ------------------------------------------------------------------ many rewrites


def test_rewrites_leave_no_file_open_and_no_object_behind(tmp_path: Path) -> None:
    """What an allocator holds settles after hundreds of rewrites, which is for `benchmarks.scale`."""
    source = write(Stack(1, hidden=32, inner=32, heads=4), tmp_path / "in.onnx", external=False)

    def left(times: int) -> tuple[int, int]:
        files = rewrite_often(str(source), str(tmp_path / "out.onnx"), str(times))["files"]
        gc.collect()
        return min(files), len(gc.get_objects())

    left(10)
    files, objects = zip(*(left(10) for _ in range(4)), strict=True)
    assert max(files) <= files[0]
    # what each rewrite leaves behind is there every time, what other tests' threads and caches do is not
    assert min(b - a for a, b in pairwise(objects)) < 10, "less than one for each rewrite"
