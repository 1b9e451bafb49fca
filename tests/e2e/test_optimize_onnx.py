"""The main job on .onnx files: lossless twins come out exact, lossy ones are called lossy, and nothing else changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import rewriter
from passes.targets import GroupedQuery
from rewriter.errors import NothingToRewrite, UnknownTarget, UnsupportedModel, UsageError
from rewriter.onnx_rewrite import match_onnx
from tests.targets import untouched
from tests.targets.lossless_twin import distance, feeds, legal_pool, run_file, session, tied, twin_file
from tests.targets.padding import padded
from tests.zoo.exports import EXPORTERS
from tests.zoo.models import MAIN, ZOO, ZooCase
from tests.zoo.through import matrix

ATTENDING = [c for c in MAIN.values() if not c.tags & {"none", "refuse"}]
DECODERS = [c for c in ATTENDING if c.causal and "hf" in c.tags]
EXACT, LOSSY = 1e-4, 1e-2
ZooOnnx = Callable[..., Path]

every_file = pytest.mark.parametrize(
    ("case", "exporter", "past"), [*matrix(ATTENDING, told=True), *matrix(DECODERS, past=True, told=True)]
)


def files_of(*names: str, by: tuple[str, ...] = tuple(EXPORTERS)) -> pytest.MarkDecorator:
    """These models by these exporters."""
    return pytest.mark.parametrize(("case", "exporter"), matrix([ZOO[name] for name in names], by))


def target(case: ZooCase) -> str:
    return GroupedQuery(legal_pool(case)).name


def twin(case: ZooCase, exporter: str, zoo_onnx: ZooOnnx, folder: Path, **options: bool) -> Path:
    past = options.pop("past", False)
    name = "perturbed" if options.get("perturbed") else "tied"
    return twin_file(case, zoo_onnx(case, exporter, past=past), folder / f"{name}.onnx", **options)


def rewritten(path: Path, to: Any, **options: Any) -> tuple[Path, Any]:
    """(saved file, report)"""
    result = rewriter.optimize(path, to, **options)
    out = path.with_name(f"{path.stem}-rewritten.onnx")
    result.save(out)
    return out, result.rewrite_report


def is_dynamic(path: Path) -> bool:
    model = onnx.load(path)
    return any(d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim)


def cache_feeds(path: Path, length: int, before: int, seed: int) -> dict[str, Any]:
    """Ids, a mask and a random cache as wide as the file declares."""
    rng = np.random.default_rng(seed)
    model, batch = onnx.load(path), 2
    out: dict[str, Any] = {"input_ids": rng.integers(5, 64, (batch, length))}
    out["attention_mask"] = np.ones((batch, before + length), np.int64)
    for value in model.graph.input:
        if value.name.startswith("past_key_values"):
            heads, width = (value.type.tensor_type.shape.dim[a].dim_value for a in (1, 3))
            assert heads and width
            out[value.name] = rng.standard_normal((batch, heads, before, width)).astype(np.float32)
    return out


def narrowed(wide: dict[str, Any], heads: int) -> dict[str, Any]:
    """The same cache with one head per group; the wide one is made equal within groups first."""
    narrow = {}
    for name, array in wide.items():
        if name.startswith("past_key_values"):
            grouped = array.reshape(array.shape[0], heads, -1, *array.shape[2:])
            grouped[:] = grouped[:, :, :1]
            array = np.ascontiguousarray(grouped[:, :, 0])
        narrow[name] = array
    return narrow


# ------------------------------------------------------------------ every file


@every_file
def test_a_lossless_twin_comes_out_exact(
    case: ZooCase, exporter: str, past: bool, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    source = twin(case, exporter, zoo_onnx, tmp_path, past=past)
    out, report = rewritten(source, target(case))
    assert len(report.sites) == case.sites and report.refused == ()
    assert all(row.exact for row in report.sites)
    assert {row.after for row in report.sites} == {target(case)}
    assert report.fidelity.max_abs <= EXACT
    assert report.parameters.after < report.parameters.before
    assert report.kv_bytes_per_token.before == 2 * report.kv_bytes_per_token.after
    check_same_function(case, source, out, past)
    check_untouched(source, out)


@every_file
def test_a_perturbed_twin_does_not(case: ZooCase, exporter: str, past: bool, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """The control: what is asserted above can fail."""
    out, report = rewritten(twin(case, exporter, zoo_onnx, tmp_path, past=past, perturbed=True), target(case))
    assert len(report.sites) == case.sites
    assert not any(row.exact for row in report.sites)
    assert report.fidelity.max_abs > LOSSY
    measured = [row for row in report.sites if row.error is not None]
    assert all(row.error > 1e-3 and row.floor == 1.0 for row in measured)
    if not past:
        perturbed = case.run(tied(case, perturbed=True), case.inputs(2, 7, 0))
        assert distance(run_file(out, case.inputs(2, 7, 0)), perturbed) > LOSSY
        assert distance(run_file(tmp_path / "perturbed.onnx", case.inputs(2, 7, 0)), perturbed) <= EXACT


def check_same_function(case: ZooCase, source: Path, out: Path, past: bool) -> None:
    """In plain onnxruntime, against the twin and against the tied torch module; at a second size where axes allow."""
    if not past:
        module = tied(case)
        for size in [(2, 7, 0), (3, 4, 1)] if is_dynamic(source) else [(2, 7, 0)]:
            inputs = case.inputs(*size)
            assert distance(run_file(out, inputs), run_file(source, inputs)) <= EXACT
            assert distance(run_file(out, inputs), case.run(module, inputs)) <= EXACT
        return
    heads = legal_pool(case)
    for length, before in [(7, 5), (1, 6)] if is_dynamic(source) else [(7, 5)]:
        wide = cache_feeds(source, length, before, seed=3)
        narrow = narrowed(wide, heads)
        old, new = session(source), session(out)
        expected, got = old.run(None, wide), new.run(None, narrow)
        assert distance(got[0], expected[0]) <= EXACT
        for a, b in zip(got[1:], expected[1:], strict=True):
            assert a.shape == (2, heads, before + length, b.shape[-1])
            assert distance(np.repeat(a, b.shape[1] // heads, axis=1), b) <= EXACT


def check_untouched(source: Path, out: Path) -> None:
    before, after = onnx.load(source), onnx.load(out)
    onnx.checker.check_model(str(out), full_check=True)
    _, matches = (captured := match_onnx(ir.load(source)))
    flow = captured[0].flow
    may_change = {flow.nodes[i].outputs for i in untouched.changeable(flow, matches.sites)}
    assert untouched.altered(before, after) <= may_change
    assert len(may_change) < len(before.graph.node), "the check would be empty"
    declared = {name for site in json.loads(_metadata(after)["rewriter.sites"]) for name in site["changed"]}
    old, new = untouched.weights(before), untouched.weights(after)
    assert {name for name in old if new.get(name) != old[name]} == declared
    read = {name for node in before.graph.node for name in node.input if outputs_of(node) not in may_change}
    assert not declared & read, "an initializer that something else reads was taken away"
    assert [_port(v) for v in before.graph.output] == [_port(v) for v in after.graph.output]
    assert [_port(v) for v in before.graph.input] == [_port(v) for v in after.graph.input]
    check_header(before, after)


def outputs_of(node: onnx.NodeProto) -> tuple[str, ...]:
    return untouched.outputs(node)


def _port(value: onnx.ValueInfoProto) -> tuple[Any, ...]:
    """Name, type and shape, heads of a cache left out."""
    shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    if value.name.startswith(("past_key_values", "present")):
        shape[1] = "heads"
    return value.name, value.type.tensor_type.elem_type, shape


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def check_header(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Opset, ir_version, producer and metadata stay; functions raise ir_version to 8 and no further."""
    old = {entry.domain: entry.version for entry in before.opset_import}
    new = {entry.domain: entry.version for entry in after.opset_import}
    functions = {f.domain for f in after.functions} - {f.domain for f in before.functions}
    assert functions <= {"rewriter.ops"}
    assert {k: v for k, v in new.items() if k != "rewriter.ops"} == {k: v for k, v in old.items() if k in new}
    assert ("rewriter.ops" in new) == bool(functions)
    assert after.ir_version == (max(before.ir_version, 8) if functions else before.ir_version)
    assert (after.producer_name, after.graph.name) == (before.producer_name, before.graph.name)
    kept = {k: v for k, v in _metadata(after).items() if not k.startswith("rewriter.")}
    assert kept == _metadata(before)
    opset = new.get("", new.get("ai.onnx"))
    if functions:
        assert {e.version for f in after.functions for e in f.opset_import if e.domain == ""} == {opset}
    else:
        assert opset in (23, 24), "only these opsets have Attention"
    assert not any(n.op_type == "Attention" for n in after.graph.node) or opset in (23, 24)


