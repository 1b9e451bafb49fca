"""Installs what a decision replaces into the modules that compute it.

A site's module gets another in its place where that is proved, else keeps its forward; what neither way can do becomes
a refusal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from codegen.spec import GatedAttention, MixedChunkAttention
from passes.dataflow import Flow, Value
from passes.refused_readers import ALSO_READ, refused_readers
from passes.site import Refusal
from passes.targets.grouped_query import specification
from passes.targets.replacement import Replacement
from rewriter.decision import Decision
from rewriter.errors import NothingToRewrite, UnsupportedModel
from rewriter.install.call_record import CallRecord, record_calls
from rewriter.install.expert_mixing import Proved
from rewriter.install.huggingface import adds_outside, apply_knob, knob_applies
from rewriter.install.kept import Kept
from rewriter.install.own_module import crowd, form_obstacle, layout_obstacle, owner_of
from rewriter.install.repeated_heads import Average, keep_forwards
from rewriter.install.site_parameters import (
    new_gains,
    new_parameters,
    original_parameters,
    output_writes,
    replacement_tensors,
    submodule_path,
    whole_key,
    write_outputs,
)
from rewriter.install.stand_in import REASON, not_called_by_place
from rewriter.install.token_mixer import TokenMixer
from rewriter.install.token_mixing import Recorded, install_mixing
from rewriter.install.torch_module import install
from rewriter.install.unit_block import NO_UNIT


@dataclass(frozen=True)
class _Owned:
    """All sites that one module computes; more than one where layers share the module."""

    path: str
    replacements: tuple[Replacement, ...]


def install_decision(
    module: torch.nn.Module,
    flow: Flow,
    decision: Decision,
    refusals: Sequence[Refusal],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    average: Average,
) -> tuple[Decision, Mapping[str, Kept]]:
    """Install at every site: in a module of its own where that is proved, else in the one that is there.

    What neither way can do becomes a refusal, and what would change one of `refusals` by the way. `average` is as in
    `keep_forwards`. Also returned: what sites that keep their module do not save.
    """
    owned = _by_owner(flow, decision.replacements)
    outside = [p for o in owned if (p := _output_module(flow, o.replacements[0])) is not None]
    records = record_calls(module, [*(o.path for o in owned), *outside], args, kwargs)
    fixed = not_called_by_place(module, (o.path for o in owned if o.path in records), args, kwargs)
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
                _install_one(module, flow, group, recorded, records, fixed)
        except UnsupportedModel as error:
            left[group.path] = group
            reasons.update({r.site.name: str(error) for r in group.replacements})
    first = {p: g.replacements[0] for p, g in left.items()}
    attending = {p: g.replacements for p, g in left.items() if _keeps_its_form(first[p])}
    others = refused_readers(flow, (r.site for rs in attending.values() for r in rs), refusals)
    alone = {p: rs for p, rs in attending.items() if not any(r.site.name in others for r in rs)}
    stay = keep_forwards(module, flow, alone, reasons, args, kwargs, average)
    failed = {
        **stay.refused,
        **{
            r.site.name: f"{reasons[r.site.name]}; {_also_read(r, others)}"
            for p in attending.keys() - alone.keys()
            for r in attending[p]
        },
        **{r.site.name: reasons[r.site.name] for p, g in left.items() if p not in attending for r in g.replacements},
    }
    done = [stay.averaged.get(r.site.name, r) for r in decision.replacements if r.site.name not in failed]
    refused = (*decision.refused, *failed.items())
    if not done and not decision.blocks.replacements:
        raise NothingToRewrite(
            "; ".join(f"{n}: {r}" for n, r in (*failed.items(), *decision.refused)[:3]),
            hint="a module that cannot be replaced can be rewritten as a graph: pass torch.export.export(model, ...)",
        )
    return replace(decision, replacements=tuple(done), refused=refused), stay.kept


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


def behind_units(
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
    module: torch.nn.Module,
    flow: Flow,
    group: _Owned,
    record: CallRecord | None,
    records: Mapping[str, CallRecord],
    fixed: Collection[str],
) -> None:
    """`fixed`: paths of modules that no other can stand in for."""
    first = group.replacements[0]
    reason = crowd(group.path, [r.site for r in group.replacements])
    if reason is not None:
        raise UnsupportedModel(
            reason, hint="rewrite it as a graph: pass torch.export.export(model, ...) instead of the model"
        )
    if len({r.pattern for r in group.replacements}) > 1:
        raise UnsupportedModel("one module computes attentions that are to see different keys")
    by_class = REASON.format(owner=group.path) if group.path in fixed else None
    if first.mixing is not None and by_class is not None:
        raise UnsupportedModel(by_class)
    if first.mixing is not None:
        _mix_one(module, flow, group, records)
        return
    reason = layout_obstacle(flow, first.site)
    if reason is not None:
        raise UnsupportedModel(reason)
    if record is None:
        raise UnsupportedModel(f"{group.path} was not called by the model's forward")
    if not record.alike:
        raise UnsupportedModel(f"{group.path} is called with different arguments in one forward")
    site = first.site
    output = output_writes(module, flow, first)
    before = original_parameters(module, flow, site, group.path)
    after = new_parameters(before, first)
    q_key, k_key, v_key = (whole_key(flow, o) for o in (site.q, site.k, site.v))
    turned = "q_weight" in first.tensors
    knob = _keeps_its_form(first) and knob_applies(module, group.path, k_key, v_key) if k_key and v_key else False
    biases = ((q_key if turned else None, before.q_bias), (k_key, before.k_bias), (v_key, before.v_bias))
    outside = any(adds_outside(module, group.path, key, bias) for key, bias in biases if key)
    if k_key and v_key and (q_key or not turned) and knob and not outside:
        query, gains = q_key if turned else None, new_gains(module, flow, first, group.path)
        apply_knob(
            module, group.path, k_key, v_key, first.grouped.kv_heads, after, record, q_weight_key=query, gains=gains
        )
        write_outputs(output)
        return
    reason = by_class or form_obstacle(site)
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
        out=submodule_path(flow, site, group.path, "out"),
        q_norm=submodule_path(flow, site, group.path, "q"),
        k_norm=submodule_path(flow, site, group.path, "k"),
        linear=None if first.linear is None else (first.linear, replacement_tensors(first)),
        decoupled=first.decoupled,
    )
    write_outputs(output)
