"""The pipeline for torch modules: capture → match → plan → transform → install → verify."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from codegen.spec import GatedAttention, MixedChunkAttention
from passes.dataflow import Array, Flow, Value
from passes.match.attention import Matches, find_attention
from passes.match.feed_forward import find_feed_forward
from passes.protocols import Probe
from passes.refused_readers import ALSO_READ, refused_readers
from passes.site import AttentionSite, Operand, Refusal
from passes.targets.grouped_query import specification
from passes.targets.replacement import Replacement
from passes.weights.head_gains import gains_like, stored_gains
from passes.weights.projection import merges_in_order
from rewriter.calibration.batches import batches, is_sampled
from rewriter.calibration.sampled import sampled_text
from rewriter.calibration.tokenizer import tokenizer_in
from rewriter.calibration.torch_probe import module_probe
from rewriter.capture.example_inputs import Call, prepare
from rewriter.capture.torch_export import TorchCapture, capture
from rewriter.decision import Decision, Stopwatch, decide, is_causal, report, rows
from rewriter.errors import NothingToRewrite, UnsupportedModel, UsageError, VerificationFailed, first_line
from rewriter.install.call_record import CallRecord, record_calls
from rewriter.install.expert_mixing import Proved, install_blocks, prove_blocks
from rewriter.install.huggingface import apply_knob, knob_applies
from rewriter.install.kept import Kept, noted
from rewriter.install.kernel_choice import choose_kernels
from rewriter.install.mixer import MixerParameters
from rewriter.install.own_module import crowd, form_obstacle, layout_obstacle, owner_of
from rewriter.install.repeated_heads import keep_forwards
from rewriter.install.stored_weight import parameter_of
from rewriter.install.token_mixer import TokenMixer
from rewriter.install.token_mixing import Recorded, drop_unread_positions, install_mixing
from rewriter.install.torch_module import install
from rewriter.install.unit_block import NO_UNIT, follow
from rewriter.placement import device_of, moved, on_processor, without_numbers
from rewriter.report.rewrite_report import RewriteReport
from rewriter.verify.torch_pair import run, verify_torch


def match_torch(module: torch.nn.Module, example_inputs: Any) -> tuple[TorchCapture, Matches, Call]:
    """Capture and match; raises UnsupportedModel, or UsageError where example inputs are missing."""
    require_plain(module)
    captured, call = _captured(module, example_inputs)
    return captured, find_attention(captured.flow), call


_PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Where modules come from whose weights are no tensors in the module."""


def require_plain(module: torch.nn.Module) -> None:
    """Weights must be there as numbers, and code as Python: what hides either is refused."""
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModel("the module is compiled to TorchScript", hint="give the module that it was made from")
    if hasattr(module, "_orig_mod") and hasattr(module, "dynamo_ctx"):
        raise UnsupportedModel(
            "the module is compiled by torch.compile", hint="give model._orig_mod, and compile what comes out"
        )
    missing = next((n for n, p in module.named_parameters() if p.device.type == "meta"), None)
    if missing is not None:
        raise UnsupportedModel(
            f"{missing} is on the meta device and has no numbers",
            hint="load the weights first; a checkpoint larger than memory: rewriter rewrite --streamed",
        )
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if (hidden := without_numbers(tensor)) is not None:
            raise UnsupportedModel(f"{name} is {hidden}", hint="give a module whose weights are ordinary dense tensors")
    if hasattr(module, "merge_and_unload") or hasattr(module, "peft_config"):
        raise UnsupportedModel("the model carries unmerged adapters", hint="call model.merge_and_unload() first")
    packed = next((n for n, m in module.named_modules() if type(m).__module__.startswith(_PACKED)), None)
    if packed is not None:
        raise UnsupportedModel(
            f"{packed} is quantised by torch and holds its weights packed",
            hint="rewrite the float model, and quantise what comes out",
        )
    if getattr(module, "hf_quantizer", None) is not None or getattr(module, "is_quantized", False):
        raise UnsupportedModel("the model's weights are quantised by a library", hint="load it in float or bfloat16")


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
        matches = find_attention(captured.flow)
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
    original = run(module, args, kwargs) if verify else None
    with watch.stage("install"):
        blocks, unproved = prove_blocks(module, captured.flow, decision.blocks.replacements, args, kwargs)
        decision = replace(
            decision, blocks=decision.blocks.without(unproved), refused=(*decision.refused, *unproved.items())
        )
        decision, kept = _install(module, captured.flow, decision, matches.refusals, args, kwargs)
        blocks, alone = _behind_units(module, captured.flow, decision, blocks)
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


