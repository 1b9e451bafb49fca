"""What targets for feed-forward blocks have in common: what they know of a block's surroundings, what they give.

Shape legend: B batch, S tokens, H features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codegen.activation import Activation
from codegen.conditional import ConditionalFeedForward
from codegen.ops.conditional_feed_forward.reference import conditional_feed_forward
from codegen.ops.mixture_of_experts.reference import mixture_of_experts
from codegen.ops.token_mixing import token_mixing
from codegen.spec import GatedAttention, GatedUnit, MixedChunkAttention, MixtureOfExperts
from passes.dataflow import Array, Flow, Value, unflattened
from passes.feed_forward_site import FeedForwardSite
from passes.match.attention import Matches
from passes.site import AttentionSite
from passes.sublayer import token_order

ACTIVATIONS: Mapping[str, Activation] = {
    "relu": Activation.RELU,
    "relu2": Activation.RELU_SQUARED,
    "gelu": Activation.GELU,
    "gelu_tanh": Activation.GELU_TANH,
    "gelu_quick": Activation.QUICK_GELU,
    "silu": Activation.SILU,
    "tanh": Activation.TANH,
}
"""What such blocks can apply, by the names of `passes.nonlinearities`."""

BlockSpec = MixtureOfExperts | ConditionalFeedForward | GatedUnit
"""Everything that can take a feed-forward block's place."""


@dataclass(frozen=True)
class Surroundings:
    """What a block alone does not tell.

    Attributes:
        causal_model: some attention of the model hides later tokens.
        causal: such an attention lies above this block, so that its tokens must not look at later ones; None where all
            that lie above are not understood.
        batch_first: whether hidden states are [B, S, H]; False for [S, B, H], None where they run otherwise.
        cached: some attention of the model keeps a cache on the recorded call.
        attention: name of the nearest attention above.
    """

    causal_model: bool = False
    causal: bool | None = False
    batch_first: bool | None = True
    cached: bool = False
    attention: str | None = None


def surroundings(flow: Flow, matches: Matches, site: FeedForwardSite) -> Surroundings:
    """By the attentions above the block; by the next one where there is none."""
    above = {node.index for node in flow.ancestors(site.up.projection.input)}
    own = sorted((s for s in matches.sites if not s.cross), key=lambda s: s.anchor)
    near = [s for s in own if s.anchor in above and not s.headwise]  # whose positions are not told
    unread = {*(r.anchor for r in matches.refusals), *(s.anchor for s in own if s.headwise)}
    unclear = not near and not unread.isdisjoint(above)
    near = near or [s for s in own if not s.headwise][:1]
    return Surroundings(
        causal_model=any(s.causal for s in own),
        causal=None if unclear else any(s.causal for s in near),
        batch_first=_batch_first(flow.shape(given_to(flow, site)), matches, near[-1]) if near else None,
        cached=any(s.cached or s.k.presents or s.v.presents for s in own),
        attention=near[-1].name if near and near[-1].anchor in above else None,
    )


def given_to(flow: Flow, site: FeedForwardSite) -> Value:
    """A block's hidden states, before their tokens were flattened where they were."""
    given = site.up.projection.input
    width = flow.shape(given)[-1]
    wide = (v for v in unflattened(flow, given) if flow.shape(v)[-1:] == (width,) and len(flow.shape(v)) == 3)
    return given if len(flow.shape(given)) == 3 else next(wide, given)


def _batch_first(shape: tuple[int, ...], matches: Matches, near: AttentionSite) -> bool | None:
    """By the sizes of the attention's batch and sequence; where these are equal, by the order of its tokens."""
    rows = matches.evidence[near.name].q.tokens.rows
    if len(shape) != 3 or sorted(shape[:2]) != sorted(rows.shape):
        return None
    if shape[0] == shape[1]:
        return token_order(matches.evidence[near.name], shape[:2])
    return bool(shape[:2] == rows.shape)


@dataclass(frozen=True)
class BlockReplacement:
    """What takes a feed-forward site's place.

    Attributes:
        exact: whether it computes what the block did, up to rounding.
        tensors: parameters by the names of the spec's `shapes`, float32.
        before, after: short descriptions, e.g. ``"ffn3072"`` and ``"moe16"``.
        merge: how it was made: "split", "split, fitted" or "copies" for experts, "selected" or "fitted" for branches.
        batch_first: as in `Surroundings`, where that matters.
        behind: name of the attention before the block, whose replacement is given the cache; of units.
        contrib: in a file, a runtime's own operator is wanted where one computes the spec; of experts.
    """

    site: FeedForwardSite
    spec: BlockSpec
    tensors: Mapping[str, Array]
    before: str
    after: str
    merge: str
    exact: bool = False
    notes: tuple[str, ...] = ()
    batch_first: bool = True
    behind: str | None = None
    contrib: bool = False

    def flops(self, flow: Flow) -> int:
        """On the recorded inputs, two for each multiplication."""
        shape = flow.shape(given_to(flow, self.site))[:-1]
        tokens = int(np.prod(shape, dtype=np.int64))
        if isinstance(self.spec, MixtureOfExperts):
            return self.spec.flops(tokens)
        batch = shape[0 if self.batch_first else 1]
        return self.spec.flops(batch, tokens // max(batch, 1))

    def output(self, x: Array) -> Array:
        """The oracle's answer to hidden states x, laid out alike."""
        if isinstance(self.spec, MixtureOfExperts):
            flat = x.reshape(1, -1, self.site.width)
            return np.asarray(mixture_of_experts(self.spec, flat, **self.tensors).output).reshape(x.shape)
        ordered = x if self.batch_first else x.swapaxes(0, 1)
        if isinstance(self.spec, (GatedAttention, MixedChunkAttention)):
            found = np.asarray(token_mixing(self.spec, ordered, **self.tensors))
        else:
            found = conditional_feed_forward(self.spec, ordered, soft=False, **self.tensors)
        return np.asarray(found if self.batch_first else found.swapaxes(0, 1))


def block_error(flow: Flow, replacement: BlockReplacement) -> tuple[float, float]:
    """(error, floor): relative root-mean-square error of the block's output on the recording, and of zeros."""
    site = replacement.site
    reference = np.asarray(flow.value(site.output), dtype=np.float64).reshape(-1, site.width)
    x = np.asarray(flow.value(site.up.projection.input), dtype=np.float64).reshape(flow.shape(given_to(flow, site)))
    got = replacement.output(x).reshape(-1, site.width)
    size = max(float(np.linalg.norm(reference)), 1e-30)
    return float(np.linalg.norm(got - reference)) / size, 1.0
