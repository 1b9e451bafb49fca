"""What targets that mix tokens without attention have in common: what they refuse, and how a fit becomes a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from codegen.spec import TokenMixing
from passes.dataflow import Array, Flow
from passes.site import AttentionSite
from passes.stacks import stacks
from passes.sublayer import NoSublayer, Sublayer
from passes.targets.grouped_query import BY_BLOCKS, HIDDEN_BIAS, describe
from passes.targets.replacement import Replacement
from passes.weights.projection import SiteWeights, site_weights


class Fit(Protocol):
    """What was fitted to an attention's output.

    Attributes:
        explained: the part of the output's energy that the fit accounts for; constant: the part that a constant alone
            would.
    """

    @property
    def explained(self) -> float: ...

    @property
    def constant(self) -> float: ...

    @property
    def tensors(self) -> Mapping[str, Array]:
        """The mix's parameters by role, float64."""

    def output(self, prepared: Array) -> Array:
        """[B, S, E]: what the mix gives."""


class Fitting(Protocol):
    """Collects batches, then fits."""

    def prepare(self, hidden: Array, shown: Array) -> Array:
        """What `add` and `Fit.output` work on, of hidden states [B, S, E] and [B, S] which tokens are no padding;
        raises NoSublayer if it takes none such."""

    def add(self, prepared: Array, output: Array, asking: Array) -> None:
        """[B, S, E] that the attention gave, and [B, S] which tokens are no padding."""

    def solve(self) -> Fit: ...


def refusal(site: AttentionSite, *, causal: bool = False) -> str | None:
    """Why a site cannot be mixed, as far as its description tells; with `causal`, a causal one can."""
    if site.by_blocks:
        return BY_BLOCKS
    if site.hidden_bias:
        return HIDDEN_BIAS
    if site.weights_read or site.headwise:
        return f"{site.stays}; only gqaN keeps that as it is"
    if site.joined:
        return "its tokens are joined from several projections, and mixing has one sequence"
    if site.cross:
        return "it is cross-attention, and mixing has one sequence"
    if (site.cached or site.k.presents or site.v.presents) and causal:
        return (
            "its keys and values are kept in a cache, which a unit has none of: rewrite the module, or export without"
        )
    if site.cached or site.k.presents or site.v.presents:
        return "its keys and values are kept in a cache, and mixing needs all tokens at once"
    if site.causal and not causal:
        return "it is causal, and a mix brings every token into every other"
    return None


def on_top(sites: Sequence[AttentionSite], count: int) -> list[AttentionSite]:
    """The top `count` attentions of each stack: sites whose names differ in nothing but numbers."""
    return [s for stack in stacks(sites) for s in stack[max(len(stack) - count, 0) :]]


def stored_weights(flow: Flow, site: AttentionSite, around: Sublayer) -> SiteWeights:
    """The site's weights, all of them, on the same hidden states. Raises NoSublayer where there are none such."""
    try:
        weights = site_weights(flow, site)
    except KeyError as missing:
        raise NoSublayer(f"its weights are computed, not stored ({missing})") from missing
    if weights.out is None:
        raise NoSublayer("its output projection does not read the heads one after the other")
    if len({w.shape[-1] for w in (weights.q, weights.k, weights.v)} | {around.hidden + 1}) > 1:
        raise NoSublayer("its projections read different numbers of features")
    return weights


def told(fit: Fit) -> str:
    """For a report's row."""
    return f"the fit explains {fit.explained:.1%} of the output's energy, a constant alone {fit.constant:.1%}"


def mixed(
    site: AttentionSite,
    around: Sublayer,
    spec: TokenMixing,
    tensors: Mapping[str, Array],
    after: str,
    merge: str,
    notes: tuple[str, ...],
) -> Replacement:
    """The replacement of an attention's sublayer by a mix."""
    if any(m.kind in {"mask", "unmask", "bias"} for m in site.modifiers):
        notes = (*notes, "its masks and score biases are dropped: padded tokens take part in the mix")
    return Replacement(site, spec, tensors, False, describe(site), after, merge=merge, notes=notes, sublayer=around)
