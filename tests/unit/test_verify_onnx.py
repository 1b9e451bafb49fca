"""Verification of a rewritten .onnx file: what it must accept, and each thing that it must catch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import pytest

from passes.drift import cosines, divergences
from rewriter.errors import InvalidModelFile
from rewriter.install.onnx_write import save
from rewriter.verify.drift import Drift
from rewriter.verify.kv_cache import cache_ports
from rewriter.verify.onnx_pair import tolerance, verify_onnx
from rewriter.verify.record import read_record
from rewriter.verify.result import Verification

VOCABULARY, WIDTH, HEADS, DIM = 32, 16, 4, 4


def weights() -> dict[str, np.ndarray]:
    """Of a decoder layer whose key/value heads are equal in pairs: two of four suffice."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) / 4

    tied = {f"w{name}": np.repeat(random(WIDTH, 2, 1, DIM), 2, axis=2).reshape(WIDTH, -1) for name in "kv"}
    return {"table": random(VOCABULARY, WIDTH), "wq": random(WIDTH, WIDTH), "head": random(WIDTH, VOCABULARY), **tied}


def decoder(
    kv_heads: int, *, change: Callable[[dict[str, np.ndarray]], object] | None = None, **record: object
) -> ir.Model:
    """Ids and a cache to logits and a longer cache, by the standard Attention operator."""
    arrays = weights()
    if kv_heads < HEADS:
        for name in ("wk", "wv"):
            arrays[name] = arrays[name].reshape(WIDTH, kv_heads, -1, DIM)[:, :, 0].reshape(WIDTH, -1)
    if change is not None:
        change(arrays)
    nodes = [oh.make_node("Gather", ["table", "ids"], ["x"])]
    nodes += [oh.make_node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"]
    nodes.append(
        oh.make_node(
            "Attention", ["q", "k", "v", "", "past_key", "past_value"], ["mixed", "present_key", "present_value"],
            q_num_heads=HEADS, kv_num_heads=kv_heads, is_causal=1,
        )
    )  # fmt: skip
    nodes += [oh.make_node("Add", ["mixed", "x"], ["y"]), oh.make_node("MatMul", ["y", "head"], ["logits"])]

    def cache(name: str, length: str) -> onnx.ValueInfoProto:
        return oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", kv_heads, length, DIM])

    graph = oh.make_graph(
        nodes, "g",
        [oh.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "sequence"]),
         cache("past_key", "past"), cache("past_value", "past")],
        [oh.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "sequence", VOCABULARY]),
         cache("present_key", "total"), cache("present_value", "total")],
        [nh.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    model = ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=10))
    if record:
        site = {
            "name": "layer 0",
            "from": "mha4",
            "to": f"gqa{kv_heads}",
            "exact": True,
            "changed": ["wk", "wv"],
            **record,
        }
        model.metadata_props["rewriter.version"] = "0"
        model.metadata_props["rewriter.target"] = f"gqa{kv_heads}"
        model.metadata_props["rewriter.sites"] = json.dumps([site])
    return model


def outcome(found: Verification) -> dict[str, bool]:
    return {check.name: check.ok for check in found.checks}


def detail(found: Verification, name: str) -> str:
    return next(check.detail for check in found.checks if check.name == name)


def test_exact_rewrite_with_fewer_heads_in_its_cache() -> None:
    found = verify_onnx(decoder(2, exact=True), decoder(4))
    assert found.ok and found.fidelity is not None
    assert outcome(found) == dict.fromkeys(
        ("valid", "interface", "untouched", "loads", "runs", "finite", "exact"), True
    )
    assert "prefill and 2 decode steps" in detail(found, "runs")
    assert found.fidelity.max_abs < 1e-5 and found.fidelity.cosine > 0.999999
    assert found.fidelity.kl is not None and found.fidelity.kl < 1e-6
    assert found.to_dict()["ok"] is True


@pytest.mark.parametrize("name", ["wk", "wv"])
def test_control_a_perturbed_twin_is_caught(name: str) -> None:
    found = verify_onnx(decoder(2, exact=True, change=lambda a: a[name].__iadd__(0.05)), decoder(4))
    assert [check.name for check in found.failures] == ["exact"]


