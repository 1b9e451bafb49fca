"""An attention with all its projections as one map of hidden states: what mixing without attention takes the place of.

Whether a site is that, and in which order its tokens run, is told from the recording. Shape legend: B batch, S tokens,
E model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array, Flow, Value
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.weights.projection import merge_orders

PASSED = frozenset({"Reshape", "Flatten", "Identity", "Cast", "QuantizeLinear", "DequantizeLinear"})
"""Operators above a projection that leave each token's features together."""


class NoSublayer(ValueError):
    """Why a site is no map of hidden states, or none that a mix can stand for, in words a person can act on."""


@dataclass(frozen=True)
class Sublayer:
    """Attributes:
    input: hidden states that queries, keys and values are all projected from, [B, S, E] or [S, B, E].
    output: the output projection's result, the bias included; laid out like `input`, or [B * S, E].
    batch_first: whether the first axis of both is the batch.
    hidden: E.
    """

    input: Value
    output: Value
    batch_first: bool
    hidden: int

    def by_token(self, array: Array, shape: tuple[int, ...]) -> Array:
        """[B, S, E] of an array laid out like input or output; `shape` is that of the input."""
        laid = array.reshape(*shape[:2], -1)
        return laid if self.batch_first else laid.swapaxes(0, 1)

    def laid_out(self, tokens: Array, like: Array) -> Array:
        """The inverse: [B, S, E] in the layout of `like`."""
        return np.ascontiguousarray(tokens if self.batch_first else tokens.swapaxes(0, 1)).reshape(like.shape)


def sublayer(flow: Flow, site: AttentionSite, evidence: Evidence) -> Sublayer:
    """Raises NoSublayer where the attention is not a map from hidden states to hidden states of the same shape."""
    if site.out is None:
        raise NoSublayer("no output projection reads its heads alone, so where its sublayer ends is not known")
    source = _common_input(flow, site)
    if source is None:
        raise NoSublayer("its queries, keys and values are not made of the same hidden states")
    shape = flow.shape(source)
    if site.out.features != shape[-1]:
        raise NoSublayer(f"it maps {shape[-1]} features to {site.out.features}")
    batch_first = token_order(evidence, shape)
    if batch_first is None or ("batch" if batch_first else "tokens") not in merge_orders(flow, site):
        raise NoSublayer("its tokens do not run over the axes of its hidden states")
    return Sublayer(source, site.out.output, batch_first, shape[-1])


def _common_input(flow: Flow, site: AttentionSite) -> Value | None:
    """The lowest value of three axes that all three projections read, at most laid out or stored otherwise."""
    chains = [list(_above(flow, o.projection.input)) for o in (site.q, site.k, site.v)]
    common = (v for v in chains[0] if len(flow.shape(v)) == 3 and all(v in c for c in chains[1:]))
    return next((v for v in common if (p := flow.producer(v)) is None or p.op != "QuantizeLinear"), None)


def _above(flow: Flow, value: Value) -> Iterator[Value]:
    width = flow.shape(value)[-1]
    yield value
    while (node := flow.producer(value)) is not None and node.op in PASSED:
        value = node.inputs[0]
        if not value or flow.shape(value)[-1:] != (width,):
            return
        yield value


def token_order(evidence: Evidence, shape: tuple[int, ...]) -> bool | None:
    """True for [B, S, E], False for [S, B, E], None if the attention's tokens lie otherwise."""
    rows = evidence.q.tokens.rows
    if rows.shape == shape[:2] and np.array_equal(rows.reshape(-1), np.arange(rows.size)):
        return True
    turned = rows.T
    if turned.shape == shape[:2] and np.array_equal(turned.reshape(-1), np.arange(rows.size)):
        return False
    return None
