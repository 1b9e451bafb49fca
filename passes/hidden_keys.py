"""Masks that hold an order and hide keys from all queries, and are nothing else: what feature maps can follow."""

from __future__ import annotations

import numpy as np

from passes.dataflow import SHAPE_READERS, Flow, Value, read_inputs
from passes.match.score_terms import total_bias
from passes.site import AttentionSite, Operand

HIDES = -1e4
"""An additive mask hides a key by this or less."""


def masks_of(site: AttentionSite) -> list[Value]:
    """The values that hide keys or bias scores at a site."""
    return [m.value for m in site.modifiers if m.kind in {"bias", "mask", "unmask"} and m.value is not None]


def more_than_hidden_keys(flow: Flow, site: AttentionSite) -> str | None:
    """Why the masks of a recording are more than the site's order and hidden keys; None if they are just that.

    Rows of queries that are hidden as keys do not count. Masks that come from outside with a row for each query can say
    anything in another call, whatever they said in the recording.
    """
    batch, queries, keys = size(flow, site.q, "b"), size(flow, site.q, "s"), size(flow, site.k, "s")
    masks = tuple(m for m in site.modifiers if m.kind not in {"softcap", "sinks"})
    bias = total_bias(flow, masks, (batch, site.heads, queries, keys))
    kept = bias > HIDES
    if bool((bias[kept] != 0).any()):
        return "scores have a bias, which a product of features cannot follow"
    shown = kept[:, 0, -1]
    places = np.arange(keys)
    order = places <= places[keys - queries :, None] if site.causal else np.ones((queries, keys), bool)
    wanted = shown[:, None, None] & order
    counts = shown[:, None, keys - queries :, None]
    if bool(((kept != wanted) & counts).any()):
        return "its mask is more than an order of tokens and keys that are hidden from all queries"
    return rows_from_outside(flow, site)


def rows_from_outside(flow: Flow, site: AttentionSite) -> str | None:
    """Why what masks say in other calls is not known, None if they are made of what has no row for each query."""
    queries = size(flow, site.q, "s")
    read = (v for value in masks_of(site) for v in _inputs_above(flow, value))
    given = next((v for v in read if _has_rows(flow, v, queries)), None)
    if given is None:
        return None
    return f"its mask comes from outside with a row for each query ({given}), and may say more than hidden keys"


def size(flow: Flow, operand: Operand, letter: str) -> int:
    """How many tokens ("s") or sequences ("b") an operand has in a recording."""
    axis, count = next((a, n) for a, n in zip(operand.seam_axes, flow.shape(operand.seam), strict=True) if letter in a)
    return count // operand.heads if axis == "bh" else count


def _inputs_above(flow: Flow, value: Value) -> list[Value]:
    """Inputs of the program whose elements reach a value."""
    nodes = flow.ancestors(value, stop=lambda node: node.op in SHAPE_READERS)
    read = {v for node in nodes if node.op not in SHAPE_READERS for v in read_inputs(node)} | {value}
    return [v for v in flow.inputs if v in read]


def _has_rows(flow: Flow, value: Value, queries: int) -> bool:
    """Whether a mask has rows of queries; one of [batch, keys] has none, unless batch and queries are of one size."""
    shape = flow.shape(value)
    return shape[-2] > 1 if len(shape) > 2 else len(shape) == 2 and shape[0] == queries > 1
