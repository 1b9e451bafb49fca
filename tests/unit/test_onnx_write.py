"""Writing .onnx files: whole or not at all, in place, with and without a data file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import onnxruntime as ort
import pytest

from rewriter.capture.onnx_load import load
from rewriter.errors import UnsupportedModel, UsageError
from rewriter.install import onnx_write
from rewriter.install.onnx_write import save

_ROOT = Path(__file__).resolve().parents[2]


def model(fill: float = 0.5, tensors: int = 3, side: int = 64) -> onnx.ModelProto:
    """y = x @ w0 @ w1 ..., plus one small and one string-free int tensor that must stay inline."""
    nodes = [oh.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], name=f"m{i}") for i in range(tensors)]
    nodes.append(oh.make_node("Reshape", [f"h{tensors}", "shape"], ["y"]))
    weights = [nh.from_array(np.full((side, side), fill, np.float32), f"w{i}") for i in range(tensors)]
    weights.append(nh.from_array(np.array([-1, side], np.int64), "shape"))
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("h0", onnx.TensorProto.FLOAT, ["n", side])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", side])],
        weights,
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8, producer_name="test")


def weights(path: Path) -> dict[str, np.ndarray]:
    loaded = load(path)
    return {name: v.const_value.numpy().copy() for name, v in loaded.graph.initializers.items()}


def run(path: Path, side: int = 64) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"h0": np.full((2, side), 0.01, np.float32)})[0]


def data_files(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.name.endswith((".data", ".tmp")))


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_saved_model_equals_original(tmp_path: Path, mode: str) -> None:
    proto = model()
    save(ir.from_proto(proto), tmp_path / "out.onnx", external_data=mode)
    assert data_files(tmp_path) == (["out.onnx.data"] if mode == "always" else [])
    again = onnx.load(tmp_path / "out.onnx")
    assert again.graph.node == proto.graph.node
    assert {t.name: nh.to_array(t).tobytes() for t in again.graph.initializer} == {
        t.name: nh.to_array(t).tobytes() for t in proto.graph.initializer
    }
    assert run(tmp_path / "out.onnx").shape == (2, 64)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


def test_streamed_file_is_canonical_protobuf(tmp_path: Path) -> None:
    """The hand-written wire format parses to the same proto that protobuf itself would have written."""
    proto = model()
    save(ir.from_proto(proto), tmp_path / "out.onnx", external_data="never")
    expected = ir.to_proto(ir.from_proto(proto))
    assert onnx.ModelProto.FromString((tmp_path / "out.onnx").read_bytes()) == expected
    expected.graph.initializer[0].raw_data = expected.graph.initializer[1].raw_data[:-1] + b"x"
    assert onnx.ModelProto.FromString((tmp_path / "out.onnx").read_bytes()) != expected


def test_model_in_memory_is_unchanged(tmp_path: Path) -> None:
    loaded = ir.from_proto(model())
    before = {name: v.const_value for name, v in loaded.graph.initializers.items()}
    save(loaded, tmp_path / "out.onnx", external_data="always")
    assert all(v.const_value is before[name] for name, v in loaded.graph.initializers.items())


def test_small_tensors_stay_in_the_model_file(tmp_path: Path) -> None:
    save(ir.from_proto(model()), tmp_path / "out.onnx", external_data="always")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    external = {t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert external == {"w0", "w1", "w2"}


@pytest.mark.parametrize("first", ["always", "never"])
@pytest.mark.parametrize("second", ["auto", "always", "never"])
def test_output_may_be_the_input(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "m.onnx"
    save(ir.from_proto(model(0.25)), path, external_data=first)
    loaded = load(path)
    loaded.graph.initializers["w1"].const_value = ir.Tensor(np.full((64, 64), 2.0, np.float32), name="w1")
    save(loaded, path, external_data=second)
    found = weights(path)
    assert (found["w0"] == 0.25).all() and (found["w1"] == 2.0).all() and (found["w2"] == 0.25).all()
    assert len(data_files(tmp_path)) == int(second == "always" or (second == "auto" and first == "always"))
    # and the model in memory is still good for more
    save(loaded, tmp_path / "later.onnx")
    assert (weights(tmp_path / "later.onnx")["w0"] == 0.25).all()


def test_overwriting_drops_the_old_data_file_and_only_that(tmp_path: Path) -> None:
    save(ir.from_proto(model(1.0)), tmp_path / "a.onnx", external_data="always")
    save(ir.from_proto(model(2.0)), tmp_path / "b.onnx", external_data="always")
    save(ir.from_proto(model(3.0)), tmp_path / "a.onnx", external_data="always")
    assert (weights(tmp_path / "a.onnx")["w0"] == 3.0).all()
    assert (weights(tmp_path / "b.onnx")["w0"] == 2.0).all()
    assert len(data_files(tmp_path)) == 2
    save(ir.from_proto(model(4.0)), tmp_path / "a.onnx", external_data="never")
    assert data_files(tmp_path) == ["b.onnx.data"]


@pytest.mark.parametrize("name", ["other.onnx", "a.onnx.bak", "a.onnx~"])
def test_data_file_of_another_model_is_never_touched(tmp_path: Path, name: str) -> None:
    save(ir.from_proto(model(1.0)), tmp_path / "a.onnx", external_data="always")
    os.rename(tmp_path / "a.onnx", tmp_path / name)  # still points to a.onnx.data
    save(ir.from_proto(model(2.0)), tmp_path / "a.onnx", external_data="always")
    save(ir.from_proto(model(3.0)), tmp_path / "a.onnx", external_data="never")
    assert (weights(tmp_path / name)["w0"] == 1.0).all()
    assert (weights(tmp_path / "a.onnx")["w0"] == 3.0).all()


def test_data_of_a_model_that_is_not_here_is_kept(tmp_path: Path) -> None:
    """A file of the usual name that neither the old output nor a killed call used: somebody's, for want of a model."""
    (tmp_path / "a.onnx.data").write_bytes(b"of a model that is still being downloaded")
    for version, mode in ((1.0, "always"), (2.0, "always"), (3.0, "never")):
        save(ir.from_proto(model(version)), tmp_path / "a.onnx", external_data=mode)
        assert (weights(tmp_path / "a.onnx")["w0"] == version).all()
        assert len(data_files(tmp_path)) == 1 + int(mode == "always")
    assert (tmp_path / "a.onnx.data").read_bytes() == b"of a model that is still being downloaded"


