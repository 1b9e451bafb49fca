"""Which exporter handles which case, stated as a table; every exported file equals torch in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from tests.zoo.exports import EXPORTERS, ExportSkipped, exported, exported_with_past
from tests.zoo.models import EXTRA, MAIN, WIDE, ZOO, ZooCase, cases
from tests.zoo.through import DYNAMO, DYNAMO_WITH_PAST, QUICK, exporters, known, matrix

FAILS: dict[tuple[str, str], str] = {
    ("torch-encoder-padded", "dynamo23"): "onnxruntime's Attention does not broadcast a mask over queries",
    ("torch-encoder-padded", "dynamo24"): "onnxruntime's Attention does not broadcast a mask over queries",
    ("whisper-sdpa", "torchscript17"): "no aten::diff in this exporter",
    ("whisper-eager", "torchscript17"): "no aten::diff in this exporter",
    ("gpt-oss-eager", "dynamo18"): "no grouped matrix product in this exporter",
    ("gpt-oss-eager", "torchscript17"): "no aten::histc in this exporter",
    ("deepseek-v3-sdpa", "dynamo18"): "no grouped matrix product in this exporter",
    ("deepseek-v3-sdpa", "torchscript17"): "no aten::histc in this exporter",
    ("cohere-sdpa", "torchscript17"): "repeat_interleave gets a wrong shape",
    ("cohere-norms-sdpa", "torchscript17"): "repeat_interleave gets a wrong shape",
    ("beit-sdpa", "dynamo18"): "a view of what sdpa returns transposed",
    ("complex-rotary", "dynamo18"): "no complex unsqueeze in this exporter",
    ("complex-rotary", "torchscript17"): "no rms_norm in this exporter",
    ("x-alibi", "dynamo18"): "a buffer that the forward makes is written as a fake tensor",
}
"""(case or case-past, exporter) that torch.onnx cannot export, or onnxruntime cannot run: why."""

ROTARY = ["llama-sdpa", "llama-eager", "llama-gqa-sdpa", "llama-gqa-eager", "qwen3-sdpa", "qwen3-eager"]
ROTARY_WITH_PAST = ["llama-sdpa-past", "llama-gqa-sdpa-past", "qwen3-sdpa-past"]
PACKED = ["mha-batch-first", "mha-sequence-first", "torch-encoder", "torch-encoder-padded", "torch-decoder"]
FIXED: frozenset[tuple[str, str]] = frozenset(
    [(name, "dynamo23") for name in ROTARY + ROTARY_WITH_PAST]
    + [(name, "torchscript17") for name in [*PACKED, "x-alibi", "image-attends-text"]]
)
"""What can only be exported with fixed axes: RotaryEmbedding-23 with a cosine cache of batch 1, and
nn.MultiheadAttention, whose traced reshapes hold the batch as a number, a bias that is cached by the forward, and
lengths that Tensor.unflatten writes down as numbers."""

DECODERS = [
    c for c in (*MAIN.values(), *EXTRA.values()) if c.causal and "hf" in c.tags and "encoder-decoder" not in c.tags
]


def _jobs() -> list[object]:
    """The main list by every exporter (with a cache: one implementation); the extras by the quick one; of the wide list
    one implementation by two."""
    cached, quick = cases(having="sdpa"), (QUICK,)
    wide = {case.name.rpartition("-")[0] or case.name: case for case in reversed(WIDE.values())}
    return [
        *matrix(MAIN.values(), told=True),
        *matrix([case for case in DECODERS if case in cached], past=True, told=True),
        *matrix(EXTRA.values(), quick, told=True),
        *matrix([c for c in DECODERS if "extra" in c.tags or "eager" in c.tags], quick, past=True, told=True),
        *matrix(wide.values(), (QUICK, "dynamo18"), told=True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "exporter", "past"), _jobs())
def test_export_succeeds_exactly_where_stated(case: ZooCase, exporter: str, past: bool, zoo_cache: Path) -> None:
    key = (case.name + "-past" * past, exporter)
    try:
        done = (exported_with_past if past else exported)(case, exporter, zoo_cache)
    except ExportSkipped as reason:
        assert key in FAILS, f"unexpectedly not exportable: {reason}"
        return
    assert key not in FAILS, "exports now: take it off the list"
    assert done.dynamic is (key not in FIXED)
    model = onnx.load(done.path)
    assert EXPORTERS[exporter][1] in {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    symbolic = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim if d.HasField("dim_param")}
    assert bool(symbolic) is done.dynamic
    names = [value.name for value in model.graph.input]
    if past:
        assert sum(name.startswith("past_key_values.") for name in names) == 2 * case.sites
        assert sum(value.name.startswith("present.") for value in model.graph.output) == 2 * case.sites


def test_an_unknown_exporter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown exporter"):
        exported(ZOO["mlp"], "dynamo99", tmp_path)


def test_a_model_without_a_cache_cannot_be_exported_with_past(tmp_path: Path) -> None:
    with pytest.raises(ExportSkipped, match="not a causal decoder"):
        exported_with_past(ZOO["bert-sdpa"], "torchscript17", tmp_path)
    assert list(tmp_path.glob("*.skipped.txt")), "the refusal is cached"


def test_no_exporter_is_left_out_of_a_run() -> None:
    """The control of what every run exports: a table that lost a line would otherwise only make the suite faster."""
    assert {*DYNAMO, *DYNAMO_WITH_PAST} <= set(known())
    attending = [case for case in MAIN.values() if "none" not in case.tags]
    assert {tag for name in DYNAMO for tag in known()[name].tags} >= {
        "sdpa",
        "eager",
        "torch",
        "encoder-decoder",
        "refuse",
    }
    for exporter in EXPORTERS:
        here = [case for case in attending if exporter in exporters(case)]
        assert any(not case.causal for case in here), f"{exporter} sees no encoder"
        assert any(case.causal and case.heads == case.kv_heads for case in here), f"{exporter} sees no decoder"
        assert any(case.kv_heads < case.heads for case in here), f"{exporter} sees no grouped heads"
        assert any("torch" in case.tags for case in here), f"{exporter} sees no plain torch"
        assert any(exporter in exporters(case, past=True) for case in DECODERS), f"{exporter} sees no cache"
