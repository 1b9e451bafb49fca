"""Linear attention in .onnx files: as in the module the file was exported from, at any length, padded and cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import rewriter
from passes.hidden_keys import masks_of, more_than_hidden_keys
from passes.targets import LinearHeads
from passes.targets.linear_attention import FeatureMap
from rewriter.errors import NothingToRewrite
from rewriter.onnx_rewrite import match_onnx
from tests.targets.fused_files import fused_file
from tests.targets.lossless_twin import run_file, session
from tests.targets.watched_mixes import relative
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

Array = NDArray[Any]
ZooOnnx = Callable[..., Path]
CLOSE = 2e-5
FILES = [
    pytest.param(ZOO[name], exporter, LinearHeads(4, features), id=f"{name}-{exporter}-{features.value}")
    for name, exporter, features in (
        ("bert-sdpa", "dynamo18", FeatureMap.LEARNED),
        ("bert-sdpa", "dynamo23", FeatureMap.FAVOR),
        ("bert-sdpa", "torchscript17", FeatureMap.ELU1),
        ("gpt2-sdpa", "torchscript17", FeatureMap.FAVOR),
        ("llama-sdpa", "dynamo18", FeatureMap.LEARNED),
        ("llama-gqa-sdpa", "dynamo24", FeatureMap.ELU1),
    )
]


def module(case: ZooCase, target: Any) -> torch.nn.Module:
    model: torch.nn.Module = rewriter.optimize(case.build(), target, example_inputs=case.inputs(2, 30, 0))
    return model


@pytest.mark.parametrize(("case", "exporter", "target"), FILES)
def test_a_file_is_the_module(
    case: ZooCase, exporter: str, target: LinearHeads, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    """With hidden keys, of every length that the file takes."""
    source, out = zoo_onnx(case, exporter), tmp_path / "linear.onnx"
    done = rewriter.optimize(source, target)
    done.save(out)
    model, original = module(case, target), case.build()
    for length, same in ((1, True), (8, True), (30, False), (61, False)):
        inputs = case.inputs(2, length, 5)
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(2, length).bool()
        found = torch.from_numpy(run_file(out, inputs))[real]
        assert relative(found, case.run(model, inputs)[real]) < CLOSE, length
        apart = relative(found, case.run(original, inputs)[real])
        assert apart < CLOSE if same else apart > 1e-3  # the control: nearby it is the original, and else not
    report = done.rewrite_report
    assert [(row.after, row.exact, row.merge) for row in report.sites] == [(target.name, False, "initialised")] * 2
    assert report.kv_bytes_per_token.before == report.kv_bytes_per_token.after > 0
    stored, before = (sum(int(np.prod(t.dims)) for t in onnx.load(p).graph.initializer if t.data_type == 1)
                      for p in (out, source))  # fmt: skip
    added = sum(int(np.prod(shape)) for shape in target.spec(_site(source)).shapes.values()) * 2
    assert 0 <= stored - before - added < 20  # and single numbers, to compare masks with
    assert report.parameters.after - report.parameters.before == added
    assert rewriter.verify(out, source).ok


def _site(path: Path) -> Any:
    return rewriter.inspect(path).sites[0]


def test_later_tokens_leave_no_trace(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case, out = ZOO["llama-sdpa"], tmp_path / "linear.onnx"
    rewriter.optimize(zoo_onnx(case, "dynamo18"), "linear:4").save(out)
    inputs = case.inputs(2, 30, 3)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 21] = (changed["input_ids"][:, 21] + 1) % 50
    before, after = run_file(out, inputs), run_file(out, changed)
    assert np.array_equal(before[:, :21], after[:, :21]) and not np.array_equal(before[:, 21:], after[:, 21:])


def test_a_file_with_a_cache_goes_on_from_it(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """The cache holds all keys, as before: in pieces the answer is that of the whole."""
    case, out = ZOO["llama-gqa-sdpa"], tmp_path / "linear.onnx"
    source = zoo_onnx(case, "dynamo18", past=True)
    done = rewriter.optimize(source, "linear:4")
    done.save(out)
    assert done.rewrite_report.kv_bytes_per_token.before == done.rewrite_report.kv_bytes_per_token.after
    ids = case.inputs(2, 30, 3)["input_ids"].numpy()
    with torch.no_grad():
        whole = module(case, "linear:4")(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    for path, same in ((out, True), (source, False)):
        ready = session(path)
        names = [i.name for i in ready.get_inputs() if i.name.startswith("past")]
        shapes = {i.name: i.shape for i in ready.get_inputs()}
        held = {n: np.zeros((2, shapes[n][1], 0, shapes[n][3]), np.float32) for n in names}
        answers = []
        for start, stop in ((0, 13), (13, 14), (14, 21), (21, 22), (22, 30)):
            given = {"input_ids": ids[:, start:stop], "attention_mask": np.ones((2, stop), np.int64)}
            wanted = {n: a for n, a in (given | held).items() if n in shapes}
            logits, *present = ready.run(None, wanted)
            held = dict(zip(names, present, strict=True))
            answers.append(logits)
        apart = relative(torch.from_numpy(np.concatenate(answers, 1)), torch.from_numpy(whole))
        assert apart < CLOSE if same else apart > 1e-3  # the control


@pytest.mark.parametrize("name", ["mha-bias-mask", "mha-cache", "attention23", "attention23-flat"])
def test_fused_operators_are_written_out(name: str, tmp_path: Path) -> None:
    """Two chunks are the operator's own answer; more are not."""
    source = fused_file(name, tmp_path, tied=False)
    for chunk, same in ((64, True), (2, False)):
        out = tmp_path / f"linear{chunk}.onnx"
        rewriter.optimize(source, LinearHeads(chunk)).save(out)
        assert not [n for n in onnx.load(out).graph.node if n.op_type in ("MultiHeadAttention", "Attention")]
        given = {}
        for value in session(source).get_inputs():
            sizes = {"batch": 2, "sequence": 20, "past": 0, "total": 20, "total_sequence": 20}
            shape = [sizes[n] if isinstance(n, str) else n for n in value.shape]
            whole = np.ones if "mask" in value.name else np.zeros
            given[value.name] = whole(shape, np.float32 if "float" in value.type else np.int64)
        given["input_ids"] = np.random.default_rng(0).integers(0, 60, (2, 20))
        before, after = (torch.from_numpy(session(p).run(["logits"], given)[0]) for p in (source, out))
        apart = relative(after, before)
        assert apart < CLOSE if same else apart > 1e-3


