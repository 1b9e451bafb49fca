"""Exported decoders of encoder-decoder models: both files are rewritten, and generate together as they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import rewriter
from tests.match.doors import through_onnx
from tests.targets.lossless_twin import distance, session, twin_file
from tests.zoo.decoder_exports import Step, cache_names, encoded, exported_decoder, takes_mask
from tests.zoo.exports import ExportSkipped
from tests.zoo.feeds import HEADS, LAYERS
from tests.zoo.models import EXTRA, ZooCase

JOBS = [
    ("t5-eager", "torchscript17"),
    ("bart-sdpa", "dynamo18"),
    ("bart-eager", "torchscript17"),
    ("whisper-sdpa", "dynamo24"),
    ("whisper-sdpa", "torchscript17"),
]
MORE = [("t5-eager", "dynamo18"), ("bart-sdpa", "dynamo23")]
"""Their exports take longest of all."""
ENCODER = r"(?<!de)encoder\.(block|layers)"
ABSENT: dict[Step, str] = {"first": ENCODER, "next": rf"{ENCODER}|EncDec|encoder_attn"}
"""Parameters that a step's file lacks: the encoder's, and later those that fill the cross-attention's cache."""
POOLED = 2
EXACT, LOSSY = 1e-4, 1e-2

Array = NDArray[Any]
DecoderOnnx = Callable[[ZooCase, str, Step], Path]

every_job = pytest.mark.parametrize(
    ("case", "exporter"),
    [
        pytest.param(EXTRA[job[0]], job[1], id="-".join(job), marks=[pytest.mark.exhaustive] if job in MORE else [])
        for job in (*JOBS, *MORE)
    ],
)


@pytest.fixture
def decoder_onnx(zoo_cache: Path) -> DecoderOnnx:
    def path(case: ZooCase, exporter: str, step: Step) -> Path:
        try:
            return exported_decoder(case, exporter, step, zoo_cache).path
        except ExportSkipped as reason:
            pytest.skip(f"{exporter}: {reason}")

    return path


def twin(case: ZooCase, path: Path, step: Step, folder: Path, *, perturbed: bool = False) -> Path:
    out = folder / f"{step}-{perturbed}.onnx"
    return twin_file(case, path, out, perturbed=perturbed, absent=ABSENT[step])


# ------------------------------------------------------------------ what is found


@every_job
def test_the_first_step_projects_both_caches(case: ZooCase, exporter: str, decoder_onnx: DecoderOnnx) -> None:
    matches = through_onnx(decoder_onnx(case, exporter, "first")).matches
    assert matches.refusals == () and len(matches.sites) == 2 * LAYERS
    assert [s.cross for s in matches.sites] == [False, True] * LAYERS
    for index, site in enumerate(matches.sites):
        kind = "encoder" if site.cross else "decoder"
        assert site.k.presents == ((f"present.{index // 2}.{kind}.key", 1),) and not site.cached
        assert site.v.presents == ((f"present.{index // 2}.{kind}.value", 1),)


@every_job
def test_the_next_step_reads_one_and_grows_the_other(case: ZooCase, exporter: str, decoder_onnx: DecoderOnnx) -> None:
    matches = through_onnx(decoder_onnx(case, exporter, "next")).matches
    assert len(matches.sites) == LAYERS and len(matches.refusals) == LAYERS
    for layer, site in enumerate(matches.sites):
        assert not site.cross and site.cached
        for operand, part in ((site.k, "key"), (site.v, "value")):
            assert (operand.past, operand.past_head_axis) == (f"past_key_values.{layer}.decoder.{part}", 1)
            assert operand.presents == ((f"present.{layer}.decoder.{part}", 1),)
    for layer, refusal in enumerate(matches.refusals):
        assert refusal.layer == layer
        assert f"straight from an input (past_key_values.{layer}.encoder." in refusal.reason
        assert "no projection" in refusal.reason and 'layers="decoder"' in refusal.reason


# ------------------------------------------------------------------ what is rewritten


def rewrite(path: Path, layers: str | None, exact: bool) -> Path:
    done = rewriter.optimize(path, f"gqa{POOLED}", layers=layers)
    assert {row.exact for row in done.rewrite_report.sites} == {exact}
    assert done.rewrite_report.fidelity is not None
    assert (done.rewrite_report.fidelity.max_abs <= EXACT) is exact
    out = path.with_suffix(".rewritten.onnx")
    done.save(out)
    return out