@dataclass(frozen=True)
class _Owned:
    """All sites that one module computes; more than one where layers share the module."""

    path: str
    replacements: tuple[Replacement, ...]


def _install(
    module: torch.nn.Module,
    flow: Flow,
    decision: Decision,
    refusals: Sequence[Refusal],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Decision, dict[str, Kept]]:
    """Install at every site: in a module of its own where that is proved, else in the one that is there.

    What neither way can do becomes a refusal, and what would change one of `refusals` by the way. Also returned: what
    sites that keep their module do not save.
    """
    owned = _by_owner(flow, decision.replacements)
    outside = [p for o in owned if (p := _output_module(flow, o.replacements[0])) is not None]
    records = record_calls(module, [*(o.path for o in owned), *outside], args, kwargs)
    left: dict[str, _Owned] = {}
    reasons: dict[str, str] = {}
    for group in owned:
        if (other := _lender(group, owned)) is not None:
            left[group.path] = group
            reasons.update({r.site.name: f"its keys and values are those of {other}" for r in group.replacements})
            continue
        try:
            recorded = records.get(group.path)
            with contextlib.nullcontext() if recorded is None else recorded.surroundings():
                _install_one(module, flow, group, recorded, records)
        except UnsupportedModel as error:
            left[group.path] = group
            reasons.update({r.site.name: str(error) for r in group.replacements})
    first = {p: g.replacements[0] for p, g in left.items()}
    attending = {p: g.replacements for p, g in left.items() if _keeps_its_form(first[p])}
    others = refused_readers(flow, (r.site for rs in attending.values() for r in rs), refusals)
    alone = {p: rs for p, rs in attending.items() if not any(r.site.name in others for r in rs)}
    kept, failed = keep_forwards(module, flow, alone, reasons, args, kwargs)
    failed = {
        **failed,
        **{
            r.site.name: f"{reasons[r.site.name]}; {_also_read(r, others)}"
            for p in attending.keys() - alone.keys()
            for r in attending[p]
        },
        **{r.site.name: reasons[r.site.name] for p, g in left.items() if p not in attending for r in g.replacements},
    }
    done = [r for r in decision.replacements if r.site.name not in failed]
    refused = (*decision.refused, *failed.items())
    if not done and not decision.blocks.replacements:
        raise NothingToRewrite(
            "; ".join(f"{n}: {r}" for n, r in refused[:3]),
            hint="a module that cannot be replaced can be rewritten as a graph: pass torch.export.export(model, ...)",
        )
    return replace(decision, replacements=tuple(done), refused=refused), kept


def _also_read(replacement: Replacement, others: Mapping[str, str]) -> str:
    """Why a module keeps its forward whole; `others` are attentions that read a site's keys, by the site's name."""
    name = replacement.site.name
    return ALSO_READ.format(others[name]) if name in others else "its module has one that has to stay as it is"


def _lender(group: _Owned, owned: Sequence[_Owned]) -> str | None:
    """Another module whose attention reads the keys and values of this one's, if both keep their form."""
    if not all(_keeps_its_form(r) for r in group.replacements):
        return None
    mine = _projected(group)
    return next((o.path for o in owned if o is not group and mine & _projected(o)), None)


def _projected(group: _Owned) -> set[Value]:
    return {o.projection.output for r in group.replacements for _, o in r.site.shared}


