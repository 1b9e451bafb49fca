"""The pipeline for .onnx: capture → match → plan → transform → install → verify, on an onnx_ir model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

import rewriter
from codegen.ops.grouped_query_attention.onnx_tiles import computed_scores
from passes.dataflow import Flow, Value
from passes.match.attention import Matches, find_attention
from passes.match.confirm import confirm
from passes.match.contractions import STRAIGHT_FROM
from passes.match.feed_forward import FeedForwards, confirm_feed_forward, find_feed_forward
from passes.protocols import Probe
from passes.refused_readers import caches_read_elsewhere, read_elsewhere
from passes.site import AttentionSite, Refusal
from passes.targets.grouped_query import averaged, keeps_hidden_biases, specification
from passes.targets.replacement import Replacement
from rewriter.auto_choice import as_auto, settle
from rewriter.block_decision import BlockDecision
from rewriter.calibration.batches import Batch, batches
from rewriter.calibration.onnx_trial import onnx_probe
from rewriter.capture.faithful import without_unfaithful
from rewriter.capture.fused.unfuse import fused_nodes, unfuse
from rewriter.capture.fused.written_out import WrittenOut
from rewriter.capture.onnx_bodies import hidden_anchors, holds_anchor
from rewriter.capture.onnx_branches import MOST, Lifted, chooses, lift
from rewriter.capture.onnx_file import OnnxCapture, capture, inline_functions, why_not_runnable
from rewriter.capture.onnx_load import copy_of
from rewriter.capture.onnx_pointwise import Written, has_unwritten, write_as_products
from rewriter.decision import LISTS, Decision, Stopwatch, decide, is_causal, nothing, report, rows, with_kept
from rewriter.errors import NothingToRewrite, UnsupportedModel, VerificationFailed
from rewriter.install.kept import Kept, noted
from rewriter.install.onnx_branch_caches import Shared, conflicts, follow, shared_outputs
from rewriter.install.onnx_branches import put_back
from rewriter.install.onnx_experts import contrib_obstacle
from rewriter.install.onnx_function import install
from rewriter.install.onnx_obstacles import block_obstacle, obstacle, stays_because
from rewriter.install.onnx_repeat import repeatable, stays_possible
from rewriter.report import stored
from rewriter.report.rewrite_report import RewriteReport
from rewriter.verify.kv_cache import cache_ports
from rewriter.verify.onnx_pair import verify_onnx
from rewriter.verify.record import read_record, rename_record

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 4}


def match_onnx(model: ir.Model, *, hidden_biases: bool = False) -> tuple[OnnxCapture, Matches]:
    """Capture and match; every site has replayed at two sizes, or at one if the file's sizes are fixed.

    Branches are lifted, and fused operators and convolutions that project are written out in `model` first: give a
    model that is not needed any more.
    """
    _, outputs = lift_branches(model)
    write_as_products(model)
    captured = capture(model, unfuse(model))
    return captured, match_capture(captured, hidden_biases=hidden_biases, outputs=outputs)


def lift_branches(model: ir.Model) -> tuple[tuple[Lifted, ...], tuple[Shared, ...]]:
    """Lift branches that hold attentions, in place, if all of them run on the same inputs; also what of their outputs
    the file gives out as one.

    If they do not, they stay where they are, and what stands in them is refused.
    """
    inline_functions(model)
    if not any(chooses(node) for node in model.graph):
        return (), ()
    pasts = {present: past for past, present in cache_ports(model).present.items()}
    lifted = lift(model)
    if why_not_runnable(model) is not None:
        put_back(model, lifted)
        return (), ()
    return lifted, shared_outputs(model, lifted, pasts)


def _unfuse_rewritable(
    model: ir.Model, spare: ir.Model, target: Any, layers: str | None, given: Callable[[Matches], list[Batch]] | None
) -> tuple[dict[str, WrittenOut], dict[str, Written], tuple[tuple[str, str], ...], Any]:
    """Write out just those fused operators, and convolutions, whose attention will be rewritten, found out on a spare
    copy.

    Also gives (name, reason) of what is refused there, and the target, which is chosen here if it is "auto".
    """
    if not _is_written_out(model):
        return {}, {}, (), target
    products = write_as_products(spare)
    captured, matches = match_onnx(spare, hidden_biases=keeps_hidden_biases(target))
    if (automatic := as_auto(target)) is not None and matches.sites:
        probe = None if given is None else onnx_probe(captured, given(matches))
        target, layers = settle(captured.flow, matches, automatic, layers, probe), None
    chosen = decide(captured.flow, matches, target, layers, blocks=FeedForwards)
    decision, _ = _installable(captured, chosen)
    nodes = [captured.nodes[o.projection.node].name for r in decision.replacements for o in r.site.operands]
    written = write_as_products(model, {products[n].node for n in nodes if n in products})
    return unfuse(model, {r.site.owner for r in decision.replacements}), written, decision.refused, target


def _is_written_out(model: ir.Model) -> bool:
    """Whether anything in the model has to be written out to be read."""
    return bool(fused_nodes(model)) or has_unwritten(model)


def _without_left(captured: OnnxCapture, matches: Matches) -> Matches:
    """`matches` without refusals of fused operators that could be written out and were not: they are not selected."""
    left = {id(node) for node in fused_nodes(captured.model)}
    indices = {i for i, node in enumerate(captured.nodes) if id(node) in left}
    return replace(matches, refusals=tuple(r for r in matches.refusals if r.anchor not in indices))


def match_capture(captured: OnnxCapture, *, hidden_biases: bool = False, outputs: Sequence[Shared] = ()) -> Matches:
    """`outputs` are those of branches that were lifted."""
    matches = without_unfaithful(captured, find_attention(captured.flow, hidden_biases=hidden_biases))
    if matches.sites and (other := captured.other) is not None:
        matches = confirm(matches, find_attention(other.flow, hidden_biases=hidden_biases))
    hidden = refused_bodies(captured.model)
    reasons = {s.name: reason for s in matches.sites if (reason := _never_written(captured, s)) is not None}
    refused = tuple(Refusal.of(s, reasons[s.name]) for s in matches.sites if s.name in reasons)
    sites = tuple(s for s in matches.sites if s.name not in reasons)
    known = tuple(replace(r, reason=_filled_here(r.reason, outputs)) for r in matches.refusals)
    return replace(matches, sites=sites, refusals=(*known, *refused, *hidden))


def _filled_here(reason: str, outputs: Sequence[Shared]) -> str:
    """The reason for an attention that reads a cache alone, where another branch of the file fills that."""
    for past in (one.past for one in outputs if one.past is not None):
        if reason.startswith(fed := STRAIGHT_FROM.format(past)):
            return (
                f"{fed}, which another branch of the file fills: it follows that branch, whose shared heads it repeats"
            )
    return reason


def _never_written(captured: OnnxCapture, site: AttentionSite) -> str | None:
    """Why nothing can be done with a site in a file, whatever it is to become; None if something can."""
    if (empty := _read_empty(captured, site)) is not None:
        return (
            f"it reads {empty}, which the file ran with empty only, so that nothing is known of what it adds; export "
            "it so that it runs with tokens in its cache"
        )
    if not (site.headwise or (site.k.seam and site.v.seam)):
        return "its heads are repeated before they are rotated, which is not rewritten in a file"
    if site.by_blocks and read_elsewhere(captured.flow, site):
        return "it attends within blocks of tokens, and another attention reads the keys or values that it would share"
    if site.stays and not stays_possible(captured, site):
        return stays_because(site)
    return None


def _read_empty(captured: OnnxCapture, site: AttentionSite) -> Value | None:
    """An input that has no elements here, and may have some, which an attention reads behind its projections."""
    flow = captured.flow
    open_ones = {v.name for v in captured.model.graph.inputs if v.shape is None or 0 not in v.shape}
    empty = {name for name in flow.inputs if name in open_ones and 0 in flow.shape(name)}
    if not empty:
        return None
    first = min(o.projection.node for o in site.operands)
    between = flow.ancestors(site.output, stop=lambda node: node.index < first)
    return next((v for node in between for v in node.inputs if v in empty), None)


def unshared(captured: OnnxCapture, matches: Matches) -> dict[str, str]:
    """By name of a site that is understood, why fewer heads for it cannot be written into this file."""
    trials = [
        Replacement(site, specification(site, 1), {}, exact=False, before="", after="mqa") for site in matches.sites
    ]
    lent = caches_read_elsewhere(captured.flow, matches.sites)
    reasons = {t.site.name: _unwritable(captured, t, lent) for t in trials}
    failed = [t for t in trials if reasons[t.site.name] is not None and not repeatable(captured, t, trials)]
    return {t.site.name: reason for t in failed if (reason := reasons[t.site.name]) is not None}


def match_feed_forward(captured: OnnxCapture, matches: Matches) -> FeedForwards:
    """The feed-forward blocks of a file, each replayed at two sizes, or at one if the file's sizes are fixed."""
    found = find_feed_forward(captured.flow, matches.names)
    if found.sites and (other := captured.other) is not None:
        found = confirm_feed_forward(found, find_feed_forward(other.flow, matches.names))
    return found


