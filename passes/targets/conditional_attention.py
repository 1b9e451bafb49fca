"""An attention becomes light heads for all tokens and heavy ones for some (CoLT5, arXiv 2303.09752).

A quarter of the heads, as in the paper, goes on for all tokens and sees near keys; the others go from routed tokens to
routed keys. All keep their projections (`passes/weights/light_heads.py`). With calibration light heads are those that
lose least by a window, routers are fitted to what heavy heads give, and the light output projection is refitted to what
they leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codegen.conditional import ConditionalAttention, Router
from passes.dataflow import Array, Flow
from passes.distance_bias import ByDistance, by_distance
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.sublayer import Sublayer, sublayer
from passes.targets.grouped_query import describe
from passes.targets.mixing import Fit, Fitting, refusal, stored_weights, told
from passes.targets.replacement import Replacement
from passes.targets.whole import Whole
from passes.weights.light_heads import Heads, HeadsFit, HeadsFitting, branches, strongest

RADIUS = 127
"""The paper's, a window of 255."""


@dataclass(frozen=True)
class ConditionalHeads(Whole):
    """Light and heavy heads in each attention's place.

    Attributes:
        name: what reports call the result.
        fraction: of a sequence's tokens, those that are heavy queries; twice as many are heavy keys.
        radius: light queries see as many keys on either side.
    """

    name: str = "colt5"
    fraction: float = 1 / 16
    radius: int = RADIUS

    def __post_init__(self) -> None:
        Router(self.fraction)
        if self.radius < 0:
            raise ValueError(f"radius must not be negative, but is {self.radius}")

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site stays as it is, as far as its description tells; `transform` may find more."""
        if site.causal:
            return "it is causal, and who is routed depends on later tokens"
        if (reason := refusal(site)) is not None:
            return reason
        if site.q.rotary is not None or site.k.rotary is not None:
            return "its queries and keys are rotated by position, which conditional attention does not do"
        if site.bent:
            return "its queries or keys are normalised, which conditional attention does not do"
        changed: list[str] = [m.kind for m in site.modifiers if m.kind in ("temperature", "softcap", "sinks")]
        changed += ["masks by window"] if any(m.windows for m in site.modifiers) else []
        if changed:
            return f"its scores have {' and '.join(changed)}, which conditional attention does not know"
        if site.head_dim != site.value_dim:
            return "its queries and values differ in width"
        if site.heads < 2:
            return "it has one head, which cannot be light and heavy"
        return None

    def spec(self, site: AttentionSite, around: Sublayer, heads: Heads, seen: ByDistance) -> ConditionalAttention:
        light = max(site.heads // 4, 1)
        return ConditionalAttention(
            around.hidden,
            site.head_dim,
            light,
            site.heads - light,
            queries=Router(self.fraction),
            keys=Router(min(2 * self.fraction, 1.0)),
            radius=self.radius,
            scale=site.scale * site.q.gain * site.k.gain,
            buckets=0 if seen.table is None else len(seen.table),
            farthest=seen.farthest,
            bias=heads.biased,
            output_bias=True,
        )

    def transform(
        self, flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()
    ) -> Replacement:
        """By weights alone. Raises NoSublayer where the site is no map of hidden states, where its masks and biases say
        more than padding and distance, or where its weights are not stored."""
        around, heads, seen = self._read(flow, site, evidence)
        spec = self.spec(site, around, heads, seen)
        tensors = branches(spec, heads, strongest(heads, spec.light_heads))
        return self._replacement(site, around, spec, tensors, seen.shown, "selected", ())

    def fitting(self, flow: Flow, site: AttentionSite, evidence: Evidence, around: Sublayer) -> Fitting:
        """Raises NoSublayer as `transform`."""
        _, heads, seen = self._read(flow, site, evidence)
        return HeadsFitting(self.spec(site, around, heads, seen), heads)

    def fitted(self, flow: Flow, site: AttentionSite, evidence: Evidence, fit: Fit) -> Replacement:
        """With what was fitted. Raises NoSublayer as `transform`."""
        assert isinstance(fit, HeadsFit)
        around, _, seen = self._read(flow, site, evidence)
        queries, keys = (max(part, 0.0) for part in fit.routers)
        notes = (told(fit), f"routers explain {queries:.1%} and {keys:.1%} of what heavy queries and keys bring")
        return self._replacement(site, around, fit.spec, fit.tensors, seen.shown, "fitted", notes)

    def _read(self, flow: Flow, site: AttentionSite, evidence: Evidence) -> tuple[Sublayer, Heads, ByDistance]:
        around = sublayer(flow, site, evidence)
        seen = by_distance(flow, site, evidence)
        weights = stored_weights(flow, site, around)
        return around, Heads.of(weights, site.group, site.v.gain, seen.table), seen

    def _replacement(
        self,
        site: AttentionSite,
        around: Sublayer,
        spec: ConditionalAttention,
        tensors: Mapping[str, Array],
        shown: Array,
        merge: str,
        notes: tuple[str, ...],
    ) -> Replacement:
        stored = {role: np.ascontiguousarray(array, dtype=np.float32) for role, array in tensors.items()}
        return Replacement(
            site, spec, stored, False, describe(site), self.name, merge=merge, notes=notes, sublayer=around, shown=shown
        )
