"""The pipeline for flat torch graphs: a GraphModule or an ExportedProgram is rewritten as a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from passes.cost import all_scores
from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.match.feed_forward import find_feed_forward
from passes.protocols import Probe
from passes.targets.block import BlockReplacement
from passes.targets.grouped_query import keeps_hidden_biases
from passes.targets.replacement import Replacement
from rewriter.block_decision import BlockDecision
from rewriter.calibration.batches import batches
from rewriter.calibration.torch_probe import program_probe
from rewriter.capture.example_inputs import Call, as_call
from rewriter.capture.torch_export import opened
from rewriter.decision import Decision, Stopwatch, decide, is_causal, report, rows
from rewriter.errors import NothingToRewrite, VerificationFailed
from rewriter.install.fx_graph import GraphRewrite, rewrite_exported_program, rewrite_graph_module
from rewriter.install.fx_projections import projections_of, with_linear_projections, written_projections
from rewriter.install.kept import noted
from rewriter.verify.torch_pair import run, verify_torch

Graph = torch.fx.GraphModule | torch.export.ExportedProgram


def rewrite_graph(
    model: Graph,
    target: Any,
    *,
    layers: str | None,
    example_inputs: Any,
    verify: bool,
    calibration: Any = None,
    tokenizer: Any = None,
) -> Graph:
    """A graph of the same kind, called the same way, with ``rewrite_report`` attached; the input stays as it was.

    Raises UsageError where a GraphModule comes without example inputs; else as `optimize`.
    """
    watch = Stopwatch()
    args, kwargs = _call(model, example_inputs)
    decisions: list[Decision] = []

    def probe(found: Matches) -> Probe:
        given = batches(calibration, causal=is_causal(found), tokenizer=tokenizer)
        return program_probe(readable, (args, dict(kwargs)), given)

    def choose(flow: Flow, matches: Matches) -> Sequence[Replacement]:
        given = None if calibration is None else probe
        found = decide(flow, matches, target, layers, given, lambda: find_feed_forward(flow, matches.names))
        decisions.append(found)
        return found.replacements

    def blocks() -> Sequence[BlockReplacement]:
        return decisions[-1].blocks.replacements

    with watch.stage("install"):
        recorded = opened(model) if isinstance(model, torch.export.ExportedProgram) else model
        readable = with_linear_projections(recorded)
        kept = keeps_hidden_biases(target)
        done = _rewritten(readable, choose, blocks, args, kwargs, kept)
        if readable is not recorded and (only := _unused(readable, done)) is not None:
            readable = with_linear_projections(recorded, only)
            done = _rewritten(readable, choose, blocks, args, kwargs, kept)
    decision = replace(
        decisions[-1],
        replacements=done.replacements,
        refused=(*decisions[-1].refused, *done.refused),
        blocks=_noting(decisions[-1].blocks.without(dict(done.refused)), done.notes),
    )
    if not done.replacements and not done.blocks:
        raise NothingToRewrite("; ".join(f"{n}: {r}" for n, r in decision.refused[:3]))
    fidelity = None
    if verify:
        with watch.stage("verify"):
            fidelity = _verified(model, done.model, args, kwargs, done.exact)
    holder: Any = done.model
    holder.rewrite_report = report(
        done.flow,
        done.matches,
        decision,
        tuple(noted(row, done.kept) for row in rows(done.flow, done.matches, done.replacements)),
        parameters=_stored_numbers(model),
        bytes_per_number=torch.finfo(getattr(torch, done.flow.dtype)).bits // 8,
        seconds=watch.seconds,
        fidelity=fidelity,
        whole_caches={name for name, kept in done.kept.items() if kept.cache}
        | {r.site.name for r in done.replacements if r.linear is not None},
        whole_projections={name for name, kept in done.kept.items() if kept.projection},
        scores=all_scores,
    )
    graph: Graph = done.model
    return graph


def _stored_numbers(model: Graph) -> int:
    """How many numbers a graph holds; what layers share has several keys, and counts once."""
    held = model.state_dict() if isinstance(model, torch.fx.GraphModule) else model.state_dict
    return sum({(t.data_ptr(), tuple(t.shape)): t.numel() for t in held.values()}.values())


def _noting(blocks: BlockDecision, notes: Mapping[str, str]) -> BlockDecision:
    for note in dict.fromkeys(notes.values()):
        blocks = blocks.noting({name for name, own in notes.items() if own == note}, note)
    return blocks


def _rewritten(
    model: Graph,
    choose: Callable[[Flow, Matches], Sequence[Replacement]],
    blocks: Callable[[], Sequence[BlockReplacement]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    hidden_biases: bool,
) -> GraphRewrite[Any]:
    if isinstance(model, torch.fx.GraphModule):
        return rewrite_graph_module(model, args, kwargs, choose, blocks, hidden_biases=hidden_biases)
    return rewrite_exported_program(model, choose, args, kwargs, blocks, hidden_biases=hidden_biases)


def _unused(readable: Graph, done: GraphRewrite[Any]) -> set[str] | None:
    """Which nodes are to be written as linear layers, if some were that project for no rewritten site; else None."""
    written = written_projections(readable)
    used = projections_of(done.flow, (r.site for r in done.replacements))
    used |= {done.flow.nodes[i].name for b in done.blocks for i in b.site.nodes}
    used &= written.keys()
    return None if len(used) == len(written) else {written[name] for name in used}


def _call(model: Graph, example_inputs: Any) -> Call:
    if example_inputs is None and isinstance(model, torch.export.ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
        return tuple(args), dict(kwargs)
    return as_call(example_inputs)


def _verified(before: Graph, after: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any], exact: bool) -> Any:
    old, new = (g.module() if isinstance(g, torch.export.ExportedProgram) else g for g in (before, after))
    with torch.no_grad():
        verification = verify_torch(_run(old, args, kwargs), _run(new, args, kwargs), kwargs, exact=exact)
    if not verification.ok:
        failed = verification.failures[0]
        raise VerificationFailed(
            f"the rewritten graph failed the check {failed.name!r}: {failed.detail}",
            hint="the graph must return a tensor, and the same in every call; if yours does, please report this",
        )
    return verification.fidelity


def _run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Exported modules refuse train() and eval(); they are what they were exported as."""
    try:
        return run(module, args, kwargs)
    except NotImplementedError:
        return module(*args, **kwargs)
