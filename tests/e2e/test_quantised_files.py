"""Files whose projections are stored as integers: rewritten in the same scheme, activations quantised as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

import rewriter
from passes.match.verdicts import INTEGER_SCORES
from passes.replay import TOLERANCES
from passes.site import AttentionSite
from rewriter.capture.exact_integers import with_unsigned_weights
from rewriter.capture.onnx_load import load
from rewriter.capture.quantised import QuantisedProduct, quantised_product
from rewriter.errors import NothingToRewrite
from rewriter.onnx_rewrite import match_onnx
from tests.e2e.test_files_made_otherwise import Calibration
from tests.match.test_replay import (
    keys_for_values,
    replayed,
    rolled_heads,
    shifted_rows,
    swapped_value_features,
)
from tests.targets.lossless_twin import twin_file
from tests.zoo.models import ZOO

ZooOnnx = Callable[..., Path]
Quantise = Callable[[Path], Path]
EXACT, LOSSY = 1e-4, 1e-2
FILES = [("bert-eager", "torchscript17"), ("gpt2-eager", "torchscript17"), ("vit-sdpa", "dynamo18")]


def dynamic(kind: QuantType, per_channel: bool) -> Quantise:
    def quantise(source: Path) -> Path:
        out = source.with_suffix(".dynamic.onnx")
        quantize_dynamic(
            str(source), str(out), weight_type=kind, per_channel=per_channel, op_types_to_quantize=["MatMul"]
        )
        return out

    return quantise


def dynamic_fused(source: Path) -> Path:
    """What onnxruntime makes of a dynamically quantised file: DynamicQuantizeMatMul and MatMulIntegerToFloat."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(source.with_suffix(".fused.onnx"))
    options.log_severity_level = 4
    quantised = dynamic(QuantType.QInt8, per_channel=False)(source)
    ort.InferenceSession(str(quantised), options, providers=["CPUExecutionProvider"])
    return source.with_suffix(".fused.onnx")


def half_quadratic(source: Path) -> Path:
    """Zero points are floats (HQQ), and 32 rows are one block."""
    made = MatMulNBitsQuantizer(onnx.load(source), algo_config=HQQWeightOnlyQuantConfig(block_size=32, bits=4))
    made.process()
    out = source.with_suffix(".hqq.onnx")
    made.model.save_model_to_file(str(out))
    return out


def blocks(bits: int, symmetric: bool, accuracy: int | None = None) -> Quantise:
    def quantise(source: Path) -> Path:
        made = MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=16, is_symmetric=symmetric, accuracy_level=accuracy
        )
        made.process()
        out = source.with_suffix(".blocks.onnx")
        made.model.save_model_to_file(str(out))
        return out

    return quantise


SCHEMES: dict[str, Quantise] = {
    "int8": dynamic(QuantType.QInt8, per_channel=False),
    "uint8": dynamic(QuantType.QUInt8, per_channel=False),
    "int8-columns": dynamic(QuantType.QInt8, per_channel=True),
    "uint8-columns": dynamic(QuantType.QUInt8, per_channel=True),
    "int8-fused": dynamic_fused,
    "4-bit": blocks(4, symmetric=False),
    "4-bit-symmetric": blocks(4, symmetric=True),
    "4-bit-int8-activations": blocks(4, symmetric=True, accuracy=4),
    "4-bit-float-points": half_quadratic,
    "8-bit": blocks(8, symmetric=False),
}
JOBS = [("bert-eager", "torchscript17", scheme) for scheme in SCHEMES]
JOBS += [(name, exporter, scheme) for name, exporter in FILES[1:] for scheme in ("int8", "uint8-columns", "int8-fused")]
JOBS += [("vit-sdpa", "dynamo18", "4-bit")]


