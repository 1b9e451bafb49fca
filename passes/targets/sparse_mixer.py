"""Sparse Mixer (arXiv 2205.12399): mixing below, attention in the top 4 layers, experts in the middle 4.

The paper trains such models from scratch; here an encoder is given that structure and starting weights. What mixes
tokens below is a linear mix, the paper's default; Fourier mixing, another of its variants, has no limit of length.
Experts are split blocks that do half of the dense block's work, a quarter in the fast variant; what the paper's
capacity factors of 1 and 0.5 mean for experts that are whole blocks, `passes/targets/experts.py` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from passes.targets.experts import Experts
from passes.targets.fourier import Fourier
from passes.targets.linear_mixing import LinearMixer

ATTENTIONS, MIXTURES = 4, 4
"""Top layers that keep their attention, and middle ones that get experts."""


@dataclass(frozen=True)
class SparseMixer:
    """A target for attentions and feed-forward blocks together.

    Attributes:
        fast: what the target is called.
        mixing: what happens to attentions.
        blocks: what happens to feed-forward blocks.
    """

    fast: bool = False
    mixing: LinearMixer | Fourier = field(default_factory=lambda: LinearMixer(keep=ATTENTIONS))
    blocks: Experts = field(default_factory=lambda: Experts(middle=MIXTURES))

    @property
    def name(self) -> str:
        return "fast-sparse-mixer" if self.fast else "sparse-mixer"


def sparse_mixer(*, fast: bool = False) -> SparseMixer:
    """The target of either name."""
    return SparseMixer(fast, blocks=Experts(work=0.25 if fast else 0.5, middle=MIXTURES))
