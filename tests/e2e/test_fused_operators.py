"""Files whose attention is one fused operator with caches, rotations or packing of its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import rewriter
from rewriter.capture.fused import unfuse, writer
from rewriter.capture.onnx_load import from_proto, load
from rewriter.errors import NothingToRewrite, RewriteError, UnsupportedModel
from rewriter.onnx_rewrite import match_onnx
from tests.targets.fused_files import DIM, FUSED, HEADS, LAYERS, FusedCase, fused_file, group_query, with_lengths
from tests.targets.fused_files import model as write
from tests.targets.lossless_twin import distance, session

EXACT, LOSSY = 1e-4, 1e-3
SEES_ALL = {"mha-bias-mask", "mha-split-bias", "mha-heads-bias", "mha-cache-outside", "attention24-mask-softcap"}
"""Those that are not causal."""

ON_CPU = [name for name in FUSED if "packed-qkv" not in name and "packed-kv" not in name]
Array = NDArray[Any]

every_form = pytest.mark.parametrize("name", ON_CPU)


def kv_heads(case: FusedCase) -> int:
    return 2 * case.pooled


@every_form
def test_what_the_operator_does_inside_is_read(name: str, tmp_path: Path) -> None:
    case = FUSED[name]
    captured, matches = match_onnx(load(fused_file(name, tmp_path)))
    assert matches.refusals == () and len(matches.sites) == LAYERS
    for layer, site in enumerate(matches.sites):
        assert site.layer == layer and (site.heads, site.kv_heads, site.head_dim) == (HEADS, kv_heads(case), DIM)
        assert site.causal is (name not in SEES_ALL)
        assert site.cached is case.cached
        turned = "rotary" in name or "window" in name or "turned" in name or name in {"gqa-grouped", "gqa-no-cache"}
        assert (site.k.rotary is not None) is (turned or name == "gqa-normed-before")
        kinds = {m.kind for m in site.modifiers}
        assert ("softcap" in kinds) is ("softcap" in name) and ("sinks" in kinds) is ("sinks" in name)
        assert site.qk_norm is ("normed" in name) and site.replay_error < 1e-5
        for operand, part in ((site.k, "key"), (site.v, "value")):
            assert operand.past == (f"past_key_values.{layer}.{part}" if case.cached else None)
            assert operand.presents == (((f"present.{layer}.{part}", 1),) if case.cached else ())
    assert captured.written_out.keys() == {s.owner for s in matches.sites}


@every_form
def test_a_lossless_twin_is_exact_and_a_perturbed_one_is_not(name: str, tmp_path: Path) -> None:
    case = FUSED[name]
    for tied in (True, False):
        source = fused_file(name, tmp_path, tied=tied)
        out = tmp_path / "out.onnx"
        done = rewriter.optimize(source, f"gqa{case.pooled}")
        done.save(out)
        assert [row.exact for row in done.rewrite_report.sites] == [tied] * LAYERS
        assert done.rewrite_report.fidelity is not None
        before, after = steps(source, case, kv_heads(case)), steps(out, case, case.pooled)
        worst = max(distance(a["logits"], b["logits"]) for a, b in zip(after, before, strict=True))
        assert worst <= EXACT if tied else worst > LOSSY
        if tied:
            assert_same_caches(before, after)
        check_structure(case, source, out)


def assert_same_caches(before: list[dict[str, Array]], after: list[dict[str, Array]]) -> None:
    for old, new in zip(before, after, strict=True):
        for name in (n for n in old if n.startswith("present")):
            assert old[name].shape[1] == 2 * new[name].shape[1]
            assert distance(np.repeat(new[name], 2, axis=1), old[name]) <= EXACT


def check_structure(case: FusedCase, source: Path, out: Path) -> None:
    """The operator is kept, with its attributes, where it can group heads; else a function call stands there."""
    before, after = onnx.load(source), onnx.load(out)
    fused = [n for n in before.graph.node if n.op_type.endswith("Attention")]
    if not case.native:
        assert not any(n.domain == "com.microsoft" and n.op_type == fused[0].op_type for n in after.graph.node)
        assert sum(n.domain == "rewriter.ops" for n in after.graph.node) == LAYERS
        return
    kept = [n for n in after.graph.node if n.op_type == fused[0].op_type]
    for old, new in zip(fused, kept, strict=True):
        assert (new.name, new.domain, list(new.output)) == (old.name, old.domain, list(old.output))
        assert list(new.input)[3:] == list(old.input)[3:]
        mine, theirs = ({a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in (new, old))
        if "kv_num_heads" in theirs:
            assert (mine.pop("kv_num_heads"), theirs.pop("kv_num_heads")) == (case.pooled, kv_heads(case))
        assert mine == theirs
    softmaxes = [n.op_type for n in after.graph.node if n.op_type in {"Softmax", "Range", "Expand"}]
    assert softmaxes == [n.op_type for n in before.graph.node if n.op_type in {"Softmax", "Range", "Expand"}]


@pytest.mark.parametrize("name", ["gqa-packed-rotary", "gqa-normed-before", "attention23-flat"])
def test_caches_may_leave_heads_and_features_open(name: str, tmp_path: Path) -> None:
    """As onnxruntime-genai's builder declares them. Made-up caches do not count in a row's error."""
    case, out = FUSED[name], tmp_path / "out.onnx"
    for tied in (True, False):
        source = fused_file(name, tmp_path, tied=tied)
        model = onnx.load(source)
        for value in (v for v in (*model.graph.input, *model.graph.output) if v.name.startswith(("past", "present"))):
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
        onnx.save(model, source)
        done = rewriter.optimize(source, f"gqa{case.pooled}")
        done.save(out)
        rows = done.rewrite_report.sites
        assert [row.exact for row in rows] == [tied] * LAYERS
        for row in rows:  # norms of keys are not computed outside the program
            assert row.error is None or (row.error < EXACT if tied else row.error > LOSSY)
        before, after = steps(source, case, kv_heads(case)), steps(out, case, case.pooled)
        worst = max(distance(a["logits"], b["logits"]) for a, b in zip(after, before, strict=True))
        assert worst <= EXACT if tied else worst > LOSSY


@pytest.mark.parametrize("tied", [True, False], ids=["twin", "one-head-untied"])
def test_caches_that_hold_a_window_only_get_fewer_heads(tied: bool, tmp_path: Path) -> None:
    """A buffer as long as the window goes in and out (gpt-oss by onnxruntime-genai); it has seen 20 tokens here."""
    window, source, out = 4, tmp_path / "source.onnx", tmp_path / "out.onnx"
    attend = group_query(do_rotary=1, sink=True, local_window_size=window, sliding_window_cache=1)
    small = rewriter.optimize(write(attend, source, tied=tied, prepare=with_lengths), "gqa2")
    small.save(out)
    assert [row.exact for row in small.rewrite_report.sites] == [tied] * LAYERS
    rng = np.random.default_rng(0)
    for length in (1, 3, 6):
        feeds = {"input_ids": rng.integers(0, 64, (1, length)), "attention_mask": np.ones((1, 20 + length), np.int64)}
        opened = {heads: session(path) for heads, path in ((2, out), (HEADS, source))}
        pasts = [i.name for i in opened[2].get_inputs() if i.name.startswith("past")]
        held = {name: rng.standard_normal((1, 2, window, DIM)).astype(np.float32) for name in pasts}
        found = {
            heads: one.run(None, feeds | {n: np.repeat(a, heads // 2, axis=1) for n, a in held.items()})
            for heads, one in opened.items()
        }
        for after, before in zip(found[2][1:], found[HEADS][1:], strict=True):
            assert after.shape == (1, 2, window, DIM) and (
                not tied or distance(np.repeat(after, 2, axis=1), before) <= EXACT
            )
        worst = distance(found[2][0], found[HEADS][0])
        assert worst <= EXACT if tied else worst > LOSSY


@pytest.mark.parametrize("name", ["gqa-rotary", "gqa-window-softcap"])
def test_sequences_of_different_lengths_go_on_working(name: str, tmp_path: Path) -> None:
    """Matching sees equal lengths only; the operator that is kept takes a length for each sequence."""
    case = FUSED[name]
    worst = {}
    for tied in (True, False):
        source, out = fused_file(name, tmp_path, tied=tied), tmp_path / "out.onnx"
        rewriter.optimize(source, f"gqa{case.pooled}").save(out)
        before, after = steps(source, case, kv_heads(case), short=2), steps(out, case, case.pooled, short=2)
        pairs = [(a["logits"], b["logits"]) for a, b in zip(after, before, strict=True)]
        pairs[0] = (pairs[0][0][:, :4], pairs[0][1][:, :4])  # beyond, the second prompt is padding
        worst[tied] = max(distance(a, b) for a, b in pairs)
        whole = steps(source, case, kv_heads(case))
        assert distance(before[1]["logits"][1], whole[1]["logits"][1]) > LOSSY, "the length must matter"
    assert worst[True] <= EXACT < LOSSY < worst[False]


def steps(path: Path, case: FusedCase, heads: int, short: int = 0) -> list[dict[str, Array]]:
    """A prompt of two sequences, then two tokens on the model's own cache; without one, only the prompt.

    The second prompt lacks its last `short` tokens.
    """
    opened = session(path)
    names, wanted = [o.name for o in opened.get_outputs()], {i.name for i in opened.get_inputs()}
    empty = np.zeros((2, heads, 0, DIM), np.float32)
    kept = {f"past_key_values.{i}.{p}": empty for i, p in itertools.product(range(LAYERS), ("key", "value"))}
    rng, seen, found = np.random.default_rng(5), 0, []
    for length in (6, 1, 1) if case.cached else (6,):
        seen += length
        ids, mask = rng.integers(0, 64, (2, length)), np.ones((2, seen), np.int64)
        mask[1, 6 - short : 6] = 0
        feeds = {"input_ids": ids, "attention_mask": mask, **kept}
        outputs = dict(zip(names, opened.run(None, {k: v for k, v in feeds.items() if k in wanted}), strict=True))
        kept = {n.replace("present", "past_key_values"): a for n, a in outputs.items() if n.startswith("present")}
        found.append(outputs)
    return found


@pytest.mark.parametrize("name", ["gqa-packed-rotary", "mha-cache", "attention23"])
def test_an_operator_that_is_not_selected_stays_as_it_was(name: str, tmp_path: Path) -> None:
    source, out = fused_file(name, tmp_path, tied=False), tmp_path / "out.onnx"
    done = rewriter.optimize(source, "gqa2", layers="1")
    done.save(out)
    assert [row.name.startswith("layers.1") for row in done.rewrite_report.sites] == [True]
    assert done.rewrite_report.refused == (), "what is not selected is not refused"
    old, new = (
        next(n for n in onnx.load(path).graph.node if n.output[0] == "layers.0.mixed") for path in (source, out)
    )
    assert old == new
    heads = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in onnx.load(out).graph.input if "past" in i.name}
    assert heads["past_key_values.0.key"] == HEADS and heads["past_key_values.1.key"] == 2


@pytest.mark.parametrize("name", ["mha-packed-qkv", "mha-packed-kv"])
def test_a_form_that_the_cpu_does_not_run_is_refused_with_its_words(name: str, tmp_path: Path) -> None:
    """It is read (the operators that stand for it replay), but nothing shows that the operator does the same."""
    with pytest.raises(NothingToRewrite, match=r"does not run on the CPU: Packed .* not implemented for CPU"):
        rewriter.optimize(fused_file(name, tmp_path), "gqa2")


def test_what_stands_for_an_operator_must_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of reading operators: with a window read one token too wide, every site is refused."""
    right = writer.Writer._causal
    monkeypatch.setattr(writer.Writer, "_causal", lambda self, q, k, window=-1: right(self, q, k, window + 1))
    with pytest.raises(NothingToRewrite, match="GroupQueryAttention computes something else"):
        rewriter.optimize(fused_file("gqa-window-softcap", tmp_path), "gqa2")


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    """One of two operators also returns its scores; the other is a site."""
    model = onnx.load(fused_file("gqa", tmp_path))
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    node.output.append("scores")
    node.attribute.append(onnx.helper.make_attribute("qk_output", 1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, None))
    _, matches = match_onnx(from_proto(model))
    assert [s.layer for s in matches.sites] == [1]
    assert [r.reason for r in matches.refusals] == [
        "the operator com.microsoft::GroupQueryAttention is not read: it returns its scores"
    ]