@pytest.mark.parametrize(("name", "exporter", "scheme"), JOBS)
def test_new_weights_are_quantised_as_the_old_were(
    name: str, exporter: str, scheme: str, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    for perturbed in (False, True):
        twin = tmp_path / f"{perturbed}.onnx"
        twin_file(ZOO[name], zoo_onnx(ZOO[name], exporter), twin, perturbed=perturbed)
        source, out = SCHEMES[scheme](twin), tmp_path / "out.onnx"
        _, matches = match_onnx(load(source))
        assert len(matches.sites) == 2 and matches.refusals == ()
        done = rewriter.optimize(source, "gqa2")
        done.save(out)
        report = done.rewrite_report
        assert [row.exact for row in report.sites] == [not perturbed] * 2
        assert report.fidelity is not None
        assert report.fidelity.max_abs <= EXACT if not perturbed else report.fidelity.max_abs > LOSSY
        errors = [row.requantised for row in report.sites]
        limit = 0.1 if scheme.startswith("4-bit") else 0.01
        assert all(e is not None and ((0 < e < limit) if perturbed else e < 1e-6) for e in errors), errors
        check_weights(source, out)


def check_weights(source: Path, out: Path) -> None:
    """All projections are products of the same kind as before, in the same types and zero points."""
    before, after = (load(path) for path in (source, out))
    old, new = ([p for n in m.graph if (p := quantised_product(n)) is not None] for m in (before, after))
    assert {p.form for p in old} == {p.form for p in new}
    made = [p for p in new if p.codes.name not in {q.codes.name for q in old}]
    assert len(made) in (4, 6)  # keys and values of two layers, and queries that shared their projection
    model = {p.form: p for p in old}
    for p in made:
        like = model[p.form]
        assert p.packed.dtype == like.packed.dtype and (p.points is None) is (like.points is None)
        assert p.points is None or (like.points is not None and p.points.dtype == like.points.dtype)
        assert (p.bits, p.block) == (like.bits, like.block)
    floats = [n.op_type for n in after.graph if n.op_type in {"MatMul", "Gemm"}]
    assert len(floats) <= sum(n.op_type in {"MatMul", "Gemm"} for n in before.graph)


def test_the_matrix_that_integers_stand_for_is_the_one_that_is_multiplied(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """Activations of ones are quantised without loss: their product sums the columns."""
    for scheme, quantise in SCHEMES.items():
        if scheme == "4-bit-int8-activations":
            continue
        twin = tmp_path / "twin.onnx"
        twin_file(ZOO["bert-eager"], zoo_onnx(ZOO["bert-eager"], "torchscript17"), twin)
        model = load(quantise(twin))
        product = next(p for n in model.graph if (p := quantised_product(n)) is not None)
        got = multiplied(onnx.load(quantise(twin)), product)
        bias = 0.0 if product.bias is None else product.bias.const_value.numpy()  # type: ignore[union-attr]
        assert np.abs(got - product.matrix.sum(0) - bias).max() < 1e-5
        assert np.abs(got - product.matrix[:, ::-1].sum(0) - bias).max() > 1e-2


def multiplied(model: onnx.ModelProto, product: QuantisedProduct) -> np.ndarray:
    """The columns of the product where its activations are one everywhere."""
    x, result = product.x.name or "", product.node.outputs[0].name or ""
    names = {n.name for n in (*product.hidden, product.core, product.node)}
    nodes = [n for n in model.graph.node if n.name in names]
    given = onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, [1, 1, product.shape[0]])
    graph = onnx.helper.make_graph(nodes, "g", [given], [onnx.ValueInfoProto(name=result)], model.graph.initializer)
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    with_unsigned_weights(part)  # signed ones overflow where the processor has no VNNI
    session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([result], {x: np.ones((1, 1, product.shape[0]), np.float32)})[0]).reshape(-1)