# ------------------------------------------------------------------ masks


def masked_file(path: Path, mask: tuple[int | str, ...], kind: int = TensorProto.FLOAT) -> Path:
    """One attention written out, whose mask of this shape is an input, or without: a score's bias for ()."""
    heads, dim, width = 2, 8, 16
    rng = np.random.default_rng(0)
    nodes, stored = [], []

    def constant(name: str, array: Array) -> str:
        stored.append(numpy_helper.from_array(array, name))
        return name

    def op(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=f"{name}/node", **attributes))
        return name

    apart = constant("apart", np.array([0, 0, heads, dim]))
    heads_of = {}
    for role in "qkv":
        weight = constant(f"{role}.weight", rng.standard_normal((width, width)).astype(np.float32) / 4)
        split = op("Reshape", [op("MatMul", ["x", weight], f"{role}.product"), apart], f"{role}.split")
        perm = [0, 2, 3, 1] if role == "k" else [0, 2, 1, 3]
        heads_of[role] = op("Transpose", [split], f"{role}.heads", perm=perm)
    scores = op("MatMul", [heads_of["q"], heads_of["k"]], "products")
    scores = op("Mul", [scores, constant("scale", np.array(dim**-0.5, np.float32))], "scores")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", width])]
    if mask:
        inputs.append(helper.make_tensor_value_info("mask", kind, mask))
        given = "mask"
        if kind == TensorProto.BOOL:
            zero, low = (constant(n, np.array(v, np.float32)) for n, v in (("zero", 0.0), ("low", -1e9)))
            given = op("Where", ["mask", zero, low], "additive")
        scores = op("Add", [scores, given], "masked")
    mixed = op("MatMul", [op("Softmax", [scores], "weights", axis=-1), heads_of["v"]], "mixed")
    turned = op("Transpose", [mixed], "turned", perm=[0, 2, 1, 3])
    merged = op("Reshape", [turned, constant("flat", np.array([0, 0, width]))], "merged")
    op("MatMul", [merged, constant("out.weight", rng.standard_normal((width, width)).astype(np.float32) / 4)], "y")
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", width])]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("mask", [pytest.param(("B", 1, 1, "S"), id="by-key"), pytest.param((), id="none")])
def test_masks_of_keys_are_read(mask: tuple[int | str, ...], tmp_path: Path) -> None:
    source, out = masked_file(tmp_path / "plain.onnx", mask, TensorProto.BOOL), tmp_path / "linear.onnx"
    rewriter.optimize(source, "linear:4").save(out)
    x, shown = np.random.default_rng(0).standard_normal((2, 30, 16)).astype(np.float32), np.ones((2, 1, 1, 30), bool)
    shown[1, ..., 20:] = False
    given = {"x": x} | ({"mask": shown} if mask else {})
    short = {"x": x[1:, :20]} | ({"mask": shown[1:, ..., :20]} if mask else {})
    whole, alone = (session(out).run(None, g)[0] for g in (given, short))
    apart = relative(torch.from_numpy(whole[1:, :20]), torch.from_numpy(alone))
    assert apart < CLOSE if mask else apart > 1e-3


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        pytest.param(("B", 1, "S", "S"), TensorProto.BOOL, id="by-query"),
        pytest.param(("S", "S"), TensorProto.BOOL, id="square"),
        pytest.param((1, 2, "S", "S"), TensorProto.FLOAT, id="bias"),
    ],
)
def test_other_masks_are_refused(mask: tuple[int | str, ...], kind: int, tmp_path: Path) -> None:
    source = masked_file(tmp_path / "plain.onnx", mask, kind)
    with pytest.raises(NothingToRewrite, match=r"bias|row for each query|more than an order"):
        rewriter.optimize(source, "linear:4")