def _behind_units(
    module: torch.nn.Module, flow: Flow, decision: Decision, blocks: Sequence[Proved]
) -> tuple[list[Proved], dict[str, str]]:
    """Blocks with the paths of units before them, where causal units need one; the reason by name of the others."""
    owners = {r.site.name: owner_of(flow, r.site) for r in decision.replacements}
    found: list[Proved] = []
    failed: dict[str, str] = {}
    for block in blocks:
        spec = block.replacement.spec
        if not isinstance(spec, (GatedAttention, MixedChunkAttention)) or not spec.causal:
            found.append(block)
            continue
        path = owners.get(block.replacement.behind or "", "")
        if path and isinstance(module.get_submodule(path), TokenMixer):
            found.append(replace(block, behind=path))
        else:
            failed[block.replacement.site.name] = NO_UNIT
    return found, failed


def _keeps_its_form(replacement: Replacement) -> bool:
    """Whether an attention stays one over all keys, so that its module's own forward can compute it."""
    other = (replacement.mixing, replacement.linear, replacement.decoupled)
    return all(spec is None for spec in other) and not replacement.pattern


def _by_owner(flow: Flow, replacements: Sequence[Replacement]) -> list[_Owned]:
    groups: dict[str, list[Replacement]] = {}
    for r in replacements:
        groups.setdefault(owner_of(flow, r.site), []).append(r)
    return [_Owned(path, tuple(group)) for path, group in groups.items()]


def _output_module(flow: Flow, replacement: Replacement) -> str | None:
    """Path of the module whose weight the output projection is, where a mix will take that over."""
    out = replacement.site.out
    if replacement.mixing is None or out is None:
        return None
    weight = flow.weights.get(out.weight)
    path, _, leaf = ("", "", "") if weight is None else weight.name.rpartition(".")
    return path if path and leaf == "weight" else None


def _mix_one(module: torch.nn.Module, flow: Flow, group: _Owned, records: Mapping[str, CallRecord]) -> None:
    first = group.replacements[0]
    assert first.mixing is not None and first.site.merged is not None
    around = first.around
    shape = flow.shape(around.input)
    hidden, output, merged = (
        around.by_token(flow.value(v), shape) for v in (around.input, around.output, first.site.merged)
    )
    seen = Recorded(hidden, output, merged, first.shown)
    out = _output_module(flow, first)
    install_mixing(module, group.path, first.mixing, first.tensors, records, seen, heads=first.site.heads, out=out)


def _install_one(
    module: torch.nn.Module, flow: Flow, group: _Owned, record: CallRecord | None, records: Mapping[str, CallRecord]
) -> None:
    first = group.replacements[0]
    reason = crowd(group.path, [r.site for r in group.replacements])
    if reason is not None:
        raise UnsupportedModel(
            reason, hint="rewrite it as a graph: pass torch.export.export(model, ...) instead of the model"
        )
    if len({r.pattern for r in group.replacements}) > 1:
        raise UnsupportedModel("one module computes attentions that are to see different keys")
    if first.mixing is not None:
        _mix_one(module, flow, group, records)
        return
    reason = layout_obstacle(flow, first.site)
    if reason is not None:
        raise UnsupportedModel(reason)
    if record is None:
        raise UnsupportedModel(f"{group.path} was not called by the model's forward")
    if not record.alike:
        raise UnsupportedModel(f"{group.path} is called with different kinds of arguments in one forward")
    site = first.site
    output = _output_writes(module, flow, first)
    before = _original_parameters(module, flow, site, group.path)
    after = _new_parameters(before, first)
    q_key, k_key, v_key = (_key(flow, o) for o in (site.q, site.k, site.v))
    turned = "q_weight" in first.tensors
    knob = _keeps_its_form(first) and knob_applies(module, group.path, k_key, v_key) if k_key and v_key else False
    if k_key and v_key and (q_key or not turned) and knob:
        query, gains = q_key if turned else None, _new_gains(module, flow, first, group.path)
        apply_knob(
            module, group.path, k_key, v_key, first.grouped.kv_heads, after, record, q_weight_key=query, gains=gains
        )
        _write(output)
        return
    reason = form_obstacle(site)
    if reason is not None:
        raise UnsupportedModel(reason)
    # the seams' scale leaves out what the module multiplies in before it lays out heads
    scale = site.scale * site.q.gain * site.k.gain
    install(
        module,
        group.path,
        replace(specification(site, site.kv_heads), scale=scale),
        replace(first.grouped, scale=scale),
        before,
        after,
        record,
        out=_submodule(flow, site, group.path, "out"),
        q_norm=_submodule(flow, site, group.path, "q"),
        k_norm=_submodule(flow, site, group.path, "k"),
        linear=None if first.linear is None else (first.linear, _tensors(first)),
        decoupled=first.decoupled,
    )
    _write(output)