def test_blocks_in_a_form_that_is_not_read_are_refused_with_advice(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    twin = tmp_path / "twin.onnx"
    twin_file(ZOO["bert-eager"], zoo_onnx(ZOO["bert-eager"], "torchscript17"), twin)
    model = onnx.load(SCHEMES["4-bit-symmetric"](twin))
    for node in (n for n in model.graph.node if n.op_type == "MatMulNBits"):
        rows = next(a.i for a in node.attribute if a.name == "K")
        order = numpy_helper.from_array(np.arange(rows, dtype=np.int32) // 16, f"{node.name}.order")  # GPTQ's g_idx
        model.graph.initializer.append(order)
        node.input.extend(["", order.name])
    with pytest.raises(NothingToRewrite, match="rewrite the float model and quantise it afterwards"):
        rewriter.optimize(model, "gqa2")


# ------------------------------------------------------------------ activations quantised by fixed scales


def static(source: Path, form: QuantFormat, operators: list[str] | None) -> Path:
    out = source.with_suffix(f".{form.name}.onnx")
    quantize_static(
        str(source), str(out), Calibration(source), quant_format=form, weight_type=QuantType.QInt8,
        op_types_to_quantize=operators,
    )  # fmt: skip
    return out


def twin_of(name: str, zoo_onnx: ZooOnnx, folder: Path) -> Path:
    source = folder / f"{name}.onnx"
    twin_file(ZOO[name], zoo_onnx(ZOO[name], "torchscript17"), source)
    return source


@pytest.mark.parametrize("name", ["llama-eager", "gpt2-eager"])
def test_fake_quantisation_is_executed_again_in_replay(name: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """Scores that are masked, and operands beyond what was calibrated, saturate: replay must saturate alike.

    Both branches of a rotation are quantised: there it compares with the rotation that was not.
    """
    path = static(twin_of(name, zoo_onnx, tmp_path), QuantFormat.QDQ, None)
    captured, matches = match_onnx(load(path))
    assert captured.flow.dtype == "int8" and matches.refusals == () and len(matches.sites) == 2
    limit, flow = TOLERANCES["int8"], captured.flow
    for evidence in matches.evidence.values():
        assert evidence.path.roundings
        assert replayed(flow, evidence).worst < limit
        assert replayed(flow, replace(evidence, path=replace(evidence.path, roundings=()))).scores > 1e3
        for change in (shifted_rows, rolled_heads, swapped_value_features, keys_for_values):
            assert replayed(flow, change(evidence)).worst > 2 * limit, change.__name__
    done = rewriter.optimize(path, "gqa2")
    assert [row.exact for row in done.rewrite_report.sites] == [False, False]
    held = {v.name: v.const_value for v in done.model.graph.initializers.values()}
    new = [t for n, t in held.items() if n is not None and ".weight_quantized" in n and n not in names(path)]
    assert new and {t.dtype.name for t in new if t is not None} == {"INT8"}


def names(path: Path) -> set[str]:
    return {t.name for t in onnx.load(path).graph.initializer}


def test_scores_that_quantisers_flatten_stay_as_they_are(
    zoo_onnx: ZooOnnx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range that holds masked scores (-3e38) leaves one step for all others, so every key counts alike."""
    path = static(twin_of("llama-eager", zoo_onnx, tmp_path), QuantFormat.QDQ, None)

    def moved() -> tuple[float, str]:
        report = rewriter.optimize(path, "gqa2").rewrite_report
        assert report is not None and report.fidelity is not None and len(report.sites) == 2
        return report.fidelity.max_abs, " ".join(report.sites[0].notes)

    drift, note = moved()
    assert drift <= EXACT and "quantisers between its scores and the softmax" in note
    monkeypatch.setattr(AttentionSite, "stays", "")
    assert moved()[0] > 0.1, "control: written anew it attends otherwise"


@pytest.mark.parametrize("operators", [None, ["MatMul"]], ids=["all", "products"])
@pytest.mark.parametrize("name", ["bert-eager", "vit-eager"])
def test_scores_in_integers_are_refused_with_advice(
    name: str, operators: list[str] | None, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    path = static(twin_of(name, zoo_onnx, tmp_path), QuantFormat.QOperator, operators)
    assert any(n.op_type == "QLinearMatMul" for n in onnx.load(path).graph.node)
    _, matches = match_onnx(load(path))
    assert matches.sites == () and matches.not_attention == ()
    assert [r.reason for r in matches.refusals] == [INTEGER_SCORES] * 2