@pytest.mark.parametrize("count", [None, 0, "two"], ids=["none", "zero", "word"])
@pytest.mark.parametrize(("name", "attribute"), [("gqa", "kv_num_heads"), ("mha-split-bias", "num_heads")])
def test_an_operator_without_a_number_of_heads_is_a_typed_error(
    name: str, attribute: str, count: int | str | None, tmp_path: Path
) -> None:
    model = onnx.load(fused_file(name, tmp_path))
    node = next(n for n in model.graph.node if n.domain == "com.microsoft")
    kept = [a for a in node.attribute if a.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)
    if count is not None:
        node.attribute.append(onnx.helper.make_attribute(attribute, count))
    assert unfuse.obstacle(from_proto(model).graph.node(node.name)) is not None
    with pytest.raises(RewriteError) as error:
        match_onnx(from_proto(model))
    assert error.value.hint


def test_a_file_that_the_cpu_does_not_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = onnx.load(fused_file("gqa-packed-rotary", tmp_path))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            narrow = onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(16))
            tensor.CopyFrom(onnx.numpy_helper.from_array(narrow, tensor.name))
    del model.graph.value_info[:]
    with pytest.raises(UnsupportedModel, match="NOT_IMPLEMENTED") as error:
        rewriter.optimize(model, "gqa2")
    assert "export in float32" in error.value.hint


