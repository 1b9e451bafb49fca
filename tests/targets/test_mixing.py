"""Mixing in place of attention, through every door: a rewritten sublayer is the oracle's function of its own input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

import rewriter
from codegen.device import host
from codegen.ops.fourier_mixing.reference import fourier_mixing as oracle
from passes.sublayer import NoSublayer, sublayer
from passes.targets import Fourier, GroupedQuery
from passes.targets.catalogue import find
from passes.weights.diagonal import DiagonalSums
from rewriter.cli import run
from rewriter.errors import NothingToRewrite, UnsupportedModel
from rewriter.install.token_mixer import Absorbed, TokenMixer, absorbed, token_mixers
from rewriter.report.rewrite_report import note_lines
from tests.covering import covering
from tests.match.doors import through_torch
from tests.targets.lossless_twin import run_file
from tests.targets.watched_mixes import Watched, off, relative, rewritten
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO
from tests.zoo.through import through

Array = NDArray[Any]
ZooOnnx = Callable[..., Path]
CLOSE = 1e-5
"""Relative to the largest number of the answer: float32, sums over whole sequences."""

NAMES = (
    *("bert-sdpa", "bert-eager", "distilbert-sdpa", "vit-sdpa", "modernbert-sdpa", "wav2vec2-sdpa", "dinov2-sdpa"),
    *("mha-batch-first", "mha-sequence-first", "torch-encoder", "torch-encoder-padded", "packed-permute-norm"),
)
TWO_STACKS = ("t5-sdpa", "bart-sdpa", "whisper-sdpa")
TARGETS = ("fnet", "hartley")
EVERY_MIX = (
    *("fnet", "fnet-hybrid:4", "hartley", "linear-mixer", "circulant", "toeplitz"),
    *("sparse-mixer", "fast-sparse-mixer"),
)


# ------------------------------------------------------------------ modules


@pytest.mark.parametrize(("case", "target"), covering([ZOO[n] for n in (*NAMES, *TWO_STACKS)], TARGETS))
def test_a_rewritten_module_is_the_oracle_of_its_input(case: ZooCase, target: str) -> None:
    model = rewritten(case, target)
    report = model.rewrite_report
    mixed = token_mixers(model)
    assert len(mixed) == len(report.sites) == 2
    assert {row.after for row in report.sites} == {target} and not any(row.exact for row in report.sites)
    assert {row.step for row in report.sites} == {"structure only, needs uptraining"}
    assert {row.merge for row in report.sites} == {"none"}
    watched = Watched(model)
    for size in ((2, 7, 0), (3, 9, 1), (1, 12, 2)):
        case.run(model, case.inputs(*size))
        for path, (hidden, answer) in watched.mixes.items():
            assert off(answer, oracle(mixed[path].spec, hidden)) < CLOSE
            assert off(answer, oracle(mixed[path].spec, np.roll(hidden, 1, axis=1))) > 1e-2  # the control
    for path in absorbed(model):  # where the output projection lies outside, nothing is left of it
        assert any(np.array_equal(watched.passed[path], answer) for _, answer in watched.mixes.values())


def test_the_output_projection_goes_wherever_it_lies() -> None:
    """BERT's lies outside its attention module; both together are the mix, and no weight of either is left."""
    outside, inside = rewritten(ZOO["bert-sdpa"], "fnet"), rewritten(ZOO["distilbert-sdpa"], "fnet")
    assert len(absorbed(outside)) == 2 and not absorbed(inside)
    for model, part in ((outside, "attention"), (inside, ".attention")):
        left = [n for n, _ in model.named_parameters() if part in n and "LayerNorm" not in n]
        assert left == []
    before = sum(p.numel() for p in ZOO["bert-sdpa"].build().parameters())
    assert outside.rewrite_report.parameters.before == before
    assert outside.rewrite_report.parameters.after == sum(p.numel() for p in outside.parameters())
    assert outside.rewrite_report.kv_bytes_per_token.after == 0
    assert outside.rewrite_report.flops.after < outside.rewrite_report.flops.before


def test_the_original_is_left_alone() -> None:
    case = ZOO["bert-sdpa"]
    model, inputs = case.build(), case.inputs(2, 7, 0)
    before, names = case.run(model, inputs), list(model.state_dict())
    rewriter.optimize(model, "fnet", example_inputs=inputs)
    assert torch.equal(case.run(model, inputs), before) and list(model.state_dict()) == names


