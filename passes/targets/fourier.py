"""Fourier mixing in place of attention: FNet (arXiv 2105.03824) and the Hartley transform (arXiv 2205.12399).

The attention's whole sublayer, output projection included, becomes ``Re(FFT over tokens(FFT over features(x)))`` of
its own input x, unnormalised and without parameters, as in the papers' code. Norms and residuals stay as the block has
them: a pre-norm block becomes a pre-norm FNet, which the paper does not have. There is no mask, so a padded token takes
part in its row like any other, and a row's result depends on how far it was padded; the paper trains at one length.

With calibration, what comes out of the mix is fitted to what the attention gave by a factor and a constant for each
feature, by least squares over tokens that are no padding. A fit cannot bring back what mixing does not compute: rows
say how much of the output's energy it explains, and how much of that a constant alone would.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codegen.spec import FourierMixing
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.sublayer import Sublayer, sublayer
from passes.targets.grouped_query import describe
from passes.targets.misfit import Misfit
from passes.targets.replacement import Replacement
from passes.weights.diagonal import DiagonalFit

HYBRID = 2
"""Attentions that the paper's hybrid keeps."""


@dataclass(frozen=True)
class Fourier:
    """Mix tokens by a transform without parameters.

    Attributes:
        hartley: the Hartley transform instead of the Fourier transform's real part.
        keep: how many attentions at the top of each stack of layers stay.
    """

    hartley: bool = False
    keep: int = 0

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError(f"keep must not be negative, but is {self.keep}")

    @property
    def name(self) -> str:
        hybrid = "" if not self.keep else "-hybrid" if self.keep == HYBRID else f"-hybrid:{self.keep}"
        return f"{'hartley' if self.hartley else 'fnet'}{hybrid}"

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site cannot be mixed, as far as its description tells; `transform` may find more."""
        if site.cross:
            return "it is cross-attention, and mixing has one sequence"
        if site.cached or site.k.presents or site.v.presents:
            return "its keys and values are kept in a cache, and mixing needs all tokens at once"
        if site.causal:
            return "it is causal, and a transform mixes every token into every other"
        return None

    def misfit(self, site: AttentionSite) -> Misfit | None:
        """There is no number that could be wrong."""
        return None

    def idle(self, site: AttentionSite) -> str | None:
        """An attention always has something to replace."""
        return None

    def keeps(self, sites: Sequence[AttentionSite]) -> dict[str, str]:
        """The top attentions of each stack: sites whose names differ in nothing but numbers."""
        stacks: dict[str, list[AttentionSite]] = {}
        for site in sorted(sites, key=lambda s: s.anchor):
            stacks.setdefault(re.sub(r"\d+", "#", site.name), []).append(site)
        top = [s for stack in stacks.values() for s in stack[max(len(stack) - self.keep, 0) :]]
        return {s.name: f"it stays: {self.name} keeps the top {self.keep} attentions" for s in top}

    def transform(
        self, flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()
    ) -> Replacement:
        """The bare transform. Raises NoSublayer where the site is no map of hidden states."""
        around = sublayer(flow, site, evidence)
        spec = FourierMixing(around.hidden, hartley=self.hartley)
        return self._replacement(site, spec, {}, around, "none", ())

    def fitted(self, flow: Flow, site: AttentionSite, evidence: Evidence, fit: DiagonalFit) -> Replacement:
        """The transform with a factor and a constant for each feature. Raises NoSublayer as `transform`."""
        around = sublayer(flow, site, evidence)
        spec = FourierMixing(around.hidden, hartley=self.hartley, gain=True, bias=True)
        tensors = {"gain": fit.gain.astype(np.float32), "bias": fit.bias.astype(np.float32)}
        told = f"the fit explains {fit.explained:.1%} of the output's energy, a constant alone {fit.constant:.1%}"
        return self._replacement(site, spec, tensors, around, "diagonal", (told,))

    def _replacement(
        self,
        site: AttentionSite,
        spec: FourierMixing,
        tensors: Mapping[str, Array],
        around: Sublayer,
        fit: str,
        notes: tuple[str, ...],
    ) -> Replacement:
        after = "hartley" if self.hartley else "fnet"
        if any(m.kind in {"mask", "unmask", "bias"} for m in site.modifiers):
            notes = (*notes, "its masks and score biases are dropped: padded tokens take part in the mix")
        return Replacement(site, spec, tensors, False, describe(site), after, merge=fit, notes=notes, sublayer=around)