def _tensors(replacement: Replacement) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in replacement.tensors.items()}


def _output_writes(
    module: torch.nn.Module, flow: Flow, replacement: Replacement
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, its new content) of an output projection that changes; it keeps its shape and stays where it is.

    Raises UnsupportedModel if it is no stored parameter.
    """
    out = replacement.site.out
    writes = []
    for part, value in () if out is None else (("weight", out.weight), ("bias", out.bias)):
        array = replacement.tensors.get(f"out_{part}")
        if array is None or value is None or out is None:
            continue
        weight = flow.weights.get(value)
        parameter = None if weight is None else _parameter(module, weight.name)
        if parameter is None:
            raise UnsupportedModel(f"the output projection's {part} is computed, not stored, so it cannot be replaced")
        new = _like(array if part == "bias" else out.stored(array, flow.shape(value)), parameter)
        writes.append((parameter, new.view_as(parameter)))
    return writes


def _new_gains(module: torch.nn.Module, flow: Flow, replacement: Replacement, owner: str) -> dict[str, torch.Tensor]:
    """New numbers that norms multiply heads by, by the parameter's path from the owner, shaped as that is but for the
    number of heads. Raises UnsupportedModel if they are no parameters of the owner."""
    found: dict[str, torch.Tensor] = {}
    for role, operand in (("k", replacement.site.k), ("v", replacement.site.v)):
        for part, value in stored_gains(operand).items():
            weight = parameter_of(flow, value)
            parameter = None if weight is None else _parameter(module, weight.name)
            inside = weight is not None and weight.name.startswith(f"{owner}.")
            if weight is None or parameter is None or not inside or parameter.shape != flow.shape(value):
                raise UnsupportedModel("what a norm multiplies its heads by is computed, not stored in the module")
            numbers = gains_like(operand, replacement.tensors[f"{role}_{part}"], flow.shape(value))
            found[weight.name.removeprefix(f"{owner}.")] = _like(numbers, parameter)
    return found


def _write(writes: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for parameter, content in writes:
            parameter.copy_(content)


def _key(flow: Flow, operand: Operand) -> str | None:
    """State-dict key of a projection that feeds this operand alone and in order, else None."""
    weight = flow.weights.get(operand.projection.weight)
    whole = operand.columns.size == operand.projection.features
    in_order = np.array_equal(operand.columns.reshape(-1), np.arange(operand.columns.size))
    return weight.name if weight is not None and whole and in_order and operand.projection.out_first else None


def _submodule(flow: Flow, site: AttentionSite, owner: str, role: str) -> str | None:
    """Path, from the owner, of the module that projects the output or normalises an operand; None if it has none."""
    if role == "out":
        above = () if site.out is None else flow.weights_above(site.out.weight)
        path = _holder([name for v in above if (name := flow.weights[v].name)])
    else:
        norm = site.q.norm if role == "q" else site.k.norm
        node = flow.producer(norm.output) if norm is not None else None
        path = node.owner if node is not None else ""
    inside = path.startswith(f"{owner}.") if owner else bool(path)
    return path[len(owner) + 1 if owner else 0 :] if inside else None


def _holder(keys: Sequence[str]) -> str:
    """Path of the innermost module that holds all these parameters, be they adapters' or parametrizations'."""
    levels = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    shared = (level[0] for level in itertools.takewhile(lambda level: len({*level}) == 1, levels))
    return ".".join(itertools.takewhile(lambda step: step != "parametrizations", shared))


def _original_parameters(module: torch.nn.Module, flow: Flow, site: AttentionSite, owner: str) -> MixerParameters:
    tensors: dict[str, Any] = {}
    for role, operand in (("q", site.q), ("k", site.k), ("v", site.v)):
        tensors[f"{role}_weight"] = _rows(module, flow, operand, operand.projection.weight, True)
        bias = operand.projection.bias
        tensors[f"{role}_bias"] = None if bias is None else _rows(module, flow, operand, bias, False)
    return MixerParameters(**tensors, **_bare_output(module, flow, site, owner))


def _bare_output(module: torch.nn.Module, flow: Flow, site: AttentionSite, owner: str) -> dict[str, torch.Tensor]:
    """The output projection where the owner holds it as bare parameters; empty where it is a module, or outside."""
    out = site.out
    if out is None or _submodule(flow, site, owner, "out") is not None or not merges_in_order(flow, site):
        return {}
    names = [flow.weights[v].name for v in flow.weights_above(out.weight)]
    if not names or not all(n.rpartition(".")[0] == owner for n in names):
        return {}
    matrix = np.asarray(out.matrix(flow.value(out.weight)))
    found = {"out_weight": matrix if out.out_first else matrix.T}
    if out.bias is not None:
        found["out_bias"] = np.asarray(flow.value(out.bias)).reshape(-1)
    like = _placed_like(module, flow, out.weight)
    return {name: _like(array, like) for name, array in found.items()}


def _placed_like(module: torch.nn.Module, flow: Flow, value: Value) -> torch.Tensor:
    """An empty tensor of the type that the program computes a weight in, where the module's parameters are."""
    return next(module.parameters()).new_empty(0, dtype=getattr(torch, flow.dtypes.get(value, flow.dtype)))


