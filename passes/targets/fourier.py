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

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from codegen.ops.fourier_mixing.reference import fourier_mixing
from codegen.spec import FourierMixing
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.sublayer import Sublayer, sublayer
from passes.targets.mixing import Fit, Fitting, mixed, on_top, refusal, told
from passes.targets.replacement import Replacement
from passes.targets.whole import Whole
from passes.weights.diagonal import DiagonalFit, DiagonalSums

HYBRID = 2
"""Attentions that the paper's hybrid keeps."""


@dataclass(frozen=True)
class Fourier(Whole):
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
        return refusal(site)

    def keeps(self, sites: Sequence[AttentionSite]) -> dict[str, str]:
        """The top attentions of each stack: sites whose names differ in nothing but numbers."""
        return {s.name: f"it stays: {self.name} keeps the top {self.keep} attentions" for s in on_top(sites, self.keep)}

    def transform(
        self, flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()
    ) -> Replacement:
        """The bare transform. Raises NoSublayer where the site is no map of hidden states."""
        around = sublayer(flow, site, evidence)
        return mixed(site, around, FourierMixing(around.hidden, hartley=self.hartley), {}, self._after, "none", ())

    def fitting(self, flow: Flow, site: AttentionSite, evidence: Evidence, around: Sublayer) -> Fitting:
        """Fits a factor and a constant for each feature."""
        return _Scales(FourierMixing(around.hidden, hartley=self.hartley))

    def fitted(self, flow: Flow, site: AttentionSite, evidence: Evidence, fit: Fit) -> Replacement:
        """The transform with what was fitted. Raises NoSublayer as `transform`."""
        around = sublayer(flow, site, evidence)
        spec = FourierMixing(around.hidden, hartley=self.hartley, gain=True, bias=True)
        tensors = {name: array.astype(np.float32) for name, array in fit.tensors.items()}
        return mixed(site, around, spec, tensors, self._after, "diagonal", (told(fit),))

    @property
    def _after(self) -> str:
        return "hartley" if self.hartley else "fnet"


@dataclass
class _Scales:
    """What is prepared is the bare transform, which is worked out once."""

    spec: FourierMixing
    sums: DiagonalSums = field(default_factory=DiagonalSums)

    def prepare(self, hidden: Array, shown: Array) -> Array:
        return fourier_mixing(self.spec, hidden)

    def add(self, prepared: Array, output: Array, asking: Array) -> None:
        self.sums.add(prepared[asking], output[asking])

    def solve(self) -> DiagonalFit:
        return self.sums.solve()