@pytest.mark.parametrize("moment", ["data", "model"])
def test_data_of_a_killed_call_go(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the renaming of the data, or of the model: what nobody uses any more goes with the next call."""
    if moment == "model":
        save(ir.from_proto(model(1.0)), tmp_path / "a.onnx", external_data="always")
    pid = os.fork()
    if not pid:
        left = {"data": 1, "model": 2}[moment]
        replace = os.replace

        def killed(source: Path, target: Path) -> None:
            nonlocal left
            replace(source, target)
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(os, "replace", killed)
        save(ir.from_proto(model(2.0)), tmp_path / "a.onnx", external_data="always")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert "a.onnx.data" in data_files(tmp_path)
    save(ir.from_proto(model(3.0)), tmp_path / "a.onnx", external_data="never")
    assert (weights(tmp_path / "a.onnx")["w0"] == 3.0).all()
    assert [f.name for f in tmp_path.iterdir()] == ["a.onnx"]


def test_initializers_of_subgraphs_survive(tmp_path: Path) -> None:
    inner = nh.from_array(np.arange(4096, dtype=np.float32), "inner")
    branch = oh.make_graph(
        [oh.make_node("Add", ["x", "inner"], ["z"])], "then",
        [], [oh.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [4096])], [inner],
    )  # fmt: skip
    other = oh.make_graph(
        [oh.make_node("Identity", ["x"], ["z2"])], "else",
        [], [oh.make_tensor_value_info("z2", onnx.TensorProto.FLOAT, [4096])],
    )  # fmt: skip
    graph = oh.make_graph(
        [oh.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)], "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4096]),
         oh.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4096])],
    )  # fmt: skip
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    for mode in ("always", "never"):
        path = tmp_path / f"{mode}.onnx"
        save(ir.from_proto(proto), path, external_data=mode)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        out = session.run(None, {"x": np.zeros(4096, np.float32), "c": np.array(True)})[0]
        assert (out == np.arange(4096)).all()


def test_weights_held_lazily_are_written(tmp_path: Path) -> None:
    loaded = ir.from_proto(model())
    calls: list[int] = []

    def make() -> ir.Tensor:
        calls.append(1)
        return ir.Tensor(np.full((64, 64), 7.0, np.float32), name="w0")

    loaded.graph.initializers["w0"].const_value = ir.LazyTensor(
        make, dtype=ir.DataType.FLOAT, shape=ir.Shape((64, 64)), name="w0", cache=False
    )
    for mode in ("always", "never"):
        save(loaded, tmp_path / f"{mode}.onnx", external_data=mode)
        assert (weights(tmp_path / f"{mode}.onnx")["w0"] == 7.0).all()
    assert calls


def test_tensors_of_one_stretch_stay_one(tmp_path: Path) -> None:
    """A few bytes could name one large tensor a thousand times, and the output would fill any disk."""
    onnx.save(model(), tmp_path / "model.onnx")
    save(load(tmp_path / "model.onnx"), tmp_path / "in.onnx", external_data="always")
    loaded = load(tmp_path / "in.onnx")
    large = max(loaded.graph.initializers.values(), key=lambda v: v.const_value.nbytes if v.const_value else 0)
    held = large.const_value
    assert isinstance(held, ir.ExternalTensor)
    for number in range(50):
        again = ir.ExternalTensor(
            held.location, held.offset, held.length, held.dtype, shape=held.shape, name=f"again{number}",
            base_dir=held.base_dir,
        )  # fmt: skip
        loaded.graph.register_initializer(ir.Value(name=again.name, const_value=again))
    save(loaded, tmp_path / "out.onnx", external_data="always")
    sizes = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in ("in", "out")]
    assert sizes[1] < sizes[0] + 8192
    back = load(tmp_path / "out.onnx")
    for name in ("again0", "again49", *loaded.graph.initializers):
        old, new = (m.graph.initializers[name].const_value for m in (loaded, back))
        assert old is not None and new is not None and (old.numpy() == new.numpy()).all()


def test_missing_folder_and_folder_as_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        save(ir.from_proto(model()), tmp_path / "no" / "out.onnx")
    with pytest.raises(UsageError, match="is a folder"):
        save(ir.from_proto(model()), tmp_path)


def test_too_large_for_one_file_is_refused(tmp_path: Path) -> None:
    loaded = ir.from_proto(model())
    loaded.graph.initializers["w0"].const_value = ir.LazyTensor(
        lambda: pytest.fail("read"), dtype=ir.DataType.FLOAT, shape=ir.Shape((1 << 15, 1 << 15)), name="w0"
    )
    with pytest.raises(UnsupportedModel, match="do not fit"):
        save(loaded, tmp_path / "out.onnx", external_data="never")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interruption_leaves_the_old_output(tmp_path: Path, mode: str, error: type[BaseException]) -> None:
    path = tmp_path / "out.onnx"
    save(ir.from_proto(model(1.0)), path, external_data=mode)
    names = sorted(f.name for f in tmp_path.iterdir())
    loaded = ir.from_proto(model(2.0))

    def fail() -> ir.Tensor:
        raise error

    loaded.graph.initializers["w2"].const_value = ir.LazyTensor(
        fail, dtype=ir.DataType.FLOAT, shape=ir.Shape((64, 64)), name="w2", cache=False
    )
    with pytest.raises(error):
        save(loaded, path, external_data=mode)
    assert sorted(f.name for f in tmp_path.iterdir()) == names
    assert all((w == 1.0).all() for name, w in weights(path).items() if name != "shape")


_WRITER = """
import sys
import numpy as np, onnx_ir as ir
from rewriter.capture.onnx_load import load
from rewriter.install.onnx_write import save
out, mode = sys.argv[1:]
model = load(out)
print("ready", flush=True)
version = 1.0
while True:
    version += 1
    for name, value in model.graph.initializers.items():
        if name != "shape":
            value.const_value = ir.Tensor(np.full((256, 256), version, np.float32), name=name)
    save(model, out, external_data=mode)
"""


@pytest.mark.parametrize("mode", ["always", "never"])
def test_killed_while_writing(tmp_path: Path, mode: str) -> None:
    """kill -9 at random moments: the output is always one version, whole; leftovers go with the next call."""
    path = tmp_path / "out.onnx"
    save(ir.from_proto(model(1.0, tensors=8, side=256)), path, external_data=mode)
    rng = random.Random(0)
    seen: set[float] = set()
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", _WRITER, str(path), mode], stdout=subprocess.PIPE, cwd=_ROOT)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.001, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        values = {float(v) for name, w in weights(path).items() if name != "shape" for v in np.unique(w)}
        assert len(values) == 1
        seen |= values
        run(path, 256)
    assert len(seen) > 1, "the writer was never fast enough to write anything"
    save(load(path), path, external_data=mode)
    assert len(data_files(tmp_path)) == int(mode == "always")


def test_temporaries_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead = tmp_path / f".out.onnx.{child.pid}-0123abcd.tmp"
    alive = tmp_path / f".out.onnx.{os.getppid()}-0123abce.tmp"
    foreign = tmp_path / f".other.onnx.{child.pid}-0123abcd.tmp"
    orphan = tmp_path / "out.onnx.0123abcd.data"
    awaited = tmp_path / "out.onnx.0123abce.data"
    for file in (dead, alive, foreign, orphan, awaited):
        file.write_bytes(b"x")
    save(ir.from_proto(model()), tmp_path / "out.onnx")
    assert {f.name for f in tmp_path.iterdir()} == {alive.name, foreign.name, awaited.name, "out.onnx"}


_PEAK = """
import sys, threading
import numpy as np, onnx_ir as ir
import onnx
from rewriter.capture.onnx_load import load
from rewriter.install.onnx_write import save

def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) // 1024

