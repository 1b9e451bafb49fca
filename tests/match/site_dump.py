"""An attention site in words: what the golden files hold. Reads like documentation, differs when meaning differs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from passes.dataflow import Array, Flow
from passes.site import AttentionSite, Modifier, Operand, Projection
from tests.match.doors import Seen


def dump(title: str, seen: Seen) -> str:
    """Every site, refusal and non-attention, one paragraph each."""
    paragraphs = [title]
    paragraphs += ["\n".join(_site(seen.flow, site)) for site in seen.matches.sites]
    paragraphs += [f"refused {r.name} (layer {r.layer}): {r.reason}" for r in seen.matches.refusals]
    paragraphs += [f"not attention {n.name}: {n.reason}" for n in seen.matches.not_attention]
    return "\n\n".join(paragraphs) + "\n"


def _site(flow: Flow, site: AttentionSite) -> Iterator[str]:
    yield f"site {site.name} (layer {site.layer})"
    yield f"  {_heads(site)}, {', '.join(_traits(site))}"
    for role, operand in (("q", site.q), ("k", site.k), ("v", site.v)):
        yield f"  {role} = {_projection(flow, operand.projection)}, {columns(operand.columns)}"
        yield f"      {', '.join(_path(operand))}"
    yield f"  scores = q·k * {site.scale:.4g}{''.join(f', then {_modifier(m)}' for m in site.modifiers)}"
    yield f"  softmax; rows masked everywhere {'give zeros' if site.masked_rows_are_zero else 'do not matter'}"
    yield f"  output laid out {' '.join(site.output_axes)}, {_reader(flow, site)}"


def _heads(site: AttentionSite) -> str:
    width = f"of width {site.head_dim}" + (f" (values {site.value_dim})" if site.value_dim != site.head_dim else "")
    if site.kv_heads == site.heads:
        return f"{site.heads} heads {width}"
    return f"{site.heads} query heads {width} over {site.kv_heads} key/value heads, groups {list(site.group)}"


def _traits(site: AttentionSite) -> Iterator[str]:
    yield "cross attention" if site.cross else "self attention"
    yield "causal" if site.causal else "not causal"
    yield "cached" if site.cached else "no cache"


def _projection(flow: Flow, projection: Projection) -> str:
    """The door's name of the weight where it is the model's own; exporters' invented names say nothing."""
    shape = "x".join(map(str, flow.shape(projection.weight)))
    order = "[out, in]" if projection.out_first else "[in, out]"
    name = flow.weights[projection.weight].name if projection.weight in flow.weights else ""
    named = f"{name} " if "." in name and "::" not in name else ""
    return f"x · {named}{shape} {order}{' + bias' if projection.bias is not None else ''}"


def columns(table: Array) -> str:
    """A [heads, dim] column table, in runs: ``columns 32..63``, or one run per head."""
    if np.array_equal(table.reshape(-1), np.arange(table[0, 0], table[0, 0] + table.size)):
        return f"columns {table[0, 0]}..{table[-1, -1]}"
    return f"columns by head {' | '.join(_runs(row) for row in table)}"


def _runs(row: Array) -> str:
    breaks = np.flatnonzero(np.diff(row) != 1) + 1
    return " ".join(f"{run[0]}..{run[-1]}" for run in np.split(row, breaks))


def _path(operand: Operand) -> Iterator[str]:
    yield f"stem {' '.join(operand.stem_axes)}"
    yield f"seam {' '.join(operand.seam_axes)}"
    if abs(operand.gain - 1.0) > 1e-3:
        yield f"gain {operand.gain:.4g}"
    if operand.norm is not None:
        yield f"{operand.norm.kind} norm over {'each head' if operand.norm.per_head else 'all heads'}"
    if operand.rotary is not None:
        yield f"{operand.rotary.kind} rotary, partners {list(operand.rotary.partner)}"
    if operand.past is not None:
        yield f"after past {operand.past} with heads on axis {operand.past_head_axis}"
    for name, axis in operand.presents:
        yield f"grows into {name} with heads on axis {axis}"


def _modifier(modifier: Modifier) -> str:
    if modifier.kind == "bias":
        return "plus a bias" if modifier.number == 1.0 else f"plus a bias times {modifier.number:.4g}"
    if modifier.kind in {"mask", "unmask"}:
        kept = "true" if modifier.kind == "mask" else "false"
        return f"{modifier.number:.3g} except where a mask is {kept}"
    return "the causal mask" if modifier.kind == "causal" else f"softcap {modifier.number:.4g}"


def _reader(flow: Flow, site: AttentionSite) -> str:
    return "read by no projection" if site.out is None else f"read by {_projection(flow, site.out)}"
