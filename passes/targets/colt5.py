"""CoLT5 (arXiv 2303.09752): light branches for all tokens of an encoder, heavy ones for those that routers choose.

Attentions and feed-forward blocks of encoders become conditional; attentions to another sequence, as a decoder has
them, share one head of keys and values, as in the paper. What is causal stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from passes.targets.conditional_attention import ConditionalHeads
from passes.targets.conditional_feed_forward import ConditionalBlocks
from passes.targets.grouped_query import GroupedQuery

EVERY = 16
"""One token in so many is routed, typically in the paper."""


@dataclass(frozen=True)
class Colt5:
    """A target for attentions and feed-forward blocks together.

    Attributes:
        mixing: what happens to attentions within a sequence.
        blocks: what happens to feed-forward blocks.
        crossing: what happens to attentions to another sequence.
    """

    mixing: ConditionalHeads = field(default_factory=ConditionalHeads)
    blocks: ConditionalBlocks = field(default_factory=ConditionalBlocks)
    crossing: GroupedQuery = field(default_factory=lambda: GroupedQuery(1))

    @property
    def name(self) -> str:
        return self.mixing.name


def colt5(every: int = EVERY) -> Colt5:
    """The target in which one token in `every` is routed to heavy branches. Raises ValueError below 1."""
    if every < 1:
        raise ValueError(f"one token in {every} cannot be routed")
    name = "colt5" if every == EVERY else f"colt5:{every}"
    return Colt5(ConditionalHeads(name, 1 / every), ConditionalBlocks(name, 1 / every))
