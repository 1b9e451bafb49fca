"""A long graph that is run in stretches gives what it gives as a whole, or says that it cannot be cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import onnxruntime as ort
import pytest

import rewriter
from benchmarks.scale_models import Stack, write
from rewriter.capture import onnx_session
from rewriter.capture.onnx_load import load
from rewriter.capture.onnx_session import open_session
from rewriter.capture.stretches import CannotCut, Port, Stretches, open_stretches
from rewriter.install.onnx_write import save
from rewriter.verify import session
from rewriter.verify.onnx_pair import verify_onnx
from rewriter.verify.session import cpu_session
from rewriter.verify.tensors import differing_tensors

OPENED = partial(open_session, folder=None, optimise=False)
X = np.random.default_rng(0).standard_normal((2, 3, 16), np.float32)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(Stack(2, hidden=16, inner=16, heads=4), tmp_path_factory.mktemp("stack") / "in.onnx", external=False)


def _model(nodes: list[onnx.NodeProto], outputs: list[str], inputs: dict[str, int] | None = None) -> onnx.ModelProto:
    shapes = inputs or {"x": onnx.TensorProto.FLOAT}
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info(name, kind, None) for name, kind in shapes.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [nh.from_array(np.array(2, np.float32), "two")],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("size", [1, 7, 46])
def test_stretches_give_what_the_whole_gives(stack: Path, size: int) -> None:
    proto = onnx.load(stack)
    more = [name for node in proto.graph.node for name in node.output if "/weights" in name or "/q4" in name]
    parts = open_stretches(proto, more, OPENED, size)
    assert len(parts.stretches) == -(-len(proto.graph.node) // size)
    assert parts.get_inputs() == (Port("h0", "tensor(float)"),)
    names = [port.name for port in parts.get_outputs()]
    assert names == [proto.graph.output[0].name, *more]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    whole = OPENED(proto).run(names, {"h0": X})
    for answer in (parts.run(None, {"h0": X}), parts.run(names, {"h0": X})):
        assert all((a == b).all() for a, b in zip(whole, answer, strict=True))
    control = parts.run(None, {"h0": X + 1})
    assert all((a != b).any() for a, b in zip(whole, control, strict=True))


def test_bodies_read_what_stands_before_a_cut() -> None:
    def body(name: str, read: str) -> onnx.GraphProto:
        inner = [oh.make_node("Add", [read, "two"], ["inside"]), oh.make_node("Mul", ["inside", "x"], [name])]
        return oh.make_graph(inner, name, [], [onnx.ValueInfoProto(name=name)])

    nodes = [
        oh.make_node("Neg", ["x"], ["minus"]),
        oh.make_node("Abs", ["x"], ["plus"]),
        oh.make_node("If", ["flag"], ["y"], then_branch=body("a", "minus"), else_branch=body("b", "plus")),
    ]
    model = _model(nodes, ["y"], {"x": onnx.TensorProto.FLOAT, "flag": onnx.TensorProto.BOOL})
    parts = open_stretches(model, (), OPENED, 1)
    assert [sorted(stretch.fed) for stretch in parts.stretches] == [["x"], ["x"], ["flag", "minus", "plus", "x"]]
    for flag, read in ((True, -X), (False, abs(X))):
        assert (parts.run(None, {"x": X, "flag": np.array(flag)})[0] == (read + 2) * X).all()


def test_what_nothing_reads_is_not_run() -> None:
    nodes = [oh.make_node("Neg", ["x"], ["unread"]), oh.make_node("Abs", ["x"], ["y"])]
    assert len(open_stretches(_model(nodes, ["y"]), (), OPENED, 1).stretches) == 1


UNCUT = {
    "no order": _model([oh.make_node("Neg", ["a"], ["y"]), oh.make_node("Abs", ["x"], ["a"])], ["y"]),
    "a sequence passes": _model(
        [oh.make_node("SequenceConstruct", ["x"], ["s"]), oh.make_node("ConcatFromSequence", ["s"], ["y"], axis=0)],
        ["y"],
    ),
    "an input is an output": _model([oh.make_node("Neg", ["x"], ["y"])], ["y", "x"]),
}


@pytest.mark.parametrize("case", UNCUT)
def test_what_cannot_be_cut(case: str) -> None:
    with pytest.raises(CannotCut):
        open_stretches(UNCUT[case], (), OPENED, 1)
    assert len(OPENED(UNCUT[case]).run(None, {"x": X})[0]), "as a whole it runs"


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in (onnx_session, session):
        monkeypatch.setattr(user, "STRETCH", 8)
        monkeypatch.setattr(user, "open_stretches", partial(open_stretches, size=8))


@pytest.fixture(scope="module")
def rewritten(stack: Path) -> ir.Model:
    return load(_saved(stack, stack.with_name("whole.onnx")))


def _saved(source: Path, output: Path) -> Path:
    rewriter.optimize(source, "mqa").save(output)
    return output


@pytest.mark.usefixtures("short_stretches")
def test_a_long_file_is_rewritten_as_a_short_one_is(stack: Path, rewritten: ir.Model, tmp_path: Path) -> None:
    parts = load(_saved(stack, tmp_path / "parts.onnx"))
    assert [n.op_type for n in rewritten.graph] == [n.op_type for n in parts.graph]
    assert not differing_tensors(parts, rewritten, frozenset())
    checked = verify_onnx(parts, load(stack))
    assert checked.ok and "in 5 parts" in next(c.detail for c in checked.checks if c.name == "loads")
    last = parts.graph.initializers["layers.1.down"]
    assert last.const_value is not None
    last.const_value = ir.tensor(np.full_like(last.const_value.numpy(), np.nan), name="layers.1.down")
    assert "finite" in {c.name for c in verify_onnx(parts, load(stack)).failures}, "the last part counts"


def test_weights_in_files_and_in_memory_reach_their_stretch(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = load(write(Stack(2, hidden=16, inner=16, heads=4), tmp_path / "in.onnx"))
    save(model, tmp_path / "inline.onnx", external_data="never")
    whole = cpu_session(model)
    request.getfixturevalue("short_stretches")
    for name in ("in.onnx", "inline.onnx"):
        parts = cpu_session(load(tmp_path / name))
        assert isinstance(parts, Stretches) and isinstance(whole, ort.InferenceSession)
        assert (parts.run(None, {"h0": X})[0] == whole.run(None, {"h0": X})[0]).all()
