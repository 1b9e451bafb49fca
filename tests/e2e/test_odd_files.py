"""Files that are valid and strange, or nearly valid: the right result, or an error with a hint, and in bounded time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

import rewriter
from benchmarks.scale_models import Stack, write
from passes.dataflow import Flow
from rewriter.capture.onnx_file import capture
from rewriter.capture.quantised import quantised_product
from rewriter.errors import InvalidModelFile, RewriteError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(Stack(1, hidden=16, inner=16, heads=4), tmp_path / "in.onnx", external=False)


def _weight(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == "layers.0.q")


@pytest.mark.parametrize("external", ["never", "always"])
def test_texts_among_the_weights_stay(source: Path, tmp_path: Path, external: str) -> None:
    model = onnx.load(source)
    model.graph.initializer.append(oh.make_tensor("labels", onnx.TensorProto.STRING, [2], ["yes", "no"]))
    onnx.save(model, source)
    done = rewriter.optimize(source, "mqa")
    done.save(tmp_path / "out.onnx", external_data=external)
    written = onnx.load(tmp_path / "out.onnx")
    assert list(next(t for t in written.graph.initializer if t.name == "labels").string_data) == [b"yes", b"no"]
    assert rewriter.verify(tmp_path / "out.onnx", source).ok
    assert [t.name for t in rewriter.optimize(model, "mqa").graph.initializer].count("labels") == 1


def _few_texts(model: onnx.ModelProto) -> None:
    tensor = oh.make_tensor("labels", onnx.TensorProto.STRING, [2], ["yes", "no"])
    tensor.dims[0] = 10**12
    model.graph.initializer.append(tensor)


def _no_type(model: onnx.ModelProto) -> None:
    _weight(model).data_type = 0


def _complex(model: onnx.ModelProto) -> None:
    weight = _weight(model)
    weight.data_type, weight.raw_data = onnx.TensorProto.COMPLEX64, bytes(2048)


def _four_bits(model: onnx.ModelProto) -> None:
    weight = _weight(model)
    weight.data_type, weight.raw_data = onnx.TensorProto.INT4, bytes(128)


def _no_columns(model: onnx.ModelProto) -> None:
    weight = _weight(model)
    weight.dims[1], weight.raw_data = 0, b""


def _many_axes(model: onnx.ModelProto) -> None:
    weight = _weight(model)
    weight.dims[:] = [*[1] * 500, 16, 16]


def _version(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 0


def _endless_range(model: onnx.ModelProto) -> None:
    numbers = {"start": 0, "end": 2**40, "step": 1}
    model.graph.initializer.extend(nh.from_array(np.array(n, np.int64), name) for name, n in numbers.items())
    model.graph.node.append(oh.make_node("Range", list(numbers), ["numbers"]))
    model.graph.output.append(oh.make_tensor_value_info("numbers", onnx.TensorProto.INT64, None))


def _empty_and_endless(model: onnx.ModelProto) -> None:
    model.graph.input.append(oh.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, [0, 1, 10**12, 10**12]))


BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], None], type[RewriteError], str]] = {
    "few texts": (_few_texts, InvalidModelFile, "2 texts"),
    "no type": (_no_type, InvalidModelFile, "has no type"),
    "complex": (_complex, RewriteError, "."),
    "four bits": (_four_bits, RewriteError, "."),
    "no columns": (_no_columns, RewriteError, "."),
    "many axes": (_many_axes, RewriteError, "."),
    "version": (_version, InvalidModelFile, "names version 0"),
    "empty and endless": (_empty_and_endless, RewriteError, "too many to make up"),
    "endless range": (_endless_range, RewriteError, "."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_told(source: Path, name: str) -> None:
    change, kind, words = BROKEN[name]
    model = onnx.load(source)
    change(model)
    source.write_bytes(model.SerializeToString())
    with pytest.raises(kind, match=words) as caught:
        rewriter.optimize(source, "mqa")
    assert caught.value.hint and "\n" not in str(caught.value)


def _computed(source: Path, depth: int) -> Flow:
    """A file whose query weight is itself `depth` times added to itself: few nodes, and 2 ** depth ways up."""
    model, value = onnx.load(source), "layers.0.q"
    reader = next(n for n in model.graph.node if value in n.input)
    for i in range(depth):
        model.graph.node.append(oh.make_node("Add", [value, value], [f"sum{i}"]))
        value = f"sum{i}"
    reader.input[1] = value
    source.write_bytes(model.SerializeToString())
    from rewriter.capture.onnx_load import load

    return capture(load(source)).flow


def test_constants_of_many_ways_up_are_walked_once(source: Path) -> None:
    flow = _computed(source, 1500)
    assert flow.weights_above("sum1499") == ["layers.0.q"] == flow.weights_above("layers.0.q")
    assert flow.weights_above(flow.inputs[0]) == []


def test_deep_constants_end_in_a_result(source: Path) -> None:
    _computed(source, 100)
    assert [s["kind"] for s in rewriter.inspect(source).to_dict()["sites"]] == ["attention", "feed_forward"]


def _names(model: onnx.ModelProto) -> set[str]:
    return {name for n in model.graph.node for name in n.output} | {t.name for t in model.graph.initializer}


def _branch(model: onnx.ModelProto, names: list[str]) -> None:
    """An If whose branches make values of these names, one out of the other."""

    def body(last: str) -> onnx.GraphProto:
        chain = [oh.make_node("Neg", [a], [b]) for a, b in zip(["h0", *names], [*names, last], strict=True)]
        return oh.make_graph(chain, last, [], [oh.make_tensor_value_info(last, 1, None)])

    model.graph.input.append(oh.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    model.graph.node.append(oh.make_node("If", ["flag"], ["chosen"], then_branch=body("t"), else_branch=body("e")))
    model.graph.output.append(oh.make_tensor_value_info("chosen", 1, [None, None, 16]))


def _stored(model: onnx.ModelProto, names: list[str]) -> None:
    model.graph.initializer.extend(nh.from_array(np.ones(1, np.float32), name) for name in names)


@pytest.mark.parametrize("take", [_branch, _stored], ids=["in_bodies", "as_weights"])
def test_names_that_a_rewrite_would_give_are_taken(
    source: Path, take: Callable[[onnx.ModelProto, list[str]], None]
) -> None:
    model = onnx.load(source)
    names = sorted(_names(rewriter.optimize(model, "mqa")) - _names(model))
    assert len(names) > 2
    take(model, names)
    done = rewriter.optimize(model, "mqa")
    assert not set(names) & {name for node in done.graph.node for name in node.output}
    assert rewriter.verify(done, model).ok


@pytest.mark.parametrize("name", ["product", "blocks"])
def test_operators_that_lack_their_parts_are_no_products(name: str) -> None:
    x = ir.Value(name="x")
    node = ir.Node("", "Mul", [x]) if name == "product" else ir.Node("com.microsoft", "MatMulNBits", [x, x, x])
    assert quantised_product(node) is None