# ------------------------------------------------------------------ other runtimes, other hands


@files_of("bert-sdpa", "gpt2-eager", "llama-gqa-sdpa", "mha-sequence-first")
def test_the_reference_evaluator_agrees(case: ZooCase, exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    source = twin(case, exporter, zoo_onnx, tmp_path)
    inputs = feeds(case.inputs(2, 7, 0))
    try:
        expected: Any = ReferenceEvaluator(str(source)).run(None, inputs)
    except Exception as reason:  # it raises anything for an operator that it computes wrongly or lacks
        pytest.skip(f"onnx's reference cannot run the original: {reason}")
    out, _ = rewritten(source, target(case))
    got: Any = ReferenceEvaluator(str(out)).run(None, inputs)
    assert distance(got[0], expected[0]) <= EXACT


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


@pytest.mark.parametrize("exporter", ["dynamo18", "dynamo24", "torchscript17"])
def test_every_optimisation_level_of_onnxruntime_agrees(exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case = ZOO["llama-gqa-sdpa"]
    source = twin(case, exporter, zoo_onnx, tmp_path)
    out, _ = rewritten(source, "mqa")
    inputs = case.inputs(3, 9, 0)
    expected = run_file(source, inputs)
    for level in LEVELS:
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        opened = ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
        assert distance(opened.run(None, feeds(inputs))[0], expected) <= EXACT, level


@files_of("bert-sdpa", "gpt2-sdpa", "llama-sdpa")
def test_a_rewritten_file_can_be_rewritten_again(
    case: ZooCase, exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    source = twin(case, exporter, zoo_onnx, tmp_path)
    direct = rewritten(source, "mqa")[0].rename(tmp_path / "direct.onnx")
    once, first = rewritten(source, "gqa2")
    assert [site.kv_heads for site in rewriter.inspect(once).sites] == [2, 2]
    twice, report = rewritten(once, "mqa")
    assert [(row.before, row.after) for row in report.sites] == [("gqa2", "mqa")] * 2
    assert [row.name for row in report.sites] == [row.name for row in first.sites]
    inputs = case.inputs(2, 7, 0)
    assert distance(run_file(twice, inputs), run_file(direct, inputs)) <= EXACT
    assert distance(run_file(twice, inputs), run_file(once, inputs)) > LOSSY
    onnx.checker.check_model(str(twice), full_check=True)


# ------------------------------------------------------------------ kinds of models


def test_a_proto_in_gives_a_proto_out_and_stays_as_it_was(zoo_onnx: ZooOnnx) -> None:
    proto = onnx.load(zoo_onnx(ZOO["bert-sdpa"], "torchscript17"))
    before = copy.deepcopy(proto)
    result = rewriter.optimize(proto, "gqa2")
    assert isinstance(result, onnx.ModelProto)
    assert proto == before
    assert len(result.functions) == 1
    onnx.checker.check_model(result, full_check=True)
    inputs = ZOO["bert-sdpa"].inputs(2, 7, 0)
    plain = session(before.SerializeToString()).run(None, feeds(inputs))[0]
    assert distance(session(result.SerializeToString()).run(None, feeds(inputs))[0], plain) > LOSSY


def test_an_ir_model_in_gives_an_ir_model_out_and_stays_as_it_was(zoo_onnx: ZooOnnx) -> None:
    path = zoo_onnx(ZOO["bert-sdpa"], "torchscript17")
    model = ir.load(path)
    result = rewriter.optimize(model, "mqa")
    assert isinstance(result, ir.Model)
    assert ir.to_proto(model) == ir.to_proto(ir.load(path))
    assert "rewriter.sites" in result.metadata_props and "rewriter.sites" not in model.metadata_props
    assert len(result.functions) == 1


def test_a_path_in_leaves_the_file_alone_and_gives_something_to_save(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    path = zoo_onnx(ZOO["bert-sdpa"], "torchscript17")
    before = path.read_bytes()
    result = rewriter.optimize(str(path), "mqa")
    assert path.read_bytes() == before
    assert isinstance(result.model, ir.Model)
    result.save(tmp_path / "a.onnx")
    result.save(str(tmp_path / "b.onnx"), external_data="always")
    assert (tmp_path / "b.onnx.data").exists() and not (tmp_path / "a.onnx.data").exists()
    inputs = ZOO["bert-sdpa"].inputs(2, 7, 0)
    assert distance(run_file(tmp_path / "a.onnx", inputs), run_file(tmp_path / "b.onnx", inputs)) == 0


def test_verify_accepts_the_result_and_finds_a_change_behind_its_back(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    source = twin(ZOO["bert-sdpa"], "dynamo18", zoo_onnx, tmp_path)
    out, _ = rewritten(source, "gqa2")
    good = rewriter.verify(out, source)
    assert good.ok and good.fidelity is not None and good.fidelity.max_abs <= EXACT
    model = onnx.load(out)
    kept = next(t for t in model.graph.initializer if t.name in untouched.weights(onnx.load(source)) and t.dims)
    array = onnx.numpy_helper.to_array(kept).copy()
    array.flat[0] += 1
    kept.CopyFrom(onnx.numpy_helper.from_array(array, kept.name))
    onnx.save(model, tmp_path / "tampered.onnx")
    bad = rewriter.verify(tmp_path / "tampered.onnx", source)
    assert not bad.ok and "untouched" in {check.name for check in bad.failures}


# ------------------------------------------------------------------ which sites, which targets


def test_an_illegal_head_count_names_sites_and_legal_counts(zoo_onnx: ZooOnnx) -> None:
    path = zoo_onnx(ZOO["llama-gqa-sdpa"], "torchscript17")
    for wrong in ("gqa3", "gqa4"):
        with pytest.raises(UsageError) as error:
            rewriter.optimize(path, wrong)
        assert "layers.0" in str(error.value)
        assert all(part in error.value.hint for part in ("1, 2", "layers.0.self_attn", "layers.1.self_attn"))
        assert error.value.exit_code == 2


def test_an_idle_target_has_nothing_to_do(zoo_onnx: ZooOnnx) -> None:
    with pytest.raises(NothingToRewrite, match="2 key/value heads already"):
        rewriter.optimize(zoo_onnx(ZOO["llama-gqa-sdpa"], "torchscript17"), "gqa2")


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1]), ("0", [0]), ("1-5", [1]), ("-1:", [1]), (r"layer\.1\.", [1])]
)
def test_layer_selectors(layers: str, expected: list[int], zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    path = zoo_onnx(ZOO["bert-sdpa"], "torchscript17")
    result = rewriter.optimize(path, "gqa2", layers=layers)
    assert [row.name.split("layer.")[1][0] for row in result.rewrite_report.sites] == [str(i) for i in expected]
    after = rewriter.inspect(ir.to_proto(result.model)) if expected == [1] else None
    if after is not None:  # the other layer is still what it was
        assert next(site for site in after.sites if "layer.0" in site.name).kv_heads == 4


def test_a_mapping_gives_layers_different_targets(zoo_onnx: ZooOnnx) -> None:
    path = zoo_onnx(ZOO["bert-eager"], "torchscript17")
    report = rewriter.optimize(path, {"0": "gqa2", "1": GroupedQuery(1)}).rewrite_report
    assert [row.after for row in report.sites] == ["gqa2", "mqa"]
    with pytest.raises(UsageError, match="mapping"):
        rewriter.optimize(path, {"0": "gqa2"}, layers="1")


def test_bad_wishes_are_usage_errors(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    path = zoo_onnx(ZOO["bert-sdpa"], "torchscript17")
    with pytest.raises(UnknownTarget, match="gqazero"):
        rewriter.optimize(path, "gqazero")
    with pytest.raises(UsageError, match="selects no rewritable site") as error:
        rewriter.optimize(path, "mqa", layers="7-9")
    assert "0, 1" in error.value.hint
    with pytest.raises(UsageError, match="regular expression"):
        rewriter.optimize(path, "mqa", layers="(")
    with pytest.raises(UsageError, match="no such file"):
        rewriter.optimize(tmp_path / "missing.onnx", "mqa")
    with pytest.raises(UsageError, match="calibration"):
        rewriter.optimize(path, "mqa", calibration=["text"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mlp", "no attention"), ("conv", "no attention"), ("router", "no attention"), ("deberta-eager", "hidden states")],
)
def test_a_file_in_which_nothing_can_be_rewritten_says_why(name: str, reason: str, zoo_onnx: ZooOnnx) -> None:
    with pytest.raises(NothingToRewrite, match=reason) as error:
        rewriter.optimize(zoo_onnx(ZOO[name], "torchscript17"), "mqa")
    assert error.value.hint and error.value.exit_code == 1


# ------------------------------------------------------------------ half precision


def half(source: Path) -> Path:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(source), disable_shape_infer=True, keep_io_types=False)
    out = source.with_name("half.onnx")
    onnx.save(model, out)
    return out


@files_of("bert-eager", "gpt2-eager", "nanogpt-softmax", by=("dynamo18", "torchscript17"))
def test_float16_files(case: ZooCase, exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    source = half(twin(case, exporter, zoo_onnx, tmp_path))
    inputs = feeds(case.inputs(2, 7, 0))
    wide = {k: a.astype(np.float16) if a.dtype == np.float32 else a for k, a in inputs.items()}
    expected = session(source).run(None, wide)[0]
    out, report = rewritten(source, "gqa2")
    assert all(row.exact for row in report.sites) and len(report.sites) == 2
    got = session(out).run(None, wide)[0]
    assert got.dtype == np.float16
    assert distance(got, expected) <= 2e-2
    new = {t.name: t for t in onnx.load(out).graph.initializer}
    floats = {t.data_type for t in new.values()} & {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    assert floats == {onnx.TensorProto.FLOAT16}
    assert report.kv_bytes_per_token.before == 2 * 2 * 4 * 8 * 2, "two bytes per number"
    perturbed = half(twin(case, exporter, zoo_onnx, tmp_path, perturbed=True))
    assert not any(row.exact for row in rewritten(perturbed, "gqa2")[1].sites)


def test_a_bfloat16_file_that_no_cpu_runtime_runs_is_refused_with_the_reason(zoo_onnx: ZooOnnx) -> None:
    model = ir.load(zoo_onnx(ZOO["mha-batch-first"], "dynamo18"))
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            bits = torch.from_numpy(value.const_value.numpy().copy()).bfloat16().view(torch.uint16).numpy()
            value.const_value = ir.Tensor(bits, dtype=ir.DataType.BFLOAT16, name=value.name)
            value.dtype = ir.DataType.BFLOAT16
    for value in (*model.graph.inputs, *model.graph.outputs, *(o for n in model.graph for o in n.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = ir.DataType.BFLOAT16
    with pytest.raises(UnsupportedModel, match="onnxruntime"):
        rewriter.optimize(model, "gqa2")


# ------------------------------------------------------------------ padding


LEFT = ("llama-sdpa", "llama-gqa-eager", "qwen3-sdpa")
"""Only relative positions make a left-padded row equal to an unpadded one."""
PADDED = ("bert-sdpa", "distilbert-eager", "gpt2-sdpa", "llama-gqa-sdpa", "qwen3-eager", *LEFT)


@files_of(*PADDED, by=("dynamo18", "dynamo24", "torchscript17"))
def test_padded_batches_equal_unpadded_rows(case: ZooCase, exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    side = "left" if case.name in LEFT else "right"
    out, _ = rewritten(twin(case, exporter, zoo_onnx, tmp_path), target(case))
    lengths, full = [7, 4, 6], case.inputs(3, 7, 5)
    batch = run_file(out, padded(full, lengths, side))
    for row, length in enumerate(lengths):
        ids = full["input_ids"][row : row + 1, :length]
        alone = run_file(out, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
        inside = batch[row, :length] if side == "right" else batch[row, 7 - length :]
        assert distance(inside, alone) <= EXACT
    unmasked = run_file(out, {**padded(full, lengths, side), "attention_mask": torch.ones(3, 7, dtype=torch.int64)})
    if side == "left" or not case.causal:
        assert distance(unmasked[1], batch[1]) > LOSSY, "the mask matters"


@pytest.mark.parametrize("exporter", ["dynamo18", "torchscript17"])
@pytest.mark.parametrize("name", ["gpt2-eager", "llama-gqa-sdpa"])
def test_decoding_with_the_cache_equals_running_the_whole(
    name: str, exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    """Token by token through the resized cache of the rewritten file, against the tied torch module without cache."""
    case = ZOO[name]
    source = twin(case, exporter, zoo_onnx, tmp_path, past=True)
    out, _ = rewritten(source, target(case))
    opened, module = session(out), tied(case)
    ids = case.inputs(2, 8, 4)["input_ids"]
    names = [i.name for i in opened.get_inputs() if i.name.startswith("past_key_values")]
    cache = {n: np.zeros((2, legal_pool(case), 0, 8), np.float32) for n in names}
    done = 0
    for step in (5, 1, 1, 1):
        mask = np.ones((2, done + step), np.int64)
        fed = {"input_ids": ids[:, done : done + step].numpy(), "attention_mask": mask, **cache}
        logits, *present = opened.run(None, fed)
        cache, done = dict(zip(names, present, strict=True)), done + step
        inputs = {"input_ids": ids[:, :done], "attention_mask": torch.ones(2, done, dtype=torch.int64)}
        whole = case.run(module, inputs)
        assert distance(logits[:, -1], whole[:, -1]) <= EXACT
