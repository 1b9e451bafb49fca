"""Opening .onnx files: every way in which one can be broken or unsafe is an error with a hint."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from rewriter.capture.onnx_load import from_proto, load, to_proto
from rewriter.errors import InvalidModelFile, UnsupportedModel, UsageError
from rewriter.install.onnx_write import save


def model() -> onnx.ModelProto:
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Add", ["h", "b"], ["y"])],
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 64])],
        [
            nh.from_array(np.arange(4096, dtype=np.float32).reshape(64, 64), "w"),
            nh.from_array(np.ones(64, np.float32), "b"),
        ],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8, producer_name="test")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    onnx.save(model(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    save(from_proto(model()), tmp_path / "p.onnx", external_data="always")
    return tmp_path / "p.onnx"


def refused(path: Path, kind: type[Exception] = InvalidModelFile) -> str:
    with pytest.raises(kind) as caught:
        load(path)
    assert getattr(caught.value, "hint", ""), "an error without a hint"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sound_files_load(single: Path, pair: Path) -> None:
    for path in (single, pair):
        loaded = load(path)
        assert loaded.opset_imports[""] == 17 and loaded.producer_name == "test"
        assert (loaded.graph.initializers["w"].const_value.numpy().reshape(-1) == np.arange(4096)).all()


def test_external_weights_are_not_read(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir.ExternalTensor, "_load", lambda self: pytest.fail("weights were read"))
    assert isinstance(load(pair).graph.initializers["w"].const_value, ir.ExternalTensor)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "no.onnx", UsageError)
    assert "is no file" in refused(tmp_path, UsageError)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "no ONNX model"),
        (b"hello", "no ONNX model"),
        (b"\0" * 64, "no ONNX model"),
        (b"PK\x03\x04" + b"\0" * 100, "no ONNX model"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "f.onnx").write_bytes(content)
    assert words in refused(tmp_path / "f.onnx")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "pytorch_model.bin"])
def test_weights_without_a_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + b"\0" * 100)
    assert "weights without a model" in refused(tmp_path / name)


def test_random_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(500):
        (tmp_path / "r.onnx").write_bytes(rng.randbytes(rng.randint(1, 400)))
        refused(tmp_path / "r.onnx")


def test_truncated_anywhere(single: Path) -> None:
    """No proper prefix of the file loads; onnx_ir alone would accept some."""
    data = single.read_bytes()
    lengths = {*range(1, 200), *range(200, len(data), 97), *range(len(data) - 100, len(data))}
    for length in sorted(lengths):
        single.write_bytes(data[:length])
        refused(single)


def test_trailing_garbage(single: Path) -> None:
    single.write_bytes(single.read_bytes() + b"\x12\x34")
    refused(single)


def _broken(change: Callable[[onnx.ModelProto], object], tmp_path: Path) -> Path:
    proto = model()
    change(proto)
    (tmp_path / "b.onnx").write_bytes(proto.SerializeToString())
    return tmp_path / "b.onnx"


def _branches(reads: str = "x", gives: str = "inside") -> onnx.NodeProto:
    """An If, one of whose branches may read or give what is not there."""
    info = oh.make_tensor_value_info(gives, onnx.TensorProto.FLOAT, None)
    body = oh.make_graph([oh.make_node("Identity", [reads], ["inside"])], "branch", [], [info])
    return oh.make_node("If", ["w"], ["chosen"], then_branch=body, else_branch=body)


def test_bodies_read_what_is_around_them(tmp_path: Path) -> None:
    load(_broken(lambda p: p.graph.node.append(_branches()), tmp_path))


def test_names_of_a_file_reach_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """onnx_ir warns of what it does not find, with the name as it stands in the file."""

    def unused(proto: onnx.ModelProto) -> None:
        body = oh.make_graph([oh.make_node("Identity", ["\x1b[31m"], ["y"])], "b", [], [])
        node = oh.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        proto.functions.append(oh.make_function("f", "F", ["c"], ["y"], [node], [oh.make_opsetid("", 18)]))

    assert "\x1b" not in refused(_broken(unused, tmp_path))
    assert not caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.ClearField("graph"), "graph"),
        (lambda p: p.graph.ClearField("output"), "no outputs"),
        (lambda p: p.ClearField("opset_import"), "operator set"),
        (lambda p: setattr(p.graph.initializer[0], "raw_data", b"123"), "3 bytes instead of 16,384"),
        (lambda p: p.graph.initializer[0].dims.__setitem__(0, -1), "negative size"),
        (lambda p: setattr(p.graph.initializer[0], "data_type", 999), "unknown type 999"),
        (lambda p: p.graph.node[0].ClearField("input"), "has 0 inputs"),
        (lambda p: p.graph.node[0].input.__setitem__(0, "nowhere"), "which nothing makes"),
        (lambda p: p.graph.node[0].input.extend("abcdefghij"), "inputs"),
        (lambda p: setattr(p.graph.initializer[0], "data_type", 0), "'w' has no type"),
        (lambda p: p.graph.node[0].attribute.add(name="axis", i=1), "'axis' of node '' has no type"),
        (lambda p: setattr(p.graph.output[0], "name", "nowhere"), "nothing makes 'nowhere', an output of the graph"),
        (lambda p: p.graph.node.append(_branches(reads="nowhere")), "reads 'nowhere', which nothing makes"),
        (lambda p: p.graph.node.append(_branches(gives="nowhere")), "nothing makes 'nowhere', an output of the body"),
        (lambda p: p.graph.input.append(p.graph.input[0]), "an input 'x' twice"),
        (lambda p: p.graph.node.append(p.graph.node[0]), "twice"),
        (lambda p: p.graph.initializer.append(nh.from_array(np.ones(3, np.float32), "w")), "two initializers called"),
        (
            lambda p: p.graph.node[0].attribute.extend([oh.make_attribute("a", 1)] * 2),
            "attribute of one node 'a' twice",
        ),
        (lambda p: p.opset_import.append(oh.make_opsetid("ai.onnx", 3)), "two versions of the operator set"),
        (lambda p: setattr(p.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -1), "a negative size"),
        (lambda p: p.graph.node.append(oh.make_node("Constant", [], ["c"], falue=1)), "no value, but 'falue'"),
        (lambda p: p.graph.node.append(oh.make_node("Constant", [], ["c"], value_int="1")), "no value, but"),
    ],
)
def test_structure(tmp_path: Path, change: Callable[[onnx.ModelProto], object], words: str) -> None:
    assert words in refused(_broken(change, tmp_path))


def _calls(node: onnx.NodeProto, **functions: list[str]) -> Callable[[onnx.ModelProto], None]:
    """Functions of domain "f" by name, each of one input that it hands to those that it calls, one after the other."""

    def change(proto: onnx.ModelProto) -> None:
        opsets = [oh.make_opsetid("", 17), oh.make_opsetid("f", 1)]
        for name, called in functions.items():
            values = ["a", *(f"t{i}" for i in range(len(called) - 1)), "b"]
            body = [
                oh.make_node(op, [values[i]], [values[i + 1]], domain="" if op == "Relu" else "f")
                for i, op in enumerate(called)
            ]
            proto.functions.append(oh.make_function("f", name, ["a"], ["b"], body, opsets))
        proto.opset_import.append(opsets[1])
        proto.graph.node.append(node)

    return change


def _call(name: str) -> onnx.NodeProto:
    return oh.make_node(name, ["h"], ["unread"], domain="f")


BOMB = {"A0": ["Relu"], **{f"A{i}": [f"A{i - 1}"] * 10 for i in range(1, 8)}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_calls(_call("A"), A=["A"]), "calls itself"),
        (_calls(_call("A"), A=["Relu", "B"], B=["C"], C=["Relu", "B"]), "'B' calls itself"),
        (_calls(_call("Relu"), A=["A"]), "calls itself"),
        (_calls(_call("A7"), **BOMB), "more than 1,000,000 nodes"),
    ],
    ids=["itself", "through others", "uncalled", "ten million nodes"],
)
def test_functions_without_end(tmp_path: Path, change: Callable[[onnx.ModelProto], object], words: str) -> None:
    """Some runtimes write them out for ever."""
    assert words in refused(_broken(change, tmp_path))


def test_functions_that_end(tmp_path: Path) -> None:
    chain = {f"A{i}": [f"A{i - 1}"] if i else ["Relu"] for i in range(3000)}
    load(_broken(_calls(_call("A2999"), **chain), tmp_path))
    load(_broken(_calls(_call("A3"), **{name: BOMB[name] for name in ("A0", "A1", "A2", "A3")}), tmp_path))


@pytest.mark.parametrize(
    "kind",
    [onnx.TensorProto.FLOAT, onnx.TensorProto.INT4, onnx.TensorProto.COMPLEX64],
    ids=["float", "int4", "complex"],
)
def test_elements_listed_one_by_one(tmp_path: Path, kind: int) -> None:
    def change(proto: onnx.ModelProto, size: int) -> None:
        values = [1] * 8 if kind == onnx.TensorProto.INT4 else [1.0] * 8
        proto.graph.initializer.append(oh.make_tensor("listed", kind, [8], values))
        proto.graph.initializer[-1].dims[0] = size

    load(_broken(lambda p: change(p, 8), tmp_path))
    for size in (2, 9, 10**12):
        assert "instead of" in refused(_broken(lambda p, n=size: change(p, n), tmp_path))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """protobuf hands such names out as bytes, which no comparison with text survives."""
    proto = model()
    name = proto.graph.node[0].output[0]
    body = oh.make_graph([], "inner_graph", [], [])
    proto.graph.node[0].doc_string, proto.graph.doc_string = "a remark", "another one"
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "any_number"
    holder = proto.graph.node.add(op_type="Held", domain="somewhere")
    holder.attribute.append(oh.make_attribute("body", body))
    content = proto.SerializeToString()
    assert content.count(name.encode()) >= 1
    for text in (name, proto.producer_name, "a remark", "another one", "any_number", "inner_graph"):
        assert text and text.encode() in content
        (tmp_path / "b.onnx").write_bytes(content.replace(text.encode(), b"\xff" * len(text)))
        assert "no text" in refused(tmp_path / "b.onnx")


def test_parts_that_would_be_lost(tmp_path: Path) -> None:
    sparse = oh.make_sparse_tensor(
        nh.from_array(np.ones(1, np.float32), "s"), nh.from_array(np.zeros(1, np.int64), "i"), [4]
    )
    path = _broken(lambda p: p.graph.sparse_initializer.append(sparse), tmp_path)
    assert "sparse" in refused(path, UnsupportedModel)
    path = _broken(lambda p: p.training_info.add(), tmp_path)
    assert "training" in refused(path, UnsupportedModel)


# --- external data -------------------------------------------------------------------------------


def _relocate(path: Path, **entries: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(proto.SerializeToString())


def test_data_missing_or_short(pair: Path) -> None:
    data = pair.with_name("p.onnx.data")
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "cut off: 1 bytes of 'w' are missing" in refused(pair)
    data.unlink()
    assert "is missing" in refused(pair)
    data.write_bytes(content)
    load(pair)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": ""}, "makes no sense"),
        ({"location": "a\0b"}, "makes no sense"),
        ({"offset": "-4096"}, "makes no sense"),
        ({"offset": "abc"}, "makes no sense"),
        ({"length": "12"}, "makes no sense"),
        ({"offset": "99999999999999999999"}, "cut off"),
        ({"location": "../p.onnx.data"}, "outside"),
        ({"location": "x/../../p.onnx.data"}, "outside"),
        ({"location": "..\\p.onnx.data"}, "outside"),
        ({"location": "C:\\p.onnx.data"}, "outside"),
        ({"location": "*/_ORT_MEM_ADDR_/*"}, "outside"),
        ({"location": "/etc/hostname"}, "outside"),
    ],
)
def test_places_that_lead_astray(pair: Path, entries: dict[str, str], words: str) -> None:
    _relocate(pair, **entries)
    assert words in refused(pair)


def test_weights_in_a_function_that_lie_outside(tmp_path: Path) -> None:
    """A branch in a function holds weights as the graph does, and is held to the same."""
    (tmp_path / "secret").write_bytes(bytes(8))
    folder = tmp_path / "model"
    folder.mkdir()

    def written(location: str) -> Path:
        tensor = onnx.TensorProto(name="w", dims=[2], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        output = oh.make_tensor_value_info("z", 1, [2])
        branch = oh.make_graph([oh.make_node("Identity", ["w"], ["z"])], "branch", [], [output], [tensor])
        choose = oh.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        opset = oh.make_opsetid("", 17)
        function = oh.make_function("own", "Chosen", ["c"], ["y"], [choose], [opset])
        graph = oh.make_graph(
            [oh.make_node("Chosen", ["c"], ["y"], domain="own")], "g",
            [oh.make_tensor_value_info("c", 9, [])], [oh.make_tensor_value_info("y", 1, [2])],
        )  # fmt: skip
        opsets = [opset, oh.make_opsetid("own", 1)]
        made = oh.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
        (folder / "m.onnx").write_bytes(made.SerializeToString())
        return folder / "m.onnx"

    assert "outside" in refused(written("../secret"))
    assert "outside" in refused(written(str(tmp_path / "secret")))
    (folder / "data").write_bytes(bytes(8))
    assert load(written("data")) is not None, "the control"


@pytest.mark.parametrize(("offset", "length"), [("4096", "256"), ("0", "256"), ("16380", "256")])
def test_tensors_that_overlap(pair: Path, offset: str, length: str) -> None:
    """One in the middle of another, at its beginning, over its end; all of "w" by another name is no fault."""
    proto = onnx.load(pair, load_external_data=False)
    w = next(t for t in proto.graph.initializer if t.name == "w")
    assert {e.key: e.value for e in w.external_data}["length"] == "16384", "what the places below refer to"

    def write(place: str, size: str) -> Path:
        other = onnx.TensorProto(name="other", data_type=w.data_type, dims=[int(size) // 4])
        other.data_location = w.data_location
        for key, value in (("location", "p.onnx.data"), ("offset", place), ("length", size)):
            other.external_data.add(key=key, value=value)
        both = onnx.ModelProto()
        both.CopyFrom(proto)
        both.graph.initializer.append(other)
        path = pair.with_name("overlap.onnx")
        path.write_bytes(both.SerializeToString())
        return path

    with pair.with_name("p.onnx.data").open("ab") as data:
        data.write(bytes(4096))
    assert "overlap" in refused(write(offset, length))
    load(write("0", "16384"))


def test_link_out_of_the_folder(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    data = pair.with_name("p.onnx.data")
    os.rename(data, secret)
    data.symlink_to(secret)
    assert "outside" in refused(pair)


def test_link_inside_the_folder(pair: Path) -> None:
    data = pair.with_name("p.onnx.data")
    os.rename(data, pair.with_name("real"))
    data.symlink_to("real")
    assert load(pair).graph.initializers["w"].const_value.numpy()[0, 1] == 1


def test_hard_link(pair: Path) -> None:
    os.link(pair.with_name("p.onnx.data"), pair.with_name("twin"))
    assert "hard link" in refused(pair)


def test_download_cache_with_links_to_blobs(pair: Path, tmp_path: Path) -> None:
    """Model and data are both links into one folder of blobs, as hub clients lay them out."""
    blobs, view = tmp_path / "blobs", tmp_path / "view"
    blobs.mkdir()
    view.mkdir()
    os.rename(pair, blobs / "aa")
    os.rename(pair.with_name("p.onnx.data"), blobs / "bb")
    (view / "p.onnx").symlink_to("../blobs/aa")
    (view / "p.onnx.data").symlink_to("../blobs/bb")
    loaded = load(view / "p.onnx")
    assert loaded.graph.initializers["w"].const_value.numpy()[0, 1] == 1
    save(loaded, tmp_path / "copy.onnx")
    assert load(tmp_path / "copy.onnx").graph.initializers["w"].const_value.numpy()[0, 1] == 1
    # control: the model itself is no link, so its data may not be elsewhere
    (view / "q.onnx").write_bytes((blobs / "aa").read_bytes())
    assert "outside" in refused(view / "q.onnx")


# --- protos --------------------------------------------------------------------------------------


def test_protos_go_in_and_out(pair: Path) -> None:
    assert to_proto(from_proto(model())).graph.node == model().graph.node
    proto = to_proto(load(pair))
    assert [t.data_location for t in proto.graph.initializer] == [0, 0]
    assert (nh.to_array(proto.graph.initializer[0]).reshape(-1) == np.arange(4096)).all()


def test_nodes_that_stand_before_what_they_read() -> None:
    proto = model()
    first = proto.graph.node.pop(0)
    proto.graph.node.append(first)
    body = oh.make_graph(
        [oh.make_node("Identity", ["y"], ["inner"])], "body", [], [oh.make_tensor_value_info("inner", 1, None)]
    )
    chosen = oh.make_node("If", ["flag"], ["z"], then_branch=body, else_branch=body)
    proto.graph.node.insert(0, chosen)  # its body reads y, which stands last
    proto.graph.input.append(oh.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    assert [n.op_type for n in from_proto(proto).graph] == ["MatMul", "Add", "If"]
    proto.graph.node[2].input[0] = "y"
    with pytest.raises(InvalidModelFile, match="cycle"):
        from_proto(proto)


@pytest.mark.parametrize("last", ("flag", "q"), ids=("out of order", "cycle"))
def test_nodes_of_a_body_that_stand_before_what_they_read(last: str) -> None:
    proto = model()
    proto.graph.input.append(oh.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    nodes = [oh.make_node("Not", ["p"], ["q"]), oh.make_node("Identity", [last], ["p"])]
    body = oh.make_graph(nodes, "body", [], [oh.make_tensor_value_info("q", onnx.TensorProto.BOOL, None)])
    proto.graph.node.append(oh.make_node("If", ["flag"], ["z"], then_branch=body, else_branch=body))
    if last == "q":
        with pytest.raises(InvalidModelFile, match="cycle"):
            from_proto(proto)
        return
    chosen = list(from_proto(proto).graph)[-1]
    assert [n.op_type for n in chosen.attributes["then_branch"].as_graph()] == ["Identity", "Not"]


def test_a_body_that_reads_what_its_own_node_makes() -> None:
    proto = model()
    proto.graph.input.append(oh.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    body = oh.make_graph(
        [oh.make_node("Identity", ["z"], ["q"])], "body", [], [oh.make_tensor_value_info("q", 1, None)]
    )
    proto.graph.node.append(oh.make_node("If", ["flag"], ["z"], then_branch=body, else_branch=body))
    with pytest.raises(InvalidModelFile, match="cycle"):
        from_proto(proto)


def test_proto_whose_weights_are_elsewhere(pair: Path) -> None:
    with pytest.raises(UnsupportedModel, match="external file"):
        from_proto(onnx.load(pair, load_external_data=False))