def _noting_floats(captured: OnnxCapture, blocks: BlockDecision) -> BlockDecision:
    """Experts are stored as floating-point numbers, whatever the block's matrices were stored as."""
    stored = {r.site.name for r in blocks.replacements if _of_integers(captured.flow, r.site.down.weight)}
    return blocks.noting(stored, "its matrices were stored as integers, its experts are not")


def _noting_operators(captured: OnnxCapture, blocks: BlockDecision) -> BlockDecision:
    """Where onnxruntime's own operator was asked for: that it is written, or why it is not."""
    for r in blocks.replacements if any(r.contrib for r in blocks.replacements) else ():
        reason = contrib_obstacle(captured, r)
        told = "runs in onnxruntime alone, by com.microsoft.MoE"
        if reason is not None:
            told = f"written in standard operators; com.microsoft.MoE does not fit: {reason}"
        blocks = blocks.noting({r.site.name}, told)
    return blocks


def _of_integers(flow: Flow, value: Value) -> bool:
    """Whether a constant matrix is made of stored integers."""
    weights = (flow.weights[v] for v in flow.weights_above(value))
    return any("int" in weight.dtype and len(weight.shape) > 1 for weight in weights)


def refused_bodies(model: ir.Model) -> tuple[Refusal, ...]:
    """Nodes in whose bodies attentions stand that are not looked into, with the reason."""
    return tuple(Refusal(name, len(model.graph), _in_body(op), -1) for name, op in hidden_anchors(model))


