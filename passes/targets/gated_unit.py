"""Gated attention units in place of attention: FLASH (arXiv 2202.10447), quadratic or by chunks, causal or not.

The attention's whole sublayer, output projection included, becomes one unit on its own input. Its values are the heads'
values side by side, its gate is 1, its output projection the attention's; in the place of all heads' scores stands one
score, whose base spans the best subspace of their mean (`passes/weights/gated.py` derives it). A feed-forward is a unit
already, of which the attention is the identity, so the layer's other half stays as it is, unless it is asked for
(`passes/targets/gated_pair.py`). Norms and residuals stay where the block has them: a post-norm block becomes one of
post-norm units.

How weights fall with distance is not taken from the model: they fall with 1 / (1 + distance), of sum 1 over `REACH`
tokens. Rotations of queries and keys go. With calibration the output projection is refitted by least squares to what
the attention gave. Either way this is where training starts, not where it ends: the paper trains from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from codegen.ops.token_mixing import before_output
from codegen.spec import GatedAttention, MixedChunkAttention, PositionBias
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.sublayer import Sublayer, sublayer
from passes.targets.mixing import Fit, Fitting, mixed, refusal, stored_weights, told
from passes.targets.replacement import Replacement
from passes.targets.whole import Whole
from passes.weights.gated import attention_unit, chunked, harmonic_profile, mean_score_map, score_subspace
from passes.weights.unit_refit import OutputSums

REACH = 512
"""Tokens over which weights by distance sum to 1, and the divisor of a quadratic unit's scores."""

CHUNK, BASE = 256, 128
"""The paper's."""

Form = Literal["gau", "flash-quad", "flash"]


def named(form: Form, chunk: int) -> str:
    """What a person types for units of this form."""
    return form if form != "flash" or chunk == CHUNK else f"flash:{chunk}"


def by_chunks(quadratic: GatedAttention, chunk: int) -> MixedChunkAttention:
    """The same unit in linear time; distances have numbers of their own within a chunk."""
    names = ("hidden", "expanded", "base", "causal", "bias", "rotary", "gate", "value", "latent")
    return MixedChunkAttention(**{n: getattr(quadratic, n) for n in names}, chunk=chunk, span=chunk)


@dataclass(frozen=True)
class GatedUnit(Whole):
    """One gated attention unit for each attention.

    Attributes:
        form: "gau" and "flash-quad" are one and the same, a quadratic unit; "flash" goes by chunks.
        chunk: of "flash".
    """

    form: Form = "gau"
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, but is {self.chunk}")

    @property
    def name(self) -> str:
        return named(self.form, self.chunk)

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site cannot become a unit, as far as its description tells; `transform` may find more."""
        return refusal(site, causal=True)

    def spec(self, site: AttentionSite, around: Sublayer) -> GatedAttention | MixedChunkAttention:
        """As wide as the heads' values together."""
        quadratic = GatedAttention(
            hidden=around.hidden,
            expanded=site.heads * site.value_dim,
            base=min(BASE, around.hidden + 1),
            length=REACH,
            causal=site.causal,
            bias=PositionBias.TOEPLITZ,
            span=REACH,
            rotary=False,
            gate=None,
            value=None,
            latent=None,
        )
        return quadratic if self.form != "flash" else by_chunks(quadratic, self.chunk)

    def transform(
        self, flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()
    ) -> Replacement:
        """The unit by weights alone. Raises NoSublayer where the site is no map of hidden states, or its weights are
        not stored."""
        around = sublayer(flow, site, evidence)
        tensors, kept = self._initial(flow, site, around)
        return self._replacement(site, around, tensors, "initialised", (_kept(kept),))

    def fitting(self, flow: Flow, site: AttentionSite, evidence: Evidence, around: Sublayer) -> Fitting:
        """Refits the output projection. Raises NoSublayer as `transform`."""
        tensors, kept = self._initial(flow, site, around)
        return _Refit(self.spec(site, around), tensors, kept)

    def fitted(self, flow: Flow, site: AttentionSite, evidence: Evidence, fit: Fit) -> Replacement:
        """The unit with its refitted output projection. Raises NoSublayer as `transform`."""
        around = sublayer(flow, site, evidence)
        return self._replacement(site, around, fit.tensors, "output", (told(fit),))

    def _initial(self, flow: Flow, site: AttentionSite, around: Sublayer) -> tuple[dict[str, Array], float]:
        """(operands by role, float64; how much of the heads' mean score the base has)."""
        spec = self.spec(site, around)
        weights = stored_weights(flow, site, around)
        gain = site.scale * site.q.gain * site.k.gain
        subspace = score_subspace(mean_score_map(weights, site.group, gain), spec.base - 1)
        profile = harmonic_profile(REACH, causal=site.causal)
        if isinstance(spec, GatedAttention):
            return attention_unit(weights, site.group, subspace, profile, REACH, spec.base), subspace.explained
        near = _around_zero(profile, spec.span)
        operands = attention_unit(weights, site.group, subspace, near, spec.chunk, spec.base)
        return chunked(operands, max(1.0 - float(near.sum()), 0.0)), subspace.explained

    def _replacement(
        self,
        site: AttentionSite,
        around: Sublayer,
        tensors: Mapping[str, Array],
        merge: str,
        notes: tuple[str, ...],
    ) -> Replacement:
        stored = {role: array.astype(np.float32) for role, array in tensors.items()}
        return mixed(site, around, self.spec(site, around), stored, self.name, merge, notes)


def _around_zero(profile: Array, span: int) -> Array:
    """Distances of magnitude below `span` of a profile [2 n - 1]; zeros beyond it."""
    middle = len(profile) // 2
    wide = np.pad(profile, max(span - 1 - middle, 0))
    middle = len(wide) // 2
    return np.asarray(wide[middle - span + 1 : middle + span])


def _kept(explained: float) -> str:
    return f"its base has {explained:.1%} of the symmetric part of the heads' mean score"


@dataclass
class _Refit:
    """What is prepared is what the output projection reads."""

    spec: GatedAttention | MixedChunkAttention
    tensors: Mapping[str, Array]
    kept: float
    sums: OutputSums = field(default_factory=OutputSums)

    def prepare(self, hidden: Array, shown: Array) -> Array:
        return before_output(self.spec, hidden, self.tensors)

    def add(self, prepared: Array, output: Array, asking: Array) -> None:
        self.sums.add(prepared[asking], output[asking])

    def solve(self) -> Fit:
        fit = self.sums.solve(self.tensors["out_weight"], self.tensors["out_bias"])
        return replace(fit, tensors={**self.tensors, **fit.tensors})
