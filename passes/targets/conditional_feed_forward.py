"""A feed-forward block becomes a light branch for all tokens and a heavy one for some (CoLT5, arXiv 2303.09752).

The paper trains both from scratch, the light one half as wide as a dense block, the heavy one four times. Here the
heavy branch is the block itself: it adds to a routed token's light result what that lacks
(`passes/weights/light_block.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codegen.conditional import ConditionalFeedForward, Router
from passes.dataflow import Array, Flow
from passes.feed_forward_site import FeedForwardSite
from passes.targets.block import ACTIVATIONS, BlockReplacement, Surroundings
from passes.weights.experts import DenseBlock, dense_block
from passes.weights.light_block import Light, branches, fitted, selected


@dataclass(frozen=True)
class ConditionalBlocks:
    """A light and a heavy branch for each block.

    Attributes:
        name: what reports call the result.
        fraction: of a sequence's tokens, those that are routed to the heavy branch.
        light: hidden features of the light branch over the block's.
    """

    name: str = "colt5"
    fraction: float = 1 / 16
    light: float = 0.5

    def __post_init__(self) -> None:
        Router(self.fraction)
        if not 0 < self.light <= 1:
            raise ValueError(f"light must be above 0 and at most 1, not {self.light}")

    def chosen(self, sites: Sequence[FeedForwardSite]) -> tuple[FeedForwardSite, ...]:
        """All."""
        return tuple(sites)

    def refuses(self, site: FeedForwardSite, around: Surroundings) -> str | None:
        """Why this block stays dense."""
        if around.causal is None:
            return "no attention that is understood lies above it, so whether it may look at later tokens is not known"
        if around.causal:
            return "it is part of a causal stack, and who is routed depends on later tokens"
        if around.batch_first is None:
            return "its tokens do not run over the axes of its hidden states"
        if site.activation.name not in ACTIVATIONS:
            return f"no branch applies its activation ({site.activation.name or 'one without a name'})"
        return None

    def spec(self, site: FeedForwardSite, block: DenseBlock, light: Light) -> ConditionalFeedForward:
        return ConditionalFeedForward(
            site.width,
            len(light.kept),
            site.hidden,
            Router(self.fraction),
            ACTIVATIONS[site.activation.name or ""],
            gated=block.gate is not None,
            up_bias=block.up_bias is not None,
            down_bias=light.bias is not None,
        )

    def transform(self, flow: Flow, site: FeedForwardSite, around: Surroundings) -> BlockReplacement:
        """By weights alone."""
        block = dense_block(flow, site)
        return self._replacement(site, around, block, selected(block, self._count(site)), "selected")

    def fitted(self, flow: Flow, site: FeedForwardSite, around: Surroundings, x: Array) -> BlockReplacement:
        """By the block's hidden states x [N, width] on calibration data."""
        block = dense_block(flow, site)
        light = fitted(block, ACTIVATIONS[site.activation.name or ""], self._count(site), x)
        return self._replacement(site, around, block, light, "fitted")

    def _count(self, site: FeedForwardSite) -> int:
        return max(round(self.light * site.hidden), 1)

    def _replacement(
        self, site: FeedForwardSite, around: Surroundings, block: DenseBlock, light: Light, merge: str
    ) -> BlockReplacement:
        spec = self.spec(site, block, light)
        tensors = branches(block, light)
        exact = self.fraction == 1
        return BlockReplacement(
            site,
            spec,
            {name: tensors[name] for name in spec.shapes},
            f"ffn{site.hidden}",
            self.name,
            merge,
            exact=exact,
            notes=light.notes if exact else (*light.notes, "padded tokens are routed too"),
            batch_first=around.batch_first is not False,
        )