def test_a_cache_of_keys_and_values_in_one_tensor_is_refused_for_that() -> None:
    attend = onnx.helper.make_node(
        "Attention",
        ["x", "w", "b", "", "past"],
        ["y", "present"],
        domain="com.microsoft",
        num_heads=2,
        unidirectional=1,
    )
    shapes = {"x": ["b", "s", 16], "past": [2, "b", 2, "p", 8]}
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()]
    outputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("y", "present")]
    weights = [np.ones((16, 48), np.float32), np.ones(48, np.float32)]
    stored = [onnx.numpy_helper.from_array(a, n) for a, n in zip(weights, "wb", strict=True)]
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([attend], "g", inputs, outputs, stored)
    _, matches = match_onnx(from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)))
    assert [r.reason.partition(": ")[2] for r in matches.refusals] == [
        "keys and values share one cache tensor; export with a cache for each"
    ]


def test_weights_that_nothing_reads_do_not_stop_verification(tmp_path: Path) -> None:
    """onnxruntime drops them on opening and then knows no weight of that name."""
    path = fused_file("attention23", tmp_path)
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "idle"))
    done = rewriter.optimize(model, "gqa2")
    assert any(t.name == "idle" for t in done.graph.initializer)


def test_hand_written_files_run_as_they_are(tmp_path: Path) -> None:
    for name in ON_CPU:
        ort.InferenceSession(str(fused_file(name, tmp_path)), providers=["CPUExecutionProvider"])