def only_in_bodies(model: ir.Model) -> tuple[Refusal, ...]:
    """`refused_bodies` of a file that has no other attention, so that nothing is lost if it cannot be run."""
    return () if holds_anchor(model.graph, deep=False) else refused_bodies(model)


def _in_body(operator: str) -> str:
    if operator == "If":
        return (
            "a softmax stands in a branch of If, and the two branches do not both run on inputs of one size (or more "
            f"than {MOST} nodes choose between branches), so that they cannot be looked into together; if they are a "
            "decoder's first and later steps, rewrite the two files that were merged (the decoder, and the decoder "
            "with past) and use them, or merge them again"
        )
    return (
        f"a softmax stands in a body of {operator}, and control flow that repeats is not looked into; rewrite the "
        "model that the body was made from, and put it in again"
    )


def _installable(
    captured: OnnxCapture, decision: Decision, outputs: Sequence[Shared] = ()
) -> tuple[Decision, dict[str, Kept]]:
    """Sites that this door cannot write become refusals, before anything is edited; also those that keep their
    attention, by name. `outputs` are those of branches that were lifted."""
    reasons: dict[str, str] = {}
    done: list[Replacement] = []
    kept: dict[str, Kept] = {}
    lent = caches_read_elsewhere(captured.flow, [r.site for r in decision.replacements])
    for replacement in decision.replacements:
        name = replacement.site.name
        way, reason = _way(captured, replacement, decision.replacements, lent)
        if way is None and replacement.turned and replacement.may_average:
            mean = averaged(captured.flow, replacement, reason or "")
            way, reason = _way(captured, mean, decision.replacements, lent)
        if way is None:
            reasons[name] = reason or ""
            continue
        done.append(way)
        if reason is not None:
            kept[name] = Kept(projection=False, cache=True, why=reason)
    while clashes := conflicts(captured.model, outputs, done):
        reasons |= clashes
        done = [r for r in done if r.site.name not in clashes]
    refused = list(reasons.items())
    failed = {
        b.site.name: reason for b in decision.blocks.replacements if (reason := block_obstacle(captured, b)) is not None
    }
    blocks, refused = decision.blocks.without(failed), [*refused, *failed.items()]
    if not done and not blocks.replacements:
        raise NothingToRewrite("; ".join(f"{n}: {r}" for n, r in (*decision.refused, *refused)[:3]), hint=LISTS)
    settled = replace(decision, replacements=tuple(done), refused=(*decision.refused, *refused), blocks=blocks)
    return settled, kept


def _way(
    captured: OnnxCapture, replacement: Replacement, others: Sequence[Replacement], lent: Collection[str]
) -> tuple[Replacement | None, str | None]:
    """What is to be written for a site, None if nothing can be, and why it is not written anew, None if it is."""
    try:
        written = replacement.together()
        reason = _unwritable(captured, written, lent)
    except ValueError as error:
        return (replacement if repeatable(captured, replacement, others) else None), str(error)
    if reason is None:
        return written, None
    return (replacement if repeatable(captured, replacement, others) else None), reason


def _unwritable(captured: OnnxCapture, written: Replacement, lent: Collection[str]) -> str | None:
    """Why a site cannot be written anew, None if it can; `lent` names sites whose caches others read.

    A cache holds the heads of all that read it, so it shrinks for all of them or for none.
    """
    reason = obstacle(captured, written)
    if reason is not None or written.site.name not in lent or written.mixing is not None:
        return reason
    if written.grouped.kv_heads == written.site.kv_heads:
        return None
    return "an attention that is not rewritten reads its cached keys or values, too, and would find fewer heads"


