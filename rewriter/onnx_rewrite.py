"""The pipeline for .onnx: capture → match → plan → transform → install → verify, on an onnx_ir model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir

import rewriter
from passes.match.attention import Matches, find_attention
from passes.match.confirm import confirm
from passes.protocols import Probe
from passes.site import Refusal
from rewriter.calibration.batches import batches
from rewriter.calibration.onnx_trial import onnx_probe
from rewriter.capture.onnx_file import OnnxCapture, capture, hidden_anchors
from rewriter.capture.onnx_load import from_proto
from rewriter.capture.unfuse import fused_nodes, unfuse
from rewriter.decision import Decision, Stopwatch, decide, is_causal, report, rows
from rewriter.errors import NothingToRewrite, VerificationFailed
from rewriter.install.onnx_function import install
from rewriter.install.onnx_obstacles import obstacle
from rewriter.report.rewrite_report import RewriteReport
from rewriter.verify.onnx_pair import verify_onnx

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 4}


def match_onnx(model: ir.Model) -> tuple[OnnxCapture, Matches]:
    """Capture and match; every site has replayed at two sizes, or at one if the file's sizes are fixed.

    Fused operators are written out in `model` first: give a model that is not needed any more.
    """
    unfuse(model)
    captured = capture(model)
    return captured, match_capture(captured)


def _unfuse_rewritable(model: ir.Model, spare: ir.Model, target: Any, layers: str | None) -> None:
    """Write out just those fused operators whose attention will be rewritten, found out on a spare copy."""
    if not fused_nodes(model):
        return
    captured, matches = match_onnx(spare)
    decision = decide(captured.flow, matches, target, layers)
    unfuse(model, {r.site.owner for r in decision.replacements})


def match_capture(captured: OnnxCapture) -> Matches:
    matches = find_attention(captured.flow)
    if matches.sites and (other := captured.other) is not None:
        matches = confirm(matches, find_attention(other.flow))
    hidden = tuple(
        Refusal(
            name, len(captured.nodes), f"a softmax stands in a body of {op}, and control flow is not looked into", -1
        )
        for name, op in hidden_anchors(captured.model)
    )
    return replace(matches, refusals=(*matches.refusals, *hidden))


def _installable(captured: OnnxCapture, decision: Decision) -> Decision:
    """Sites that this door cannot write become refusals, before anything is edited."""
    reasons = {r.site.name: obstacle(captured, r) for r in decision.replacements}
    refused = [(name, reason) for name, reason in reasons.items() if reason is not None]
    kept = tuple(r for r in decision.replacements if reasons[r.site.name] is None)
    if not kept:
        raise NothingToRewrite("; ".join(f"{n}: {r}" for n, r in (*decision.refused, *refused)[:3]))
    return replace(decision, replacements=kept, refused=(*decision.refused, *refused))


def rewrite_onnx(
    model: ir.Model,
    original: ir.Model,
    target: Any,
    *,
    layers: str | None,
    verify: bool,
    calibration: Any = None,
    tokenizer: Any = None,
) -> RewriteReport:
    """Rewrite `model` in place; `original` is the same model, untouched, to verify against.
    `calibration` is as in `optimize`.

    Raises UnsupportedModel, NothingToRewrite, UsageError, VerificationFailed.
    """
    watch = Stopwatch()
    with watch.stage("capture"):
        if fused_nodes(model):
            _unfuse_rewritable(model, from_proto(ir.serde.serialize_model(original)), target, layers)
        captured = capture(model)
    with watch.stage("match"):
        matches = match_capture(captured)
    with watch.stage("transform"):

        def probe(found: Matches) -> Probe:
            given = batches(calibration, causal=is_causal(found), tokenizer=tokenizer)
            return onnx_probe(captured, given)

        chosen = decide(captured.flow, matches, target, layers, None if calibration is None else probe)
        decision = _installable(captured, chosen)
        site_rows = rows(captured.flow, matches, decision.replacements)
    summary = report(
        captured.flow,
        matches,
        decision,
        site_rows,
        parameters=count_parameters(original),
        bytes_per_number=_BYTES[captured.flow.dtype],
        seconds={},
    )
    with watch.stage("install"):
        done = install(captured, decision.replacements, target=decision.target, version=rewriter.__version__)
    site_rows = tuple(replace(row, exact=d.exact) for row, d in zip(site_rows, done, strict=True))
    fidelity = None
    if verify:
        with watch.stage("verify"):
            verification = verify_onnx(model, original)
        if not verification.ok:
            failed = verification.failures[0]
            raise VerificationFailed(
                f"the rewritten model failed the check {failed.name!r}: {failed.detail}",
                hint="nothing was written; please report this with the model's exporter and version",
            )
        fidelity = verification.fidelity
    return replace(summary, sites=site_rows, fidelity=fidelity, seconds=watch.seconds)


def count_parameters(model: ir.Model) -> int:
    """Floating-point and quantised numbers stored in the file, shape constants left out."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    kept = [t for t in tensors if t is not None and (t.dtype.is_floating_point() or t.dtype.itemsize <= 1)]
    return sum(int(t.size) for t in kept if t.dtype != ir.DataType.BOOL)
