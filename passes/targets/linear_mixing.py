"""Mixing matrices in place of attention: the linear, circulant and Toeplitz mixers of arXiv 2205.12399.

As for a Fourier transform, the attention's whole sublayer becomes a mix of its own input; here by one matrix over
tokens and one over features, without a mask. The matrix over tokens has a size, which is that of the longest sequence:
shorter ones use its first rows and columns, longer ones are an error at run time; the paper's models have one length.

Without calibration both are initialised as in the paper's code (normal, standard deviation 0.02), by a seed that
depends on the layer alone: a structure to train. With calibration they are fitted to what the attention gave, by
alternating least squares; rows say how much of the output's energy that explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codegen.spec import LinearMixing, Structure
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.sublayer import NoSublayer, Sublayer, sublayer
from passes.targets.mixing import Fit, Fitting, mixed, on_top, refusal, told
from passes.targets.replacement import Replacement
from passes.targets.whole import Whole
from passes.weights.matrices import MatrixFitting

LONGEST = 512
"""Tokens that the paper's models have, and matrices here unless told otherwise."""

DEVIATION = 0.02
"""Of the paper's initialisation."""

NAMES = {Structure.DENSE: "linear-mixer", Structure.CIRCULANT: "circulant", Structure.TOEPLITZ: "toeplitz"}


@dataclass(frozen=True)
class LinearMixer(Whole):
    """Mix tokens and features by matrices.

    Attributes:
        structure: of both matrices.
        tokens: the longest sequence.
        keep: how many attentions at the top of each stack of layers stay.
    """

    structure: Structure = Structure.DENSE
    tokens: int = LONGEST
    keep: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, but is {self.tokens}")

    @property
    def name(self) -> str:
        return NAMES[self.structure] + ("" if self.tokens == LONGEST else f":{self.tokens}")

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site cannot be mixed, as far as its description tells; `transform` may find more."""
        return refusal(site)

    def keeps(self, sites: Sequence[AttentionSite]) -> dict[str, str]:
        """The top attentions of each stack."""
        return {s.name: f"it stays: the top {self.keep} attentions do" for s in on_top(sites, self.keep)}

    def transform(
        self, flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()
    ) -> Replacement:
        """Matrices at their initialisation.

        Raises NoSublayer where the site is no map of hidden states, or its recorded sequences are too long.
        """
        around = sublayer(flow, site, evidence)
        _require_short(self, int(flow.shape(around.input)[1 if around.batch_first else 0]))
        spec = LinearMixing(around.hidden, self.tokens, self.structure)
        first = min((s.layer for s in sharing), default=site.layer)  # sites that share weights go on sharing them
        draw = np.random.default_rng([first, around.hidden, self.tokens])
        tensors = {n: (DEVIATION * draw.standard_normal(shape)).astype(np.float32) for n, shape in spec.shapes.items()}
        return mixed(site, around, spec, tensors, self.name, "initialised", (f"for up to {self.tokens} tokens",))

    def fitting(self, flow: Flow, site: AttentionSite, evidence: Evidence, around: Sublayer) -> Fitting:
        """Fits both matrices and a constant."""
        return _Matrices(LinearMixing(around.hidden, self.tokens, self.structure, bias=True), self)

    def fitted(self, flow: Flow, site: AttentionSite, evidence: Evidence, fit: Fit) -> Replacement:
        """The fitted matrices. Raises NoSublayer as `transform`."""
        around = sublayer(flow, site, evidence)
        spec = LinearMixing(around.hidden, self.tokens, self.structure, bias=True)
        tensors = {name: array.astype(np.float32) for name, array in fit.tensors.items()}
        notes = (f"for up to {self.tokens} tokens", told(fit))
        return mixed(site, around, spec, tensors, self.name, "matrices", notes)


class _Matrices(MatrixFitting):
    """What is prepared are the hidden states themselves."""

    def __init__(self, spec: LinearMixing, target: LinearMixer) -> None:
        super().__init__(spec)
        self.target = target

    def prepare(self, hidden: Array, shown: Array) -> Array:
        _require_short(self.target, hidden.shape[1])
        return hidden


def _require_short(target: LinearMixer, tokens: int) -> None:
    if tokens > target.tokens:
        raise NoSublayer(
            f"its sequences of {tokens} tokens are longer than the matrix of {target.tokens}: give a larger one, e.g. "
            f"{NAMES[target.structure]}:{tokens}"
        )