def rewrite_onnx(
    model: ir.Model,
    original: ir.Model,
    target: Any,
    *,
    layers: str | None,
    verify: bool,
    calibration: Any = None,
    tokenizer: Any = None,
    clock: Callable[[], float] = time.perf_counter,
) -> RewriteReport:
    """Rewrite `model` in place; `original` is the same model, untouched, to verify against.
    `calibration` is as in `optimize`; `clock` tells the report's seconds.

    Raises UnsupportedModel, NothingToRewrite, UsageError, VerificationFailed.
    """
    watch = Stopwatch(clock)
    with watch.stage("capture"):
        lifted, outputs = lift_branches(model)
    try:
        done = _edited(model, original, target, layers, calibration, tokenizer, watch, outputs)
    except UnsupportedModel as error:
        if not (hidden := only_in_bodies(model)):
            raise
        raise nothing(Matches((), hidden, (), {})) from error
    if lifted:
        record = read_record(model)
        follow(model, outputs, record.caches if record is not None else {})
        renamed = put_back(model, lifted) | {name: one.name for one in outputs for name in one.given}
        rename_record(model, renamed)
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
    done = replace(done, fidelity=fidelity, seconds=watch.seconds)
    model.metadata_props[stored.PROPERTY] = stored.to_text(done)
    return done


def _edited(
    model: ir.Model,
    original: ir.Model,
    target: Any,
    layers: str | None,
    calibration: Any,
    tokenizer: Any,
    watch: Stopwatch,
    outputs: Sequence[Shared],
) -> RewriteReport:
    """Rewrite `model` in place without verifying it; the report lacks what verification tells."""

    def given(found: Matches) -> list[Batch]:
        return batches(calibration, causal=is_causal(found), tokenizer=tokenizer)

    with watch.stage("capture"):
        spare = model
        if _is_written_out(model):
            spare = copy_of(original)
        written_out, products, refused, target = _unfuse_rewritable(
            model, spare, target, layers, None if calibration is None else given
        )
        captured = capture(model, written_out)
    with watch.stage("match"):
        found = match_capture(captured, hidden_biases=keeps_hidden_biases(target), outputs=outputs)
        matches = _without_left(captured, found)
    with watch.stage("transform"):

        def probe(found: Matches) -> Probe:
            return onnx_probe(captured, given(found))

        decision = decide(
            captured.flow,
            matches,
            target,
            layers,
            None if calibration is None else probe,
            lambda: match_feed_forward(captured, matches),
        )
        decision, kept = _installable(captured, decision, outputs)
        known = {name for name, _ in decision.refused}
        decision = replace(decision, refused=(*decision.refused, *(r for r in refused if r[0] not in known)))
        noted_blocks = _noting_operators(captured, _noting_floats(captured, decision.blocks))
        decision = replace(decision, blocks=noted_blocks)
        site_rows = tuple(noted(row, kept) for row in rows(captured.flow, matches, decision.replacements))
    summary = report(
        captured.flow,
        matches,
        decision,
        site_rows,
        parameters=count_parameters(original),
        bytes_per_number=_BYTES[captured.flow.dtype],
        seconds={},
        whole_caches={r.site.name for r in decision.replacements if r.linear is not None} | set(kept),
        scores=computed_scores,
    )
    with watch.stage("install"):
        pending = deque(decision.replacements)
        decision = replace(decision, replacements=())  # each goes as soon as the model holds its weights
        blocks = decision.blocks.replacements
        made = {"target": decision.target, "version": rewriter.__version__}
        gone = {name: product.gone for name, product in products.items()}
        done = install(captured, drained(pending), **made, blocks=blocks, repeated=kept.keys(), gone=gone)
    site_rows = tuple(
        replace(row, exact=d.exact, requantised=d.requantisation_error) for row, d in zip(site_rows, done, strict=True)
    )
    return replace(summary, sites=with_kept(matches, decision, site_rows))


def drained(pending: deque[Replacement]) -> Iterator[Replacement]:
    """One after the other, none of them held any longer than it takes."""
    while pending:
        yield pending.popleft()


def count_parameters(model: ir.Model) -> int:
    """Floating-point and quantised numbers stored in the file, shape constants left out."""
    tensors = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
    numbers = [t for t in tensors if t is not None and t.dtype != ir.DataType.STRING]
    kept = [t for t in numbers if t.dtype.is_floating_point() or t.dtype.itemsize <= 1]
    return sum(int(t.size) for t in kept if t.dtype != ir.DataType.BOOL)