def test_a_wrong_cache_shows_only_in_decode_steps() -> None:
    """The presents are swapped: prefill logits are right, and the next step's are not."""
    swapped = decoder(2, exact=True)
    attention = next(node for node in swapped.graph if node.op_type == "Attention")
    attention.outputs[1].name, attention.outputs[2].name = "present_value", "present_key"
    swapped.graph.outputs[1:] = [swapped.graph.outputs[2], swapped.graph.outputs[1]]
    found = verify_onnx(swapped, decoder(4))
    assert [check.name for check in found.failures] == ["exact"]


def test_lossy_drift_is_reported_and_not_judged() -> None:
    found = verify_onnx(decoder(2, exact=False, change=lambda a: a["wv"].__imul__(-1)), decoder(4))
    assert found.ok and "exact" not in outcome(found)
    assert found.fidelity is not None and found.fidelity.max_abs > 0.01 and found.fidelity.cosine < 0.9999
    assert found.fidelity.kl is not None and found.fidelity.kl > 0


@pytest.mark.parametrize("change", [lambda a: a["head"].__setitem__((3, 4), 9.0), lambda a: a.pop("head")])
def test_undeclared_changes(change: Callable[[dict[str, np.ndarray]], object]) -> None:
    after = decoder(2, exact=False, change=lambda a: change(a))
    found = verify_onnx(after, decoder(4))
    assert not outcome(found)["untouched"] and "'head'" in detail(found, "untouched")


def test_declared_changes_are_allowed() -> None:
    after = decoder(2, exact=False, changed=["wk", "wv", "head"], change=lambda a: a["head"].__imul__(1.5))
    assert verify_onnx(after, decoder(4)).ok


def test_without_a_record_everything_must_be_the_same() -> None:
    assert verify_onnx(decoder(4), decoder(4)).ok
    found = verify_onnx(decoder(2), decoder(4))
    assert not outcome(found)["untouched"] and "records no rewrite" in detail(found, "untouched")


def test_not_a_number() -> None:
    found = verify_onnx(decoder(2, exact=False, change=lambda a: a["wv"].__setitem__((0, 0), np.nan)), decoder(4))
    assert [check.name for check in found.failures] == ["finite"]


def test_invalid_graphs() -> None:
    after = decoder(2, exact=True)
    node = next(node for node in after.graph if node.op_type == "Add")
    node.attributes["nonsense"] = ir.AttrInt64("nonsense", 1)
    found = verify_onnx(after, decoder(4))
    assert not outcome(found)["valid"] and not outcome(found)["loads"]
    assert found.fidelity is None and not found.ok


def test_what_the_original_fails_too_is_not_held_against_it() -> None:
    """A declared output shape that inference contradicts: strict inference fails for both."""

    def odd(model: ir.Model) -> ir.Model:
        model.graph.outputs[0].shape = ir.Shape(["batch", "sequence", 5])
        return model

    found = verify_onnx(odd(decoder(2, exact=True)), odd(decoder(4)))
    assert outcome(found)["valid"] and detail(found, "valid").startswith("as the original")
    assert not outcome(verify_onnx(odd(decoder(2, exact=True)), decoder(4)))["valid"]


def test_it_loads_and_does_not_run() -> None:
    after = decoder(2, exact=True)
    node = next(node for node in after.graph if node.op_type == "Gather")
    shift = ir.Value(name="shift", const_value=ir.Tensor(np.array(100, np.int64), name="shift"))
    after.graph.register_initializer(shift)
    moved = ir.node("Add", [node.inputs[1], shift])
    moved.outputs[0].name = "moved"
    after.graph.insert_before(node, moved)
    node.replace_input_with(1, moved.outputs[0])
    found = verify_onnx(after, decoder(4))
    assert outcome(found)["loads"] and not outcome(found)["runs"]


def test_another_interface() -> None:
    after = decoder(2, exact=True)
    after.graph.outputs[1].name = "renamed"
    found = verify_onnx(after, decoder(4))
    assert not outcome(found)["interface"] and "renamed" in detail(found, "interface")


