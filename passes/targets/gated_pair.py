"""Two gated attention units in the place of an attention and of the feed-forward block behind it, as in FLASH
(arXiv 2202.10447).

The first is the attention's (`passes/targets/gated_unit.py`). A feed-forward block is a unit already, of which the
attention is the identity: gate and value are its own projections, the activation is the gate's. Written as a unit it
can learn to look at other tokens, too, as the paper's second unit does. For that its scores must not begin at 0, where
their square has no slope: all other tokens together begin with the weight `SEEN`, and the block changes by about that.
Scores are the bias's alone at first, keys a random base that training may make use of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codegen.spec import GatedAttention, GatedUnit, PositionBias
from passes.dataflow import Array, Flow
from passes.feed_forward_site import FeedForwardSite
from passes.targets.block import ACTIVATIONS, BlockReplacement, Surroundings
from passes.targets.gated_unit import BASE, CHUNK, REACH, Form, by_chunks, named
from passes.targets.gated_unit import GatedUnit as UnitOfAttention
from passes.weights.experts import DenseBlock, dense_block
from passes.weights.gated import chunked, feed_forward_unit

SEEN = 0.01
"""Sum of the weights of all other tokens within reach, where a token's own is 1."""


@dataclass(frozen=True)
class UnitBlocks:
    """A gated attention unit for each feed-forward block.

    Attributes:
        form, chunk: as of `passes.targets.gated_unit.GatedUnit`.
    """

    form: Form = "gau"
    chunk: int = CHUNK

    @property
    def name(self) -> str:
        return named(self.form, self.chunk)

    def chosen(self, sites: Sequence[FeedForwardSite]) -> tuple[FeedForwardSite, ...]:
        """All."""
        return tuple(sites)

    def refuses(self, site: FeedForwardSite, around: Surroundings) -> str | None:
        """Why this block stays dense."""
        if around.causal is None:
            return "no attention that is understood lies above it, so whether it may look at later tokens is not known"
        if around.batch_first is None:
            return "its tokens do not run over the axes of its hidden states"
        if around.cached:
            return "the attention above it keeps a cache, of which a feed-forward block's call knows nothing"
        if site.activation.name not in ACTIVATIONS:
            return f"no unit applies its activation ({site.activation.name or 'one without a name'})"
        return None

    def spec(self, site: FeedForwardSite, around: Surroundings) -> GatedUnit:
        """As wide as the block."""
        quadratic = GatedAttention(
            hidden=site.width,
            expanded=site.hidden,
            base=min(BASE, site.width),
            length=REACH,
            causal=bool(around.causal),
            bias=PositionBias.TOEPLITZ,
            span=REACH,
            rotary=False,
            gate=ACTIVATIONS[site.activation.name or ""],
            value=None,
            latent=None,
        )
        return quadratic if self.form != "flash" else by_chunks(quadratic, self.chunk)

    def transform(self, flow: Flow, site: FeedForwardSite, around: Surroundings) -> BlockReplacement:
        """By weights alone."""
        spec = self.spec(site, around)
        tensors = unit_of(dense_block(flow, site), spec)
        return BlockReplacement(
            site,
            spec,
            {name: tensors[name].astype(np.float32) for name in spec.shapes},
            f"ffn{site.hidden}",
            self.name,
            "a unit",
            notes=(f"other tokens begin with {SEEN:.0%} of the weight", "padded tokens take part"),
            batch_first=around.batch_first is not False,
            behind=around.attention,
        )

    def fitted(self, flow: Flow, site: FeedForwardSite, around: Surroundings, x: Array) -> BlockReplacement:
        """There is nothing to fit: the block's weights are the unit's."""
        return self.transform(flow, site, around)


def unit_of(block: DenseBlock, spec: GatedUnit) -> dict[str, Array]:
    """Operands by role, float64, of a unit that is the block, and looks at others with the weight `SEEN`."""
    latent = np.random.default_rng(0).standard_normal((spec.base, spec.hidden + 1)) / np.sqrt(spec.hidden)
    latent[:, -1] = 0.0
    operands = feed_forward_unit(
        _with_bias(block.up, block.up_bias),
        None if block.gate is None else _with_bias(block.gate, block.gate_bias),
        np.asarray(block.down.T, dtype=np.float64),
        block.down_bias,
        latent,
        spec.span,
        seen=float(np.sqrt(SEEN / (2 * spec.span))),
    )
    return operands if isinstance(spec, GatedAttention) else chunked(operands, 0.0)


def _with_bias(matrix: Array, bias: Array | None) -> Array:
    """[F, n + 1] of [n, F]."""
    column = np.zeros((matrix.shape[1], 1)) if bias is None else np.asarray(bias, dtype=np.float64)[:, None]
    return np.concatenate([np.asarray(matrix.T, dtype=np.float64), column], axis=1)


@dataclass(frozen=True)
class GatedPair:
    """A target for attentions and feed-forward blocks together.

    Attributes:
        mixing: what happens to attentions. blocks: what happens to feed-forward blocks.
    """

    mixing: UnitOfAttention
    blocks: UnitBlocks

    @property
    def name(self) -> str:
        return f"{self.mixing.name}{',' if ':' in self.mixing.name else ':'}pair"


def gated_pair(form: Form, chunk: int = CHUNK) -> GatedPair:
    """The target of this form. Raises ValueError for chunks below 1."""
    return GatedPair(UnitOfAttention(form, chunk), UnitBlocks(form, chunk))
