"""Linear attention that keeps the heads: softmax nearby, a product of features beyond (LoLCATs, arXiv 2410.10254).

Every head keeps its projections, rotations and norms. What queries see of their own chunk and its neighbours stays a
softmax; all else goes through a feature map, so that work grows with the length. On sequences of two chunks nothing
changes; on longer ones the step is lossy until the feature maps are trained to give what the attention gave
("attention transfer", which is the first phase of uptraining).

Before training a far key whose features say nothing (of zeros) weighs `FAR` of what the best near key weighs, as in the
published configurations: factors of 0.1 and 1, and two softmaxes over 64 features. FAVOR+ estimates the softmax itself
and needs no such number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codegen.spec import FeatureMap, GroupedQueryAttention
from codegen.spec import LinearAttention as Spec
from passes.dataflow import Array, Flow
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.targets.grouped_query import describe, shared_alone
from passes.targets.replacement import Replacement
from passes.targets.whole import Whole

CHUNK = 64
FAR = 10 * 2 / 64


@dataclass(frozen=True)
class LinearHeads(Whole):
    """Softmax within a query's chunk and its neighbours, features beyond.

    Attributes:
        chunk: tokens of a chunk; causal queries see 1 to `chunk` keys of their own and `chunk` before that by softmax.
        features: learned for each head, or a fixed map.
    """

    chunk: int = CHUNK
    features: FeatureMap = FeatureMap.LEARNED

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {self.chunk}")

    @property
    def name(self) -> str:
        words = [] if self.chunk == CHUNK else [str(self.chunk)]
        words += [] if self.features is FeatureMap.LEARNED else [self.features.value]
        return f"linear:{','.join(words)}" if words else "linear"

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site cannot become linear, as far as its description tells; the door may find more."""
        if (reason := shared_alone(site)) is not None:
            return reason
        if site.cross:
            return "it is cross-attention: positions of two sequences do not correspond"
        changed: list[str] = [m.kind for m in site.modifiers if m.kind in ("temperature", "softcap", "sinks")]
        changed += ["masks by window"] if any(m.windows for m in site.modifiers) else []
        if changed:
            return f"its scores have {' and '.join(changed)}, which a product of features cannot follow"
        if not _scale(site) > 0:
            return "its scores have no positive scale"
        return None

    def spec(self, site: AttentionSite) -> Spec:
        """The site's heads, with all of the scale behind the projections."""
        heads = GroupedQueryAttention(
            site.heads,
            site.kv_heads,
            site.head_dim,
            site.value_dim,
            _scale(site),
            causal=site.causal,
            masked_rows_are_zero=True,
        )
        return Spec(heads, self.chunk, self.features)

    def transform(
        self, flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()
    ) -> Replacement:
        """The same projections, and a feature map before its training; with or without calibration."""
        spec, keys = self.spec(site), int(evidence.k.tokens.new.stop)
        notes: tuple[str, ...] = ("the order of keys counts padding: pad batches on the right, or not at all",)
        if keys <= self.chunk * 2:
            notes = (f"the {keys} recorded tokens are all near: what it costs on longer ones is not seen here", *notes)
        return Replacement(
            site, spec, initial(spec), False, describe(site), self.name, merge="initialised", notes=notes
        )


def initial(spec: Spec) -> dict[str, Array]:
    """Parameters before training, float32: learned maps are the identity, random directions always the same."""
    heads, size = spec.attention.heads, spec.attention.head_dim
    silent = {FeatureMap.LEARNED: 2 / size, FeatureMap.ELU1: float(size), FeatureMap.FAVOR: FAR}[spec.features]
    found: dict[str, Array] = {"log_gain": np.full(heads, math.log(FAR / silent), np.float32)}
    for name in ("query_map", "key_map"):
        if name in spec.shapes:
            found[name] = np.broadcast_to(np.eye(size, dtype=np.float32), spec.shapes[name]).copy()
    if "directions" in spec.shapes:
        random = np.random.default_rng(0)
        drawn = [orthogonal(random, spec.directions, size) for _ in range(spec.attention.kv_heads)]
        found["directions"] = np.stack(drawn).astype(np.float32)
    return found


def orthogonal(random: np.random.Generator, count: int, size: int) -> Array:
    """[count, size]: Gaussian vectors of which each `size` in turn are orthogonal to each other (arXiv 2009.14794)."""
    blocks = []
    for _ in range(-(-count // size)):
        axes, triangle = np.linalg.qr(random.standard_normal((size, size)))
        blocks.append((axes * np.sign(np.diag(triangle))).T)  # as it comes, its signs lean to one side
    lengths = np.linalg.norm(random.standard_normal((count, size)), axis=1, keepdims=True)
    return np.asarray(np.concatenate(blocks)[:count] * lengths)


def _scale(site: AttentionSite) -> float:
    return site.scale * site.q.gain * site.k.gain