model = load(sys.argv[1])
for name, value in model.graph.initializers.items():
    if name != "shape" and int(name[1:]) % 2:
        value.const_value = ir.LazyTensor(
            lambda: ir.Tensor(np.full((2048, 2048), 1.0, np.float32)),
            dtype=ir.DataType.FLOAT, shape=ir.Shape((2048, 2048)), name=name, cache=False)
base, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
save(model, sys.argv[2], external_data=sys.argv[3])
done.set()
thread.join()
print(peak[0] - base)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
@pytest.mark.parametrize("mode", ["always", "never"])
def test_memory_is_bounded_by_a_few_tensors(tmp_path: Path, mode: str) -> None:
    """20 tensors of 16 MB are written with room for a few of them."""
    source = tmp_path / "in.onnx"
    save(ir.from_proto(model(1.0, tensors=20, side=2048)), source, external_data="always")
    command = [sys.executable, "-c", _PEAK, str(source), str(tmp_path / "out.onnx"), mode]
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=_ROOT).stdout)
    assert extra < 80, f"{extra} MB"
    assert (weights(tmp_path / "out.onnx")["w3"] == 1.0).all()


def test_auto_switches_at_the_single_file_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_write, "SINGLE_FILE_LIMIT", 3 * 64 * 64 * 4)
    save(ir.from_proto(model(tensors=2)), tmp_path / "small.onnx")
    assert data_files(tmp_path) == []
    save(ir.from_proto(model(tensors=4)), tmp_path / "large.onnx")
    assert data_files(tmp_path) == ["large.onnx.data"]