def test_padding_takes_part() -> None:
    """FNet has no mask: a padded row is the oracle of the whole row, and not what it is without its padding."""
    case = ZOO["bert-sdpa"]
    model = rewritten(case, "fnet")
    watched = Watched(model)
    inputs = case.inputs(2, 8, 0)
    inputs["attention_mask"][1, 5:] = 0
    whole = case.run(model, inputs)
    for path, (hidden, answer) in watched.mixes.items():
        assert off(answer, oracle(token_mixers(model)[path].spec, hidden)) < CLOSE
    inputs["attention_mask"][1, 5:] = 1
    assert torch.equal(case.run(model, inputs), whole)  # what the mask says makes no difference
    short = {name: value[1:, :5] for name, value in inputs.items()}
    assert relative(whole[1:, :5], case.run(model, short)) > 1e-2
    assert any("padded tokens take part" in note for note in model.rewrite_report.sites[0].notes)


def test_a_rewritten_module_trains_compiles_and_exports() -> None:
    case = ZOO["bert-sdpa"]
    calibration = [case.inputs(4, 8, seed) for seed in range(3)]
    model = rewritten(case, "fnet", calibration=calibration)
    inputs = case.inputs(2, 8, 0)
    case_output = model.train()(**inputs).last_hidden_state
    case_output.square().sum().backward()
    for mixer in token_mixers(model).values():
        assert mixer.gain is not None and mixer.gain.grad is not None and float(mixer.gain.grad.abs().sum()) > 0
    model.eval()
    expected = case.run(model, inputs)
    program = torch.export.export(model, (), inputs, strict=False)
    assert relative(program.module()(**inputs).last_hidden_state, expected) < CLOSE
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(**inputs).last_hidden_state, expected) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    case = ZOO["bert-sdpa"]
    model = rewriter.optimize(case.build().to(dtype), "fnet", example_inputs=case.inputs(2, 7, 0), verify=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    full = case.run(rewritten(case, "fnet"), case.inputs(2, 7, 0))
    assert relative(case.run(model, case.inputs(2, 7, 0)).float(), full) < 0.1


def test_what_a_mix_cannot_do_is_an_error_when_asked() -> None:
    bert = rewritten(ZOO["bert-sdpa"], "fnet")
    mixer = next(iter(token_mixers(bert).values()))
    x = torch.randn(1, 5, mixer.spec.hidden)
    encoder = next(iter(token_mixers(rewritten(ZOO["mha-batch-first"], "fnet")).values()))
    y = torch.randn(1, 5, encoder.spec.hidden)
    with pytest.raises(TypeError, match="another sequence"):
        encoder(y, y.clone(), y)
    with pytest.raises(TypeError, match="causal"):
        encoder(y, y, y, is_causal=True)
    with pytest.raises(TypeError, match="attention weights"):
        encoder(y, y, y, need_weights=True)
    with pytest.raises(TypeError, match="cache"):
        mixer(x, past_key_values=object())
    with pytest.raises(TypeError, match="not understood"):
        mixer(x, something=torch.ones(1))


# ------------------------------------------------------------------ hybrids, mappings, refusals


def test_a_hybrid_keeps_the_top_attentions() -> None:
    case = ZOO["bert-sdpa"]
    model = rewritten(case, "fnet-hybrid:1")
    rows = model.rewrite_report.sites
    assert [(row.before, row.after, row.kept) for row in rows] == [("mha4", "fnet", False), ("mha4", "mha4", True)]
    assert rows[1].exact and "keeps the top 1" in rows[1].notes[0]
    assert list(token_mixers(model)) == ["encoder.layer.0.attention.self"]
    assert "1 rewritten, 1 kept, 0 refused" in str(model.rewrite_report)
    with pytest.raises(NothingToRewrite, match="keeps the top 2"):
        rewritten(case, "fnet-hybrid")
    one, two = find("fnet-hybrid"), find("fnet-hybrid:5")
    assert (one, two) == (Fourier(keep=2), Fourier(keep=5)) and find("fnet-hybrid:0") is None
    assert one is not None and two is not None and (one.name, two.name) == ("fnet-hybrid", "fnet-hybrid:5")
    with pytest.raises(ValueError, match="negative"):
        Fourier(keep=-1)


def test_a_hybrid_of_t5_hands_on_the_position_bias() -> None:
    """T5's first attention computes the score bias that later ones use; the mix in its place still does."""
    case = ZOO["t5-sdpa"]
    model = rewritten(case, {"encoder": "fnet-hybrid:1"})
    assert [row.kept for row in model.rewrite_report.sites] == [False, True]
    original, inputs = case.build(), case.inputs(2, 7, 0)
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.encoder.block[0].layer[0].SelfAttention.register_forward_hook(  # type: ignore[union-attr,index]
            lambda m, a, out: seen.__setitem__(name, out[1])
        )

    watch("before", original)
    watch("after", model)
    case.run(original, inputs), case.run(model, inputs)
    assert seen["before"].abs().max() > 0 and torch.equal(seen["before"], seen["after"])


def albert() -> nn.Module:
    """Three layers that are one module."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "vocab_size": 64}
    model: nn.Module = AlbertModel(AlbertConfig(num_attention_heads=4, num_hidden_layers=3, **sizes)).eval()
    return model


def test_layers_that_share_weights_stay_together() -> None:
    inputs = ZOO["bert-sdpa"].inputs(2, 9, 3)
    inputs.pop("token_type_ids", None)
    with pytest.raises(NothingToRewrite, match="shares its weights"):
        rewriter.optimize(albert(), "fnet-hybrid:1", example_inputs=inputs)
    for calibration in (None, [inputs]):
        model = rewriter.optimize(albert(), "fnet", example_inputs=inputs, calibration=calibration)
        assert len(token_mixers(model)) == 1 and len(model.rewrite_report.sites) == 3
        (mixer,) = token_mixers(model).values()
        assert mixer.protocol.adds_input and mixer.output_norm is not None  # both are inside ALBERT's attention
        vectors = [getattr(mixer, name).detach().numpy() for name in mixer.spec.shapes]
        assert len(vectors) == (0 if calibration is None else 2)
        x = torch.randn(2, 6, 32)
        expected = mixer.output_norm(torch.from_numpy(oracle(mixer.spec, x.numpy(), *vectors)).float() + x)
        assert off(mixer(x)[0].detach().numpy(), expected.detach().numpy()) < CLOSE
        assert model.rewrite_report.parameters.after == sum(p.numel() for p in model.parameters())


def test_targets_mix_in_one_call() -> None:
    case = ZOO["bert-sdpa"]
    model = rewritten(case, {"0": "fnet", "1": GroupedQuery(2)})
    assert [row.after for row in model.rewrite_report.sites] == ["fnet", "gqa2"]
    alone = rewritten(case, GroupedQuery(2), layers="1")
    for name, tensor in alone.state_dict().items():
        if "layer.1" in name:
            assert torch.equal(model.state_dict()[name], tensor)


REFUSALS = [
    pytest.param("gpt2-sdpa", "is causal", id="causal"),
    pytest.param("llama-sdpa", "is causal", id="causal-rotary"),
    pytest.param("torch-decoder", "cross-attention", id="cross"),
]


@pytest.mark.parametrize(("name", "reason"), REFUSALS)
def test_refusals_say_why(name: str, reason: str) -> None:
    with pytest.raises(NothingToRewrite, match=reason):
        rewritten(ZOO[name], "fnet")


def test_a_decoder_step_with_a_cache_is_refused(zoo_onnx: ZooOnnx) -> None:
    path = zoo_onnx(ZOO["gpt2-eager"], "dynamo18", past=True)
    with pytest.raises(NothingToRewrite, match="cache"):
        rewriter.optimize(path, "fnet")


def test_an_attention_without_its_own_end_is_no_sublayer() -> None:
    seen = through_torch(ZOO["bert-sdpa"])
    site = seen.matches.sites[0]
    evidence = seen.matches.evidence[site.name]
    assert site.out is not None
    whole = sublayer(seen.flow, site, evidence)
    assert (whole.output, whole.batch_first) == (site.out.output, True)
    other = replace(site.v, projection=replace(site.v.projection, input=site.out.output))
    for wrong, reason in (
        (replace(site, out=None), "no output projection"),
        (replace(site, v=other), "not made of the same hidden states"),
        (replace(site, out=replace(site.out, features=7)), "maps 32 features to 7"),
    ):
        with pytest.raises(NoSublayer, match=reason):
            sublayer(seen.flow, wrong, evidence)


def test_a_module_that_does_more_than_attend_is_refused_and_its_graph_is_not() -> None:
    class Doubled(nn.Module):
        """Attention that adds its input twice: no sublayer that a mix could stand for."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(hidden_states).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(attended.transpose(1, 2).flatten(2)) + 2 * hidden_states

    torch.manual_seed(0)
    model = nn.Sequential(Doubled(), nn.LayerNorm(16)).eval()
    x = torch.randn(2, 6, 16)
    with pytest.raises(NothingToRewrite, match="does more than attend"):
        rewriter.optimize(model, "fnet", example_inputs=(x,))
    program = rewriter.optimize(torch.export.export(model, (x,)), "fnet")
    with torch.no_grad():
        expected = model[1](torch.fft.fft2(x, dim=(1, 2)).real + 2 * x)
        assert relative(program.module()(x), expected) < CLOSE


# ------------------------------------------------------------------ graphs


@pytest.mark.parametrize(("case", "target"), covering([ZOO[n] for n in NAMES], TARGETS))
def test_a_program_computes_what_the_module_does(case: ZooCase, target: str) -> None:
    inputs = case.inputs(2, 7, 0)
    expected = case.run(rewritten(case, target), inputs)
    program = torch.export.export(case.build(), (), inputs, strict=False)
    after = rewriter.optimize(program, target)
    assert relative(case.run(after.module(), inputs), expected) < CLOSE
    calls = [str(n.target) for n in after.graph.nodes if n.op == "call_function"]
    assert not any("softmax" in call or "attention" in call for call in calls)
    assert after.rewrite_report.parameters.after == sum(t.numel() for t in after.state_dict.values())
    assert relative(case.run(program.module(), inputs), expected) > 1e-2  # the control, and the input as it was


def test_a_program_keeps_its_dynamic_length(tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    inputs, tokens = case.inputs(2, 8, 0), torch.export.Dim("tokens", min=2, max=64)
    shapes = {name: {1: tokens} for name in inputs}
    program = torch.export.export(case.build(), (), inputs, dynamic_shapes=shapes, strict=False)
    calibration = [case.inputs(2, 8, seed) for seed in range(3)]
    after = rewriter.optimize(program, "fnet", calibration=calibration)
    torch.export.save(after, tmp_path / "mixed.pt2")
    again = torch.export.load(tmp_path / "mixed.pt2")
    module = rewritten(case, "fnet", calibration=calibration)
    for length in (8, 5, 13):
        more = case.inputs(2, length, 1)
        assert relative(case.run(again.module(), more), case.run(module, more)) < 1e-4


# ------------------------------------------------------------------ files


def inner(path: Path, feeds: dict[str, Array]) -> list[tuple[Array, Array, list[Array]]]:
    """For every mix in a file (its input, its output, gain and bias if there are any) when it runs."""
    model = onnx.load(path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    mixes = [n for n in model.graph.node if n.op_type in ("FourierMixing", "HartleyMixing", "FourierMixingGainBias")]
    wanted = [name for n in mixes for name in (n.input[0], n.output[0])]
    present = {o.name for o in model.graph.output} | {i.name for i in model.graph.input}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(wanted) if n not in present)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = [np.asarray(v) for v in session.run(wanted, feeds)]
    vectors = [[stored[n] for n in m.input if n in stored and stored[n].ndim == 1] for m in mixes]
    return [(values[2 * i], values[2 * i + 1], vectors[i]) for i in range(len(mixes))]


FILES = [pytest.param(c, "fnet", e, id=f"fnet-{e}-{c.name}") for c, e in through(ZOO[n] for n in NAMES)]
FILES += [pytest.param(ZOO[n], "hartley", "torchscript17", id=f"hartley-torchscript17-{n}") for n in NAMES[::3]]


@pytest.mark.parametrize(("case", "target", "exporter"), FILES)
def test_a_file_computes_what_the_module_does(
    case: ZooCase, target: str, exporter: str, zoo_onnx: ZooOnnx, tmp_path: Path
) -> None:
    source, out = zoo_onnx(case, exporter), tmp_path / "mixed.onnx"
    result = rewriter.optimize(source, target)
    result.save(out)
    before, after = onnx.load(source), onnx.load(out)
    assert [(o.domain, o.version) for o in after.opset_import if not o.domain] == [
        (o.domain, o.version) for o in before.opset_import if not o.domain
    ]
    kinds = [n.op_type for n in after.graph.node]
    assert kinds.count("Softmax") == kinds.count("Attention") == 0
    assert sum(n.domain == "rewriter.ops" for n in after.graph.node) == 3  # one table of lengths, two mixes
    read = {name for n in after.graph.node for name in n.input} | {o.name for o in after.graph.output}
    assert all(any(name in read for name in n.output) for n in after.graph.node)  # nothing unread is left
    assert {t.name for t in after.graph.initializer} <= read
    module = rewritten(case, target)
    dynamic = any(d.dim_param for v in before.graph.input for d in v.type.tensor_type.shape.dim)
    for size in ((2, 7, 0), (3, 4, 1)) if dynamic and "23" not in exporter else ((2, 7, 0),):
        inputs = case.inputs(*size)
        expected = case.run(module, inputs)
        assert relative(run_file(out, inputs), expected) < CLOSE
        assert relative(run_file(source, inputs), expected) > 1e-2  # the control
    assert rewriter.verify(out, source).ok


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed: torch.Tensor = self.out((q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return mixed


class Layers(nn.Module):
    """Five of them: the sparse mixers keep the attention of four."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.attentions = nn.ModuleList(Attention(width) for _ in range(5))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, block in zip(self.attentions, self.blocks, strict=True):
            x = self.norm(x + attention(x))
            x = self.norm(x + block(x))
        return x


def operators(model: onnx.ModelProto) -> set[str]:
    """Of all nodes, those of functions and branches included."""
    todo = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    found = set()
    while todo:
        node = todo.pop()
        found.add(node.op_type)
        todo += [n for a in node.attribute for g in (a.g, *a.graphs) for n in g.node]
    return found


def tables(path: Path, feeds: dict[str, Array]) -> list[Array]:
    """Of every transform over tokens in a file when it runs."""
    model = onnx.load(path)
    names = [o for n in model.graph.node if n.op_type in ("FourierTables", "HartleyTables") for o in n.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(v) for v in session.run(names, feeds)]


@pytest.mark.slow
def test_files_transform_in_two_levels_and_never_by_the_standard_operator(tmp_path: Path) -> None:
    x, source, out = torch.randn(1, 12, 16), tmp_path / "layers.onnx", tmp_path / "mixed.onnx"
    free = ({1: torch.export.Dim("tokens", max=512)},)
    torch.onnx.export(
        Layers().eval(), (x,), str(source), input_names=["x"], opset_version=18, dynamo=True, dynamic_shapes=free
    )
    for target in EVERY_MIX:
        rewriter.optimize(source, target, verify=False).save(out)
        written = onnx.load(out)
        assert not {"DFT", "STFT"} & operators(written), target
        assert any("Mix" in n.op_type for n in written.graph.node), target
        if not target.startswith(("fnet", "hartley")):
            continue
        features = [tuple(t.dims) for t in written.graph.initializer if t.name.startswith("fourier_16")]
        assert features == [(8, 4), (4, 8, 6)], "9 features and what fills the last block, not 16"
        module = rewriter.optimize(Layers().eval(), target, example_inputs=(x,), kernels="off", verify=False)
        for tokens, first in ((12, 3), (512, 16)):
            more = torch.randn(1, tokens, 16)
            sizes = {t.shape for t in tables(out, {"x": more.numpy()})}
            rest = tokens // first
            assert sizes == {(2 * first, first), (tokens,), (first, rest, 4 * rest)}, "in two levels"
            with torch.no_grad():
                assert relative(run_file(out, {"x": more}), module(more)) < 2e-5
                assert relative(run_file(out, {"x": more.flip(1)}), module(more)) > 1e-2  # the control
    written.functions[0].node.append(onnx.helper.make_node("DFT", ["x"], ["y"]))
    assert "DFT" in operators(written)  # the control


def test_a_files_record_lists_what_went(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    source, out = zoo_onnx(ZOO["bert-sdpa"], "dynamo18"), tmp_path / "mixed.onnx"
    rewriter.optimize(source, "fnet-hybrid:1").save(out)
    before, after = ({t.name for t in onnx.load(p).graph.initializer} for p in (source, out))
    sites = json.loads(next(p.value for p in onnx.load(out).metadata_props if p.key == "rewriter.sites"))
    assert [(s["to"], s["exact"], s["caches"]) for s in sites] == [("fnet", False, [])]
    gone = before - after
    assert gone == set(sites[0]["changed"]) and len(gone) >= 8
    tampered = onnx.load(out)
    kept = next(t for t in tampered.graph.initializer if t.name in before and len(t.dims) == 2)
    kept.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kept) + 1, kept.name))
    onnx.save(tampered, tmp_path / "tampered.onnx")
    assert not rewriter.verify(tmp_path / "tampered.onnx", source).ok  # the control


@pytest.mark.parametrize("calibrated", [False, True], ids=["bare", "fitted"])
def test_a_fused_files_later_bias_is_accounted_for(calibrated: bool, zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    """onnxruntime's optimizer moves the output projection's bias into the norm behind it, where a mix must not meet it;
    a fit is made of what comes before that bias, and leaves it."""
    from onnxruntime.transformers.optimizer import optimize_model

    case = ZOO["bert-eager"]
    fused, out = tmp_path / "fused.onnx", tmp_path / "mixed.onnx"
    made = optimize_model(str(zoo_onnx(case, "torchscript17")), model_type="bert", num_heads=4, hidden_size=32)
    made.save_model_to_file(str(fused))
    assert [n.op_type for n in onnx.load(fused).graph.node].count("Attention") == 2
    calibration = [case.inputs(2, 7, seed) for seed in range(3)] if calibrated else None
    rewriter.optimize(fused, "fnet", calibration=calibration).save(out)
    norms = [n for n in onnx.load(out).graph.node if n.op_type == "SkipLayerNormalization"]
    assert len([n for n in norms if len(n.input) > 4 and n.input[4]]) == (4 if calibrated else 2)
    module = rewritten(case, "fnet", calibration=calibration)
    for size in ((2, 7, 0), (3, 11, 1)):
        inputs = case.inputs(*size)
        assert relative(run_file(out, inputs), case.run(module, inputs)) < (1e-3 if calibrated else CLOSE)
    assert rewriter.verify(out, fused).ok


def test_a_compiled_model_and_a_graph_module_are_mixed() -> None:
    case = ZOO["mha-batch-first"]
    inputs = case.inputs(2, 7, 0)
    expected = case.run(rewritten(case, "fnet"), inputs)
    graph = torch.export.export(case.build(), (), inputs, strict=False).module()
    assert relative(case.run(rewriter.optimize(graph, "fnet", example_inputs=inputs), inputs), expected) < CLOSE
    torch._dynamo.reset()
    compiled = torch.compile(case.build(), backend="rewriter", options={"target": "fnet", "backend": "eager"})
    with torch.no_grad():
        assert relative(case.run(compiled, inputs), expected) < CLOSE
    torch._dynamo.reset()


# ------------------------------------------------------------------ fits


@given(seed=st.integers(0, 999), features=st.integers(1, 5), rows=st.integers(3, 30))
@settings(max_examples=40, deadline=None)
def test_a_diagonal_fit_is_least_squares(seed: int, features: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, rows, features))
    x[:, 0] = x[0, 0]  # a feature that never varies
    sums = DiagonalSums()
    for part in np.array_split(np.arange(rows), 3):
        sums.add(x[part], y[part])
    fit = sums.solve()
    for d in range(1, features):
        design = np.stack([x[:, d], np.ones(rows)], axis=1)
        gain, bias = np.linalg.lstsq(design, y[:, d], rcond=None)[0]
        assert np.isclose(fit.gain[d], gain) and np.isclose(fit.bias[d], bias)
    assert fit.gain[0] == 0 and np.isclose(fit.bias[0], y[:, 0].mean())
    left = float(((x * fit.gain + fit.bias - y) ** 2).sum()) / float((y**2).sum())
    assert np.isclose(fit.explained, 1 - left) and 0 <= fit.constant <= fit.explained + 1e-9


FITTED = [pytest.param(ZOO[n], id=n) for n in ("bert-sdpa", "vit-sdpa", "mha-sequence-first")]


@pytest.mark.parametrize("case", FITTED)
def test_calibration_fits_the_scale(case: ZooCase) -> None:
    batches = [case.inputs(4, 9, 100 + seed) for seed in range(6)]
    model = rewritten(case, "fnet", calibration=batches)
    bare = rewritten(case, "fnet")
    assert {row.merge for row in model.rewrite_report.sites} == {"diagonal"}
    assert all("the fit explains" in row.notes[0] for row in model.rewrite_report.sites)

    def error(candidate: nn.Module) -> float:
        original, total, size = case.build(), 0.0, 0.0
        for inputs in batches:
            a, b = case.run(original, inputs), case.run(candidate, inputs)
            total, size = total + float((a - b).square().sum()), size + float(a.square().sum())
        return (total / size) ** 0.5

    assert error(model) < error(bare)
    worse = copy.deepcopy(model)
    for mixer in token_mixers(worse).values():
        assert mixer.gain is not None and mixer.bias is not None
        mixer.gain.data.mul_(-1)
        mixer.bias.data.mul_(-1)
    assert error(model) < error(worse)  # the control


def test_both_doors_fit_alike(zoo_onnx: ZooOnnx, tmp_path: Path) -> None:
    case = ZOO["bert-sdpa"]
    batches = [{n: v.numpy() for n, v in case.inputs(4, 9, 100 + seed).items()} for seed in range(4)]
    module = rewritten(case, "fnet", calibration=batches)
    out = tmp_path / "mixed.onnx"
    rewriter.optimize(zoo_onnx(case, "dynamo18"), "fnet", calibration=batches).save(out)
    feeds = {n: v.numpy() for n, v in case.inputs(2, 7, 0).items()}
    named = {i.name for i in onnx.load(out).graph.input}
    found = inner(out, {n: v for n, v in feeds.items() if n in named})
    for (hidden, answer, vectors), mixer in zip(found, token_mixers(module).values(), strict=True):
        assert mixer.gain is not None and mixer.bias is not None
        assert np.allclose(vectors[0], mixer.gain.detach().numpy(), rtol=1e-3, atol=1e-5)
        assert np.allclose(vectors[1], mixer.bias.detach().numpy(), rtol=1e-3, atol=1e-5)
        assert off(answer, oracle(mixer.spec, hidden, *vectors)) < CLOSE
    assert relative(run_file(out, case.inputs(2, 7, 0)), case.run(module, case.inputs(2, 7, 0))) < 1e-3


def test_examples_are_no_calibration() -> None:
    case = ZOO["bert-sdpa"]
    models = [
        rewriter.optimize(case.build(), "fnet", example_inputs=case.inputs(*size)) for size in ((2, 7, 0), (3, 5, 9))
    ]
    states = [m.state_dict() for m in models]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


# ------------------------------------------------------------------ saving


def test_a_mixed_model_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModel

    case = ZOO["bert-sdpa"]
    calibration = [case.inputs(4, 8, seed) for seed in range(3)]
    model = rewritten(case, {"0": "fnet", "1": "gqa2"}, calibration=calibration)
    model.save_pretrained(tmp_path / "mixed")
    again = rewriter.load(tmp_path / "mixed")
    assert torch.equal(case.run(again, case.inputs(2, 9, 1)), case.run(model, case.inputs(2, 9, 1)))
    assert [type(m) for m in again.modules() if isinstance(m, (TokenMixer, Absorbed))] == [TokenMixer, Absorbed]
    with pytest.raises((ValueError, OSError)):
        AutoModel.from_pretrained(tmp_path / "mixed")


def test_a_plain_module_is_saved_and_loaded(tmp_path: Path) -> None:
    case = ZOO["mha-sequence-first"]
    model = rewritten(case, "hartley")
    rewriter.save(model, tmp_path / "mixed")
    again = rewriter.load(tmp_path / "mixed", module=case.build())
    assert torch.equal(case.run(again, case.inputs(2, 9, 1)), case.run(model, case.inputs(2, 9, 1)))


# ------------------------------------------------------------------ the rest of the interface


def test_inspect_names_the_targets_that_fit() -> None:
    bert = rewriter.inspect(ZOO["bert-sdpa"].build())
    assert all({"fnet", "hartley", "mqa"} <= set(bert.targets[site.name]) for site in bert.sites)
    assert not any({"fnet-hybrid", "sparse-mixer"} & set(bert.targets[site.name]) for site in bert.sites), (
        "all are kept"
    )
    gpt2 = rewriter.inspect(ZOO["gpt2-sdpa"].build())
    assert gpt2.sites and not any("fnet" in row["targets"] for row in gpt2.to_dict()["sites"])


def test_the_command_line_mixes_a_file(zoo_onnx: ZooOnnx, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(zoo_onnx(ZOO["bert-sdpa"], "dynamo18")), tmp_path / "mixed.onnx"
    assert run(["rewrite", source, str(out), "--target", "fnet-hybrid:1", "--strict", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [(s["from"], s["to"], s["exact"], s["merge"]) for s in written["sites"]] == [
        ("mha4", "fnet", False, "none"),
        ("mha4", "mha4", True, "none"),
    ]
    assert written["refused"] == [] and written["sites"][0]["step"] == "structure only, needs uptraining"
    assert run(["rewrite", source, str(out), "--target", "fnet"]) == 0
    told = capsys.readouterr().out
    assert "structure only, needs uptraining" in told and "padded tokens take part" in told
    assert run(["rewrite", source, str(tmp_path / "no.onnx"), "--target", "fnet", "--merge", "mean"]) == 2
    assert "has none" in capsys.readouterr().err and not (tmp_path / "no.onnx").exists()
    assert run(["targets", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["targets"]}
    assert {"fnet", "fnet-hybrid[:k]", "hartley"} <= names


def test_a_note_that_many_sites_have_is_told_once() -> None:
    lines = note_lines([("a", ("same", "own")), ("b", ("same",)), ("c", ("same",)), ("d", ())])
    assert lines == ["a and 2 more: same", "a: own"]
    assert note_lines([("a", ("same",)), ("b", ("same",))]) == ["a: same", "b: same"]


def test_kernels_are_called_where_they_are_asked_for() -> None:
    case = ZOO["bert-sdpa"]
    auto, plain = (rewritten(case, "fnet", kernels=kernels) for kernels in ("auto", "off"))
    right = case.run(plain, case.inputs(2, 7, 0))
    assert torch.equal(case.run(auto, case.inputs(2, 7, 0)), right), "so small a mix is left to torch"
    if not host().arch:
        pytest.skip("no instruction set that there are kernels for")
    kernel = rewritten(case, "fnet", kernels="cpp")
    assert {m.kernels for m in token_mixers(kernel).values()} == {"cpp"}
    assert relative(case.run(kernel, case.inputs(2, 7, 0)), right) < CLOSE


CHAINS = [("fnet", "gqa2"), ("gqa2", "fnet"), ("fnet", "hartley")]


@pytest.mark.parametrize("targets", CHAINS, ids="-".join)
def test_one_mix_reads_what_another_left(targets: tuple[str, str], tmp_path: Path) -> None:
    """Attentions that follow each other directly, without a norm or a residual between."""
    torch.manual_seed(0)
    net, x = nn.Sequential(PlainAttention(), PlainAttention()).eval(), torch.randn(2, 9, 32)
    with torch.no_grad():
        module = rewriter.optimize(net, dict(zip("01", targets, strict=True)), example_inputs=(x,))(x)
        program = rewriter.optimize(torch.export.export(net, (x,)), dict(zip("01", targets, strict=True))).module()(x)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    torch.onnx.export(
        net, (x,), str(before), dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "b", 1: "s"}},
    )  # fmt: skip
    names = [site.name for site in rewriter.inspect(before).sites]
    rewriter.optimize(before, dict(zip(names, targets, strict=True))).save(after)
    (answer,) = ort.InferenceSession(str(after), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert relative(program, module) < CLOSE and relative(answer, module) < CLOSE
    with torch.no_grad():
        assert relative(net(x), module) > CLOSE, "the control: the original is another function"


class PlainAttention(nn.Module):
    """Four heads of eight features."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        merged: torch.Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return merged


# ------------------------------------------------------------------ real weights


def test_a_real_encoder_is_mixed() -> None:
    from rewriter.demo.weights import minilm

    try:
        model, tokenizer = minilm()
    except UnsupportedModel as reason:
        pytest.skip(str(reason))
    texts = ["The fit is made on what the model is used for.", "A second text, somewhat longer than the first one."] * 4
    mixed = rewriter.optimize(model, "fnet-hybrid", calibration=(texts, tokenizer))
    assert [row.after for row in mixed.rewrite_report.sites] == ["fnet"] * 4 + ["mha12"] * 2
    watched = Watched(mixed)
    batch = tokenizer(texts[:2], return_tensors="pt", padding=True)
    with torch.no_grad():
        mixed(**batch)
    for path, mixer in token_mixers(mixed).items():
        hidden, answer = watched.mixes[path]
        assert mixer.gain is not None and mixer.bias is not None
        expected = oracle(mixer.spec, hidden, mixer.gain.detach().numpy(), mixer.bias.detach().numpy())
        assert off(answer, expected) < CLOSE


def test_a_real_file_is_mixed(tmp_path: Path) -> None:
    from rewriter.demo.weights import minilm_int8_onnx

    try:
        source = minilm_int8_onnx()
    except UnsupportedModel as reason:
        pytest.skip(str(reason))
    out = tmp_path / "mixed.onnx"
    rewriter.optimize(source, "fnet").save(out)
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (2, 17))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    named = {i.name for i in onnx.load(out).graph.input}
    found = inner(out, {n: v for n, v in feeds.items() if n in named})
    assert len(found) == 6
    from codegen.spec import FourierMixing

    for hidden, answer, _ in found:
        assert off(answer, oracle(FourierMixing(384), hidden)) < CLOSE
        assert off(answer, oracle(FourierMixing(384, hartley=True), hidden)) > 1e-2  # the control
