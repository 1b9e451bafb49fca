"""Which projections an operand's elements come from: one, the streams that tokens are joined from, and a cache."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from passes.dataflow import LAYOUT, Array, Flow, Value
from passes.forms import Form, Opaque, Source
from passes.match.verdicts import NotUnderstood
from passes.operator_kinds import PASS_THROUGH
from passes.provenance import Tracer
from passes.whole_projection import projection_at

Streams = tuple[tuple[Source, slice], ...]
"""Sources that tokens are joined from, and which tokens are of each; in the order of tokens."""


def streams_of(tracer: Tracer, ids: list[Array]) -> Streams:
    """Empty where tokens are of one source, or not joined one source after the other."""
    learned = list({s.value: s for s in tracer.source_of(ids[0]) if s.kind != "input"}.values())
    if len(learned) < 2 or (ids[0] == 0).any() or any(s.kind == "input" for s in tracer.source_of(ids[0])):
        return ()
    number = _numbered(ids[0], learned)
    line = number.reshape(-1, *number.shape[-2:])[0, :, 0]
    if (number != line[:, None]).any():
        return ()
    starts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
    if len(starts) - 1 != len(learned):
        return ()
    return tuple((learned[int(line[start]) - 1], slice(start, stop)) for start, stop in pairwise(starts))


def stream_of(streams: Streams, source: Source) -> slice:
    return next(here for s, here in streams if s.value == source.value)


def form_of(tracer: Tracer, value: Value) -> Form:
    try:
        return tracer.trace(value)
    except Opaque as error:
        raise NotUnderstood(str(error)) from error


def main_source(tracer: Tracer, ids: list[Array]) -> Source:
    found = {s.value: s for array in ids for s in tracer.source_of(array)}
    learned = [s for s in found.values() if s.kind != "input"]
    if len(learned) > 1 and all(s.kind == "norm" for s in learned):
        raise NotUnderstood(
            f"its heads are normalised by {len(learned)} norms, each with weights of its own; merged heads would have "
            "to share one"
        )
    if len(learned) > 1 and len(ids) > 1 and _sources_apart(tracer, ids):
        if len({_state(tracer.flow, s.under or s.value) for s in learned}) > 1:
            raise NotUnderstood(
                "it is the sum of projections of different hidden states (as of a layer's own values and those of an "
                "earlier layer), whose heads could only be merged together; leave this attention as it is (layers= "
                "selects others)"
            )
        raise NotUnderstood(
            "it is the sum of two projections (as of a layer and a low-rank adapter beside it); merge the adapter into "
            "the layer's weights first"
        )
    if len(learned) > 1 and _joined_along_tokens(ids[0], learned) and _alike_along_tokens(ids[0], learned):
        raise NotUnderstood(
            f"its heads are joined from {len(learned)} projections, one for each; make them by one projection (their "
            "weights one under the other), which is the same"
        )
    if len(learned) > 1 and _joined_along_tokens(ids[0], learned):
        raise NotUnderstood(
            f"its tokens are joined from {len(learned)} projections (as of two streams, or of global tokens beside "
            "local ones); each of them would have to change"
        )
    if len(learned) > 1:
        raise NotUnderstood(
            f"each head is put together from {len(learned)} projections (as in latent attention, whose cache holds "
            "no heads to share); merging heads would have to change all of them"
        )
    if not learned:
        raise NotUnderstood("the operand comes from no projection")
    if (ids[0] == 0).any():
        raise NotUnderstood("tokens are padded and attended in blocks, which is not read; give the weights to an "
                            "attention between all tokens, which is (target window makes it local again)"
                            if ids[0].ndim > 4 else
                            "zeros or learned tokens, which no projection makes, are joined to it (add_zero_attn, "
                            "add_bias_kv, a prefix); without them it is read")  # fmt: skip
    return learned[0]


def _state(flow: Flow, value: Value) -> Value:
    """What a projection reads; where another one gives that (an adapter's first matrix), what that one reads."""
    while (node := flow.producer(value)) is not None:
        found = projection_at(flow, value)
        operands = None if found is None else flow.projection_operands(found[0])
        if found is not None and operands is not None:
            value = found[0].inputs[operands[0]]
        elif node.op in LAYOUT | PASS_THROUGH | {"Mul", "Div", "Cast"}:
            above = [v for v in node.inputs if v and not flow.is_constant(v)]
            if len(above) != 1:
                break
            value = above[0]
        else:
            break
    return value


def _sources_apart(tracer: Tracer, ids: list[Array]) -> bool:
    """Whether every term has one source, and no two the same."""
    held = [[s.value for s in tracer.source_of(term) if s.kind != "input"] for term in ids]
    return all(len(h) == 1 for h in held) and len({h[0] for h in held}) == len(held)


def _joined_along_tokens(ids: Array, sources: list[Source]) -> bool:
    """Whether each token has all its features from one source."""
    number = _numbered(ids, sources)
    return bool((number == number[..., :1]).all())


def _alike_along_tokens(ids: Array, sources: list[Source]) -> bool:
    """Whether all tokens have the same features from the same source: then it is heads that are joined."""
    number = _numbered(ids, sources)
    return bool((number == number[..., :1, :]).all())


def _numbered(ids: Array, sources: list[Source]) -> Array:
    """Which source each element is of, from 1."""
    number = np.zeros(ids.shape, np.int64)
    for count, source in enumerate(sources, 1):
        number[source.holds(ids)] = count
    return number


def cache_split(tracer: Tracer, ids: Array, source: Source) -> tuple[slice, Value | None]:
    """Which tokens are new, and the cache the others come from."""
    mine = source.holds(ids)
    length = ids.shape[-2]
    if mine.all():
        return slice(0, length), None
    per_token = mine.reshape(-1, length, ids.shape[-1])
    new: Array = np.asarray(per_token.all(axis=(0, 2)))
    if (per_token.any(axis=(0, 2)) != new).any() or not new[int(new.argmax()) :].all():
        raise NotUnderstood("cached and new elements are interleaved")
    caches = [s for s in tracer.source_of(ids) if s.kind == "input"]
    if len(caches) != 1:
        raise NotUnderstood(f"the operand joins {len(caches)} caches")
    return slice(int(new.argmax()), length), caches[0].value