SITE = '[{"name": "x", "from": "a", "to": "b", "exact": true, "changed": [], "caches": %s}]'


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '[{"name": "x"}]', "[" * 5000, SITE % '[["y"]]', SITE % '[["y", "z"]]', SITE % '"y"']
)
def test_malformed_records(text: str) -> None:
    model = decoder(2, exact=True)
    model.metadata_props["rewriter.sites"] = text
    with pytest.raises(InvalidModelFile, match="malformed"):
        read_record(model)


def test_records_with_and_without_caches() -> None:
    model = decoder(2, exact=True)
    for text, caches in ((SITE % '[["y", 1]]', {"y": 1}), (SITE.replace(', "caches": %s', ""), {})):
        model.metadata_props["rewriter.sites"] = text
        record = read_record(model)
        assert record is not None and record.caches == caches


def test_paths_and_models_in_memory_agree(tmp_path: Path) -> None:
    save(decoder(2, exact=True), tmp_path / "after.onnx", external_data="always")
    save(decoder(4), tmp_path / "before.onnx", external_data="never")
    on_disk = verify_onnx(tmp_path / "after.onnx", str(tmp_path / "before.onnx"))
    assert on_disk == verify_onnx(decoder(2, exact=True), decoder(4))


def test_runs_repeat_to_the_bit() -> None:
    lossy = decoder(2, exact=False, change=lambda a: a["wk"].__imul__(0.5))
    assert verify_onnx(lossy, decoder(4)) == verify_onnx(lossy, decoder(4))


# --- the parts -----------------------------------------------------------------------------------


def test_cosine_and_divergence() -> None:
    x, y = np.array([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 2.0], [0.0, 0.0], [6.0, 8.0]])
    assert cosines(x, y) == pytest.approx([0, 1, 1])
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    expected = (p * np.log(p / q)).sum()
    assert divergences(np.log(p)[None] + 3, np.log(q)[None] - 5) == pytest.approx([expected])


def test_padding_counts_for_the_largest_difference_only() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 20)).astype(np.float32)
    y = x.copy()
    y[1, 2] = -x[1, 2]
    keep = np.array([[True, True, True], [True, True, False]])
    drift = Drift(logits=True)
    drift.add(x, y, keep)
    found = drift.fidelity()
    assert found is not None and found.cosine == pytest.approx(1) and found.kl == pytest.approx(0)
    assert found.max_abs == pytest.approx(2 * np.abs(x[1, 2]).max())
    control = Drift(logits=True)
    control.add(x, y)
    changed = control.fidelity()
    assert changed is not None and changed.cosine == pytest.approx(1 - 2 / 6) and (changed.kl or 0) > 0.1


def test_width_decides_what_logits_are() -> None:
    narrow = decoder(4)
    narrow.graph.outputs[0].name = "scores"
    found = verify_onnx(narrow, narrow)
    assert found.fidelity is not None and found.fidelity.kl == 0, "as wide as the table"
    table = narrow.graph.initializers["table"]
    table.const_value = ir.Tensor(np.zeros((40, WIDTH), np.float32), name="table")
    table.shape = ir.Shape((40, WIDTH))
    found = verify_onnx(narrow, narrow)
    assert found.fidelity is not None and found.fidelity.kl is None


def test_tolerance_follows_the_type() -> None:
    model = decoder(4)
    assert tolerance(model) == 1e-4
    model.graph.initializers["wq"].dtype = ir.DataType.FLOAT16
    assert tolerance(model) == 2e-2


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.key", "present_key_values.0.key"),
        ("past_key_0", "present_key_0"),
        ("past.0.decoder.key", "present.0.decoder.key"),
        ("cache_k_in", "something_else"),
    ],
)
def test_caches_are_paired_by_name_or_order(past: str, present: str) -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[B,1,P,4] p, float[B,N,4] x) => (float[B,1,T,4] main, float[B,1,T,4] q) <int64[1] one = {1}>
        { n = Unsqueeze(x, one) q = Concat<axis = 2>(p, n) main = Relu(q) }"""
    )
    model.graph.inputs[0].name, model.graph.outputs[1].name = past, present
    ports = cache_ports(model)
    assert ports.present[past] == present
