"""Masks that hold an order and hide keys from all queries, and are nothing else: what feature maps can follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from passes.dataflow import SHAPE_READERS, Array, Flow, Node, Value, read_inputs
from passes.match.score_terms import total_bias
from passes.site import AttentionSite, Modifier, Operand

HIDES = -1e4
"""An additive mask hides a key by this or less."""


SMALL = -HIDES / 10
"""What is added to scores beside a mask hides nothing, and uncovers nothing, up to this."""


_JOINS = {"mask": "And", "unmask": "Or"}
"""What makes one of two conditions that hide keys each, by the kind of modifier they make."""


def told_by(flow: Flow, modifier: Modifier) -> Modifier:
    """A mask or bias whose value, higher up, is smaller and hides the same keys: without biases that are added to it or
    stand beside it, without conditions that hide no key, and before it is spread over heads and queries."""
    while (nearer := _nearer(flow, modifier)) is not None:
        modifier = nearer
    return modifier


def _nearer(flow: Flow, modifier: Modifier) -> Modifier | None:
    """What one operator further up tells the same in any call, laid out alike; None where nothing does."""
    node = flow.producer(modifier.value) if modifier.value is not None else None
    if node is None:
        return None
    try:
        found = _told_before(flow, modifier, node)
        if found is None or found.value is None:
            return None
        shape, given = flow.shape(node.outputs[0]), flow.shape(found.value)
        alike = len(shape) == len(given) and shape[-1] == given[-1]
        return found if alike and not (_kept(flow, found) != _kept(flow, modifier)).any() else None
    except KeyError:  # it was not recorded
        return None


def _told_before(flow: Flow, modifier: Modifier, node: Node) -> Modifier | None:
    if node.op == "Expand":
        return replace(modifier, value=node.inputs[0])
    if modifier.kind == "bias" and node.op == "Add":
        return _fed_part(flow, modifier, node, _hides_none)
    if modifier.kind == "bias" and node.op == "Where":
        return _condition(flow, modifier, node)
    if modifier.kind in _JOINS and node.op == _JOINS[modifier.kind]:
        return _fed_part(flow, modifier, node, _shows_all)
    if modifier.kind in _JOINS and node.op == "Not":
        return replace(modifier, kind="mask" if modifier.kind == "unmask" else "unmask", value=node.inputs[0])
    return None


def _fed_part(
    flow: Flow, modifier: Modifier, node: Node, hides_none: Callable[[Flow, Modifier, Value], bool]
) -> Modifier | None:
    """The fed one of the values that a node joins, where the others hide no key: conditions of queries alone, or of
    which keys are near, and biases."""
    fed = [v for v in node.inputs if flow.is_fed(v)]
    others = [v for v in node.inputs if not flow.is_fed(v)]
    if len(fed) != 1 or not all(hides_none(flow, modifier, v) for v in others):
        return None
    return replace(modifier, value=fed[0])


def _shows_all(flow: Flow, modifier: Modifier, value: Value) -> bool:
    """Whether a condition made of lengths alone hides nothing. One that has a column for each key and a single row
    might, in longer sequences."""
    seen = np.asarray(flow.value(value), dtype=bool) ^ (modifier.kind == "unmask")
    by_key_alone = seen.ndim > 0 and seen.shape[-1] > 1 and (seen.ndim < 2 or seen.shape[-2] == 1)
    return bool(seen.all()) and not by_key_alone


def _condition(flow: Flow, modifier: Modifier, node: Node) -> Modifier | None:
    """What chooses between a number that hides and scores' biases that do not."""
    condition, kept, hidden = node.inputs
    if not flow.is_fed(condition) or flow.is_fed(kept) or flow.is_fed(hidden):
        return None
    if _hides_all(flow, modifier, hidden) and _hides_none(flow, modifier, kept):
        return replace(modifier, kind="mask", value=condition, number=None)
    if _hides_all(flow, modifier, kept) and _hides_none(flow, modifier, hidden):
        return replace(modifier, kind="unmask", value=condition, number=None)
    return None


def _hides_none(flow: Flow, modifier: Modifier, value: Value) -> bool:
    return bool(np.abs(_added(flow, modifier, value)).max(initial=0) <= SMALL)


def _hides_all(flow: Flow, modifier: Modifier, value: Value) -> bool:
    return bool((_added(flow, modifier, value) <= HIDES).all())


def _added(flow: Flow, modifier: Modifier, value: Value) -> Array:
    factor = 1.0 if modifier.number is None else modifier.number
    return np.asarray(flow.value(value), dtype=np.float64) * factor


def _kept(flow: Flow, modifier: Modifier) -> Array:
    """Keys [B or 1, S] of a recording that some query sees."""
    assert modifier.value is not None
    if modifier.kind == "bias":
        seen = _added(flow, modifier, modifier.value) > HIDES
    else:
        seen = np.asarray(flow.value(modifier.value), dtype=bool) ^ (modifier.kind == "unmask")
    return np.asarray(seen.reshape(len(seen) if seen.ndim == 4 else 1, -1, seen.shape[-1]).any(axis=1))


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


def hiding(flow: Flow, site: AttentionSite) -> list[Modifier]:
    """The site's masks and biases that depend on what is fed, and so may hide tokens: as little of them as tells it."""
    return [told_by(flow, m) for m in site.modifiers if m.value is not None and flow.is_fed(m.value)]


def padding_obstacle(flow: Flow, site: AttentionSite) -> str | None:
    """Why padding cannot be told, None if it can."""
    for modifier in hiding(flow, site):
        rank = len(flow.shape(modifier.value or ""))
        if (
            rank not in (2, 4)
            or modifier.apart is not None
            or (modifier.kind == "bias" and (modifier.number or 0) <= 0)
        ):
            return "its masks are not laid out by batch, head, query and key, so which tokens are padding is not told"
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
