"""The pipeline for torch modules: capture → match → plan → transform → install → verify."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from passes.match.attention import Matches, find_attention
from passes.match.feed_forward import find_feed_forward
from passes.protocols import Probe
from passes.targets.grouped_query import averaged, keeps_hidden_biases
from passes.targets.replacement import Replacement
from rewriter.calibration.batches import batches, is_sampled
from rewriter.calibration.sampled import sampled_text
from rewriter.calibration.tokenizer import tokenizer_in
from rewriter.calibration.torch_probe import module_probe
from rewriter.capture.example_inputs import Call, prepare
from rewriter.capture.plain_module import require_plain
from rewriter.capture.torch_export import TorchCapture, capture
from rewriter.decision import Stopwatch, decide, is_causal, report, rows
from rewriter.errors import UnsupportedModel, UsageError, VerificationFailed, first_line
from rewriter.install.expert_mixing import install_blocks, prove_blocks
from rewriter.install.kept import noted
from rewriter.install.kernel_choice import choose_kernels
from rewriter.install.module_sites import behind_units, install_decision
from rewriter.install.tied_parameters import without_tied
from rewriter.install.token_mixing import drop_unread_positions
from rewriter.install.unit_block import follow
from rewriter.placement import device_of, moved, on_processor
from rewriter.report.rewrite_report import RewriteReport
from rewriter.verify.torch_pair import run, verify_torch


def match_torch(module: torch.nn.Module, example_inputs: Any) -> tuple[TorchCapture, Matches, Call]:
    """Capture and match; raises UnsupportedModel, or UsageError where example inputs are missing."""
    require_plain(module)
    captured, call = _captured(module, example_inputs)
    return captured, without_tied(module, captured.flow, find_attention(captured.flow)), call


def rewrite_torch(
    model: torch.nn.Module,
    target: Any,
    *,
    layers: str | None,
    example_inputs: Any,
    inplace: bool,
    verify: bool,
    calibration: Any = None,
    tokenizer: Any = None,
    kernels: str = "auto",
) -> tuple[torch.nn.Module, RewriteReport]:
    """(rewritten model, report). The original is left alone unless `inplace`; `calibration` is as in `optimize`.

    A model on a graphics card is rewritten on the processor and goes back to its card.

    Raises UnsupportedModel, NothingToRewrite, UsageError, VerificationFailed.
    """
    require_plain(model)
    device_of(model)
    module = model if inplace else _copied(model)
    if is_sampled(calibration):
        calibration = sampled_text(module)
    with on_processor(module):
        summary, call = _rewritten(module, target, layers, example_inputs, verify, calibration, tokenizer)
    args, kwargs = moved(call, device_of(module))
    choose_kernels(module, kernels, args, kwargs, everywhere=False)
    return module, summary


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in _computed_attributes(model)})
    except Exception as error:  # whatever its parts raise, e.g. locks, open files, tensors that are no leaves
        raise UnsupportedModel(
            f"the model cannot be copied: {first_line(error)}", hint="pass inplace=True to have the model itself edited"
        ) from error


def _computed_attributes(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Tensors in modules that were computed of parameters, as hooks leave them there (pruning, weight norm) and compute
    them anew in every call: Python does not copy these."""
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, torch.Tensor) and held.requires_grad and not held.is_leaf:
                yield held


def _rewritten(
    module: torch.nn.Module,
    target: Any,
    layers: str | None,
    example_inputs: Any,
    verify: bool,
    calibration: Any,
    tokenizer: Any,
) -> tuple[RewriteReport, Call]:
    """Rewrites `module` in place; returns the report, and the call that it was captured and checked with."""
    watch = Stopwatch()
    parameters = sum(p.numel() for p in module.parameters())
    with watch.stage("capture"):
        example_inputs = example_inputs if calibration is None else _examples(module, example_inputs, calibration)
        captured, (args, kwargs) = _captured(module, example_inputs)
    with watch.stage("match"):
        matches = find_attention(captured.flow, hidden_biases=keeps_hidden_biases(target))
        matches = without_tied(module, captured.flow, matches)
    with watch.stage("transform"):

        def probe(found: Matches) -> Probe:
            known = tokenizer_in(module) if tokenizer is None else tokenizer
            given = batches(calibration, causal=is_causal(found), tokenizer=known)
            if captured.program is None:
                raise UnsupportedModel(
                    "calibration needs torch.export, which does not take this model",
                    hint="leave calibration out: heads are then merged by their mean",
                )
            return module_probe(module, (args, kwargs), captured.program, given)

        decision = decide(
            captured.flow,
            matches,
            target,
            layers,
            None if calibration is None else probe,
            lambda: find_feed_forward(captured.flow, matches.names),
        )
        site_rows = {r.name: r for r in rows(captured.flow, matches, decision.replacements)}

        def average(asked: Replacement, why: str) -> Replacement:
            mean = averaged(captured.flow, asked, why)
            site_rows[asked.site.name] = rows(captured.flow, matches, (mean,))[0]
            return mean

    original = run(module, args, kwargs) if verify else None
    with watch.stage("install"):
        blocks, unproved = prove_blocks(module, captured.flow, decision.blocks.replacements, args, kwargs)
        decision = replace(
            decision, blocks=decision.blocks.without(unproved), refused=(*decision.refused, *unproved.items())
        )
        decision, kept = install_decision(module, captured.flow, decision, matches.refusals, args, kwargs, average)
        blocks, alone = behind_units(module, captured.flow, decision, blocks)
        decision = replace(decision, blocks=decision.blocks.without(alone), refused=(*decision.refused, *alone.items()))
        install_blocks(module, blocks)
        follow(module)
        drop_unread_positions(module)
    fidelity = None
    if verify:
        with watch.stage("verify"):
            exact = all(r.exact for r in decision.replacements) and all(b.exact for b in decision.blocks.replacements)
            verification = verify_torch(original, run(module, args, kwargs), kwargs, exact=exact)
        if not verification.ok:
            failed = verification.failures[0]
            raise VerificationFailed(
                f"the rewritten model failed the check {failed.name!r}: {failed.detail}",
                hint="the model must return a tensor, and the same in every call; if yours does, please report this",
            )
        fidelity = verification.fidelity
    summary = report(
        captured.flow,
        matches,
        decision,
        tuple(noted(site_rows[r.site.name], kept) for r in decision.replacements),
        parameters=parameters,
        bytes_per_number=torch.finfo(getattr(torch, captured.flow.dtype)).bits // 8,
        seconds=watch.seconds,
        fidelity=fidelity,
        whole_caches={name for name, k in kept.items() if k.cache},
        whole_projections={name for name, k in kept.items() if k.projection},
    )
    return summary, (args, kwargs)


def _captured(module: torch.nn.Module, example_inputs: Any) -> tuple[TorchCapture, Call]:
    args, kwargs = prepare(module, example_inputs)
    return capture(module, args, kwargs), (args, kwargs)


def _examples(module: torch.nn.Module, example_inputs: Any, calibration: Any) -> Any:
    """What to capture on: the given inputs, else the model's defaults, else the first calibration batch."""
    if example_inputs is not None:
        return example_inputs
    try:
        prepare(module)
    except UsageError:
        first = batches(calibration, causal=True)[0]
        call = {k: torch.as_tensor(v) for k, v in first.kwargs.items()}
        return call or tuple(torch.as_tensor(a) for a in first.args)
    return None