def test_a_mask_from_outside_may_say_more_than_it_did(tmp_path: Path) -> None:
    """Whatever was recorded: one that hides nothing, with a row for each query, or one row for all, or a bias."""
    reasons = []
    for mask, number in ((("B", 1, "S", "S"), 0.0), (("B", 1, 1, "S"), 0.0), (("B", 1, 1, "S"), 0.5)):
        path = masked_file(tmp_path / "plain.onnx", mask)
        captured, matches = match_onnx(ir.load(path))
        flow, site = captured.flow, matches.sites[0]
        same = {v: np.full(flow.shape(v), number, np.float32) for v in masks_of(site)}
        flow = replace(flow, read=lambda v, same=same, read=flow.read: same[v] if v in same else read(v))
        reasons.append(more_than_hidden_keys(flow, site))
    assert reasons[0] is not None and "row for each query (mask)" in reasons[0]
    assert reasons[1] is None
    assert reasons[2] is not None and "bias" in reasons[2]


def test_group_query_attention_and_softcaps_are_refused(tmp_path: Path) -> None:
    for name, reason in (("gqa-rotary", "a length for each sequence"), ("attention24-mask-softcap", "softcap")):
        with pytest.raises(NothingToRewrite, match=reason):
            rewriter.optimize(fused_file(name, tmp_path, tied=False), "linear:4")
