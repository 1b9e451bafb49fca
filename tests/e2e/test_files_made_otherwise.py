"""ONNX files that no exporter wrote: optimised, fused, quantised, converted to float16, with weights as nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import rewriter
from rewriter.capture.feeds import make_feeds
from rewriter.capture.onnx_load import load
from rewriter.errors import NothingToRewrite
from tests.targets.lossless_twin import distance, run_file, twin_file
from tests.zoo import exports
from tests.zoo.models import ZOO

ZooOnnx = Callable[..., Path]
EXACT, LOSSY = 1e-4, 1e-3


@pytest.fixture(params=[False, True], ids=["tied", "perturbed"])
def perturbed(request: pytest.FixtureRequest) -> bool:
    """Every equality has its control: the same file with one head changed."""
    return bool(request.param)


@pytest.fixture
def twin(zoo_onnx: ZooOnnx, tmp_path: Path, perturbed: bool) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        path = tmp_path / f"{name}.onnx"
        twin_file(ZOO[name], zoo_onnx(ZOO[name], "torchscript17"), path, perturbed=perturbed)
        return path

    return make


def require(path: Path, perturbed: bool, limit: float = EXACT) -> rewriter.Rewritten:
    """Rewrite to gqa2: without a perturbation nothing moves, with one it does."""
    done: rewriter.Rewritten = rewriter.optimize(path, "gqa2")
    assert len(done.rewrite_report.sites) == 2, done.rewrite_report.refused
    assert done.rewrite_report.fidelity is not None
    assert (done.rewrite_report.fidelity.max_abs <= limit) is not perturbed
    return done


def optimised(source: Path, level: ort.GraphOptimizationLevel) -> Path:
    target = source.with_suffix(".optimised.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target


@pytest.mark.parametrize("name", ["bert-eager", "gpt2-eager", "vit-eager"])
def test_files_that_onnxruntime_optimised(name: str, twin: Callable[[str], Path], perturbed: bool) -> None:
    path = optimised(twin(name), ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    assert any(n.op_type == "FusedMatMul" for n in onnx.load(path).graph.node)
    require(path, perturbed)


def fused(source: Path) -> Path:
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(str(source), model_type="bert", num_heads=4, hidden_size=32)
    target = source.with_suffix(".fused.onnx")
    model.save_model_to_file(str(target))
    assert sum(n.op_type == "Attention" and n.domain == "com.microsoft" for n in onnx.load(target).graph.node) == 2
    return target


def test_fused_attention_is_written_out_where_it_is_rewritten(twin: Callable[[str], Path], perturbed: bool) -> None:
    done = require(fused(twin("bert-eager")), perturbed)
    assert not any(n.domain == "com.microsoft" and n.op_type == "Attention" for n in done.model.graph)


def test_fused_attention_that_adds_the_biases_of_a_packed_projection(
    twin: Callable[[str], Path], perturbed: bool
) -> None:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    source = twin("bert-eager")
    options = FusionOptions("bert")
    options.use_multi_head_attention = True
    target = source.with_suffix(".fused.onnx")
    made = optimizer.optimize_model(
        str(source), model_type="bert", num_heads=4, hidden_size=32, optimization_options=options
    )
    made.save_model_to_file(str(target))
    operators = [n for n in onnx.load(target).graph.node if n.op_type == "MultiHeadAttention"]
    assert len(operators) == 2 and all(n.input[3] for n in operators)
    require(target, perturbed)


def test_fused_attention_that_is_not_selected_stays(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    path = tmp_path / "bert.onnx"
    twin_file(ZOO["bert-eager"], zoo_onnx(ZOO["bert-eager"], "torchscript17"), path, perturbed=False)
    source = fused(path)
    done = rewriter.optimize(source, "gqa2", layers="1")
    assert len(done.rewrite_report.sites) == 1
    kept = [n for n in done.model.graph if n.domain == "com.microsoft" and n.op_type == "Attention"]
    before = [n for n in onnx.load(source).graph.node if n.op_type == "Attention"]
    assert [v.name for v in kept[0].outputs] == list(before[0].output) and len(kept) == 1


def test_float16(twin: Callable[[str], Path], perturbed: bool) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source = twin("bert-eager")
    path = source.with_suffix(".float16.onnx")
    onnx.save(convert_float_to_float16(onnx.load(source)), path)
    done = require(path, perturbed, limit=1e-2)
    stored = {t.dtype.name for v in done.model.graph.initializers.values() if (t := v.const_value) is not None}
    assert "FLOAT16" in stored and "FLOAT" not in stored


OPTIMISE = "import rewriter, sys; print(len(rewriter.optimize(sys.argv[1], 'gqa2').rewrite_report.sites))"


def test_a_float16_file_on_which_onnxruntime_crashes_is_verified(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """At its highest optimisation level onnxruntime 1.31 kills the process on this file, hence a process of its own."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = tmp_path / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(zoo_onnx(ZOO["mha-batch-first"], "dynamo18"))), path)
    done = subprocess.run([sys.executable, "-c", OPTIMISE, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr[-2000:]


def test_weights_as_constant_nodes(twin: Callable[[str], Path], perturbed: bool) -> None:
    source = twin("bert-eager")
    model = onnx.load(source)
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    path = source.with_suffix(".constants.onnx")
    onnx.save(model, path)
    require(path, perturbed)


class Calibration(CalibrationDataReader):
    def __init__(self, source: Path) -> None:
        model = load(source)
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(
            [make_feeds(model, batch=2, length=n, seed=s) for n, s in ((17, 0), (17, 1), (17, 2), (17, 3))]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        return next(self._feeds, None)


def test_fake_quantised_weights_stay_quantised(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    source, path = tmp_path / "vit.onnx", tmp_path / "vit.qdq.onnx"
    twin_file(ZOO["vit-eager"], zoo_onnx(ZOO["vit-eager"], "torchscript17"), source, perturbed=False)
    quantize_static(
        str(source), str(path), Calibration(source), quant_format=QuantFormat.QDQ, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
    )  # fmt: skip
    done = rewriter.optimize(path, "gqa2")
    assert len(done.rewrite_report.sites) == 2
    assert not any(s.exact for s in done.rewrite_report.sites)  # roundings went with what stood between them
    assert done.rewrite_report.fidelity is not None and done.rewrite_report.fidelity.cosine > 0.999
    new = [v for v in done.model.graph.initializers.values() if v.name and v.name.endswith("weight_quantized")]
    assert len(new) == 4 and {v.const_value.dtype.name for v in new if v.const_value is not None} == {"INT8"}


class _Flattened(torch.nn.Module):
    """Batch and tokens arrive as one axis: [2 * S, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(2, -1, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return (torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v).transpose(1, 2).reshape(-1, 16)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [11, 12, 14])
def test_old_opsets_are_rewritten(opset: int, tmp_path: Path, perturbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = f"torchscript{opset}"
    monkeypatch.setattr(exports, "EXPORTERS", {exporter: (False, opset)})
    case, path = ZOO["bert-eager"], tmp_path / "bert.onnx"
    twin_file(case, exports.export(case, exporter, tmp_path), path, perturbed=perturbed)
    done = require(path, perturbed)
    kept = [note for row in done.rewrite_report.sites for note in row.notes if "convert it first" in note]
    assert len(kept) == (2 if opset < 12 else 0)


def test_where_token_axes_are_lost_attention_stays_and_heads_are_repeated(tmp_path: Path) -> None:
    path, out = tmp_path / "flat.onnx", tmp_path / "new.onnx"
    rows = torch.randn(14, 16, generator=torch.Generator().manual_seed(0))
    for perturbed in (False, True):
        module = _Flattened().eval()
        with torch.no_grad():
            for projection in (module.k, module.v):
                for parameter in projection.parameters():
                    heads = parameter.view(4, 4, *parameter.shape[1:])
                    heads[1:] = heads[:1].clone()
            if perturbed:
                module.v.weight[-1] += 1.0
        torch.onnx.export(module, (rows,), str(path), dynamo=False, opset_version=17, input_names=["x"])
        done = rewriter.optimize(path, "mqa")
        done.save(out)
        (row,) = done.rewrite_report.sites
        assert row.exact is not perturbed and any("reads flattened tokens" in note for note in row.notes)
        error = distance(run_file(out, {"x": rows}), run_file(path, {"x": rows}))
        assert error > 1e-3 if perturbed else error < 1e-4


class _Asked(torch.nn.Module):
    """One attention of torch's own, asked by something else than what it reads: in_proj_weight is cut at a size."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x, memory, memory)[0]


def test_weights_cut_at_sizes_of_inputs_and_lengths_that_no_input_declares(tmp_path: Path, perturbed: bool) -> None:
    """TorchScript's export of nn.MultiheadAttention runs at the length it was traced at, whatever axes are open."""
    torch.manual_seed(0)
    path, out, module = tmp_path / "asked.onnx", tmp_path / "new.onnx", _Asked().eval()
    with torch.no_grad():
        for parameter in (module.attention.in_proj_weight, module.attention.in_proj_bias):
            parameter.normal_()
            heads = parameter[16:].view(2, 4, 4, -1)
            heads[:, 1::2] = heads[:, ::2]
        if perturbed:
            module.attention.in_proj_weight[-1] += 1.0
    feeds = {"x": torch.randn(3, 9, 16), "memory": torch.randn(3, 9, 16)}
    torch.onnx.export(
        module, tuple(feeds.values()), str(path), dynamo=False, opset_version=17, input_names=list(feeds),
        dynamic_axes={name: {0: "batch", 1: "length"} for name in feeds},
    )  # fmt: skip
    done = rewriter.optimize(path, "gqa2")
    (row,) = done.rewrite_report.sites
    assert row.exact is not perturbed
    done.save(out)
    error = distance(run_file(out, feeds), run_file(path, feeds))
    assert error > 1e-3 if perturbed else error < 1e-4


NORMED = """
<ir_version: 8, opset_import: ["" : 17]>
graph (float[b,t,8] x) => (float[b,t,8] y)
<int64[4] split = {0, 0, 4, 2}, int64[3] joined = {0, 0, 8}, float floor = {1e-9}, int64[4] sizes = {1, 4, 1, 2}> {
    q = MatMul(x, wq) qr = Reshape(q, split) qh = Transpose<perm = [0, 2, 1, 3]>(qr)
    k = MatMul(x, wk) kr = Reshape(k, split) kh = Transpose<perm = [0, 2, 1, 3]>(kr)
    v = MatMul(x, wv) vr = Reshape(v, split) vh = Transpose<perm = [0, 2, 1, 3]>(vr)
    length = ReduceL2<axes = [-1], keepdims = 1>(kh) least = Max(length, floor) spread = Expand(least, sizes)
    normed = Div(kh, spread) kt = Transpose<perm = [0, 1, 3, 2]>(normed)
    scores = MatMul(qh, kt) weights = Softmax<axis = -1>(scores) mixed = MatMul(weights, vh)
    back = Transpose<perm = [0, 2, 1, 3]>(mixed) all = Reshape(back, joined) y = MatMul(all, wo)
}
"""


def test_a_norm_that_is_expanded_to_a_written_number_of_heads(tmp_path: Path, perturbed: bool) -> None:
    model, rng = onnx.parser.parse_model(NORMED), np.random.default_rng(0)
    for name in ("wq", "wk", "wv", "wo"):
        numbers = rng.standard_normal((8, 4, 2), np.float32)
        if name in {"wk", "wv"}:
            numbers[:, 1::2] = numbers[:, ::2]
            numbers[:, -1] += float(perturbed)
        model.graph.initializer.append(onnx.numpy_helper.from_array(numbers.reshape(8, 8), name))
    path, out = tmp_path / "normed.onnx", tmp_path / "new.onnx"
    onnx.save(model, path)
    rewriter.optimize(path, "gqa2").save(out)
    feeds = {"x": torch.from_numpy(rng.standard_normal((3, 6, 8), np.float32))}
    error = distance(run_file(out, feeds), run_file(path, feeds))
    assert error > 1e-3 if perturbed else error < 1e-5


@pytest.mark.parametrize("operator", ["If", "Loop"])
def test_attention_in_a_body(operator: str, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """A whole decoder in branches of If is found in both of them; in a loop it is refused by name."""
    inner = onnx.load(zoo_onnx(ZOO["nanogpt-softmax"], "torchscript17"))
    ids = inner.graph.input[0]
    bodies = [onnx.GraphProto(), onnx.GraphProto()]
    for body in bodies:
        body.CopyFrom(inner.graph)
        del body.input[:]
    scalars = [
        helper.make_tensor_value_info(n, t, [])
        for n, t in (("flag", onnx.TensorProto.BOOL), ("n", onnx.TensorProto.INT64))
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    if operator == "If":
        node = helper.make_node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1], name="choice")
    else:
        turn = bodies[0]
        turn.input.extend([helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), scalars[0]])
        turn.node.append(helper.make_node("Identity", ["flag"], ["again"]))
        turn.output.insert(0, helper.make_tensor_value_info("again", onnx.TensorProto.BOOL, []))
        node = helper.make_node("Loop", ["n", "flag"], ["y"], body=turn, name="turns")
    graph = helper.make_graph([node], "g", [*scalars, ids], [output])
    path, out = tmp_path / "body.onnx", tmp_path / "new.onnx"
    onnx.save(helper.make_model(graph, opset_imports=inner.opset_import, ir_version=inner.ir_version), path)
    sites = rewriter.inspect(path).to_dict()["sites"]
    if operator == "Loop":
        assert [s["status"] for s in sites] == ["refused"] and "body of Loop" in sites[0]["reason"]
        with pytest.raises(NothingToRewrite, match="control flow"):
            rewriter.optimize(path, "mqa")
        return
    assert {s["name"].partition(".")[0] for s in sites} == {"then", "else"}
    done = rewriter.optimize(path, "mqa")
    done.save(out)
    plain = rewriter.optimize(zoo_onnx(ZOO["nanogpt-softmax"], "torchscript17"), "mqa")
    assert len(done.rewrite_report.sites) == 2 * len(plain.rewrite_report.sites)
    plain.save(tmp_path / "plain.onnx")
    given = {ids.name: torch.tensor([[3, 1, 4, 1, 5]])}
    for flag in (True, False):
        both = {**given, "flag": torch.tensor(flag), "n": torch.tensor(1)}
        assert distance(run_file(out, both), run_file(tmp_path / "plain.onnx", given)) < 1e-5
        assert distance(run_file(out, both), run_file(path, both)) > 1e-2