def _rows(module: torch.nn.Module, flow: Flow, operand: Operand, value: str, matrix: bool) -> torch.Tensor:
    """The projection's own parameter where all of it is this operand's, else the rows that are."""
    weight = flow.weights.get(value)
    tensor = _parameter(module, weight.name) if weight is not None else None
    if tensor is None or (matrix and operand.projection.weight_axes is not None):
        # computed from stored ones, as a slice of a packed matrix is, or a stack of matrices
        numbers = operand.projection.matrix(flow.value(value)) if matrix else flow.value(value)
        tensor = _like(numbers, _placed_like(module, flow, value))
    if matrix and not operand.projection.out_first:
        tensor = tensor.detach().t()
    elif _key(flow, operand) is not None and (matrix or operand.projection.bias_index is None):
        return tensor
    columns = operand.columns if matrix else operand.projection.bias_positions(operand.columns)
    index = torch.from_numpy(np.ascontiguousarray(columns.reshape(-1)))
    tensor = tensor if matrix else tensor.reshape(-1)
    return tensor.detach()[index.to(tensor.device)].contiguous()


def _parameter(module: torch.nn.Module, key: str) -> torch.Tensor | None:
    path, _, name = key.rpartition(".")
    try:
        found = getattr(module.get_submodule(path), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _new_parameters(before: MixerParameters, replacement: Replacement) -> MixerParameters:
    """Parameters that the replacement changes new, in the old dtype and on the old device; the others as they were."""
    changed: dict[str, Any] = {}
    parts = ("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "out_weight", "out_bias")
    for name in parts:
        old = getattr(before, name)
        if old is not None and name in replacement.tensors:
            changed[name] = _like(replacement.tensors[name], old)
    return replace(before, **changed)


def _like(array: Array, old: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype=old.dtype, device=old.device)