@every_job
def test_a_first_step_alone_gives_up_both_caches(
    case: ZooCase, exporter: str, decoder_onnx: DecoderOnnx, tmp_path: Path
) -> None:
    source = twin(case, decoder_onnx(case, exporter, "first"), "first", tmp_path)
    out = rewrite(source, None, exact=True)
    feeds = first_feeds(case)
    before, after = (run(path, feeds) for path in (source, out))
    assert distance(after["logits"], before["logits"]) <= EXACT
    for name in cache_names("present"):
        assert after[name].shape[1] == POOLED
        assert distance(np.repeat(after[name], HEADS // POOLED, axis=1), before[name]) <= EXACT
    checks = {c.name: c for c in rewriter.verify(out, source).checks}
    assert checks["exact"].ok and all(c.ok for c in checks.values())


@every_job
def test_both_steps_generate_together(case: ZooCase, exporter: str, decoder_onnx: DecoderOnnx, tmp_path: Path) -> None:
    """Own attention in both files; the cross-attention keeps its heads, so its cache fits what the next step reads."""
    logits = {}
    for perturbed in (False, True):
        steps: tuple[Step, ...] = ("first", "next")
        files = [twin(case, decoder_onnx(case, exporter, s), s, tmp_path, perturbed=perturbed) for s in steps]
        new = [
            rewrite(path, layers, exact=not perturbed) for path, layers in zip(files, ("decoder", None), strict=True)
        ]
        logits[perturbed] = generate(case, *files), generate(case, *new)
    expected, got = logits[False]
    assert distance(got, expected) <= EXACT
    expected, got = logits[True]
    assert distance(got, expected) > LOSSY


@pytest.mark.parametrize("name", ["bart-sdpa", pytest.param("whisper-sdpa", marks=pytest.mark.exhaustive)])
def test_what_another_optimiser_fused_is_rewritten(name: str, decoder_onnx: DecoderOnnx, tmp_path: Path) -> None:
    """onnxscript's fusions put MultiHeadAttention behind the grown cache, on heads side by side."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    case = EXTRA[name]
    for perturbed in (False, True):
        source = twin(case, decoder_onnx(case, "dynamo18", "next"), "next", tmp_path, perturbed=perturbed)
        model, _ = optimize_for_ort(ir.load(source))
        ir.save(model, source)
        assert sum(n.op_type == "MultiHeadAttention" for n in onnx.load(source).graph.node) == 2 * LAYERS
        done = rewriter.optimize(source, f"gqa{POOLED}")
        assert [row.exact for row in done.rewrite_report.sites] == [not perturbed] * LAYERS
        assert done.rewrite_report.fidelity is not None
        worst = done.rewrite_report.fidelity.max_abs
        assert worst > LOSSY if perturbed else worst <= EXACT
        kept = [n for n in done.model.graph if n.op_type == "MultiHeadAttention"]
        assert len(kept) == LAYERS, "the cross-attention stays as it was"


def test_a_cache_that_is_not_the_old_one_is_noticed(decoder_onnx: DecoderOnnx, tmp_path: Path) -> None:
    case = EXTRA["t5-eager"]
    source = twin(case, decoder_onnx(case, "torchscript17", "first"), "first", tmp_path)
    out = rewrite(source, None, exact=True)
    model = onnx.load(out)
    name = "present.1.encoder.value"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["before" if n == name else n for n in names]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.01, np.float32), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "factor"], [name]))
    onnx.save(model, out)
    failed = [c.name for c in rewriter.verify(out, source).checks if not c.ok]
    assert failed == ["exact"]


def first_feeds(case: ZooCase) -> dict[str, Array]:
    hidden, *mask = (t.numpy() for t in encoded(case, 2, 9, 5))
    feeds = {"decoder_input_ids": np.array([[7, 11, 13], [17, 19, 23]]), "encoder_hidden_states": hidden}
    return feeds | ({"encoder_attention_mask": mask[0]} if takes_mask(case) else {})


def run(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    opened = session(path)
    wanted = {i.name for i in opened.get_inputs()}
    names = [o.name for o in opened.get_outputs()]
    return dict(zip(names, opened.run(None, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def generate(case: ZooCase, first: Path, later: Path, steps: int = 4) -> Array:
    """Logits of a prompt's last token and of `steps` fixed tokens after it, each on the cache that was left."""
    feeds = first_feeds(case)
    outputs = run(first, feeds)
    kept = {name.replace("present", "past_key_values"): outputs[name] for name in cache_names("present")}
    logits = [outputs["logits"][:, -1]]
    for step in range(steps):
        given = {"decoder_input_ids": np.array([[29 + step], [37 + step]]), **kept}
        outputs = run(later, given | {k: v for k, v in feeds.items() if k == "encoder_attention_mask"})
        grown = {n.replace("present", "past_key_values"): a for n, a in outputs.items() if n.startswith("present")}
        assert all(a.shape[2] == 4 + step for a in grown.values())
        kept |= grown
        logits.append(outputs["logits"][:, -1])
    return np.stack(logits)
