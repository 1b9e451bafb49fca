"""Sparse attention: every head keeps its projections, and its queries see fewer keys.

* `Window`: the nearest keys (arXiv 2004.05150) and the first ones (arXiv 2309.17453).
* `SparseFixed`, `SparseStrided`: the factorised patterns of Sparse Transformers (arXiv 1904.10509). They have two
  parts, of which the local one reaches what is near and the other everything else in two steps.

No weight changes, and the step is lossy: what it costs is measured. Causal sites get the causal pattern, others the
symmetric one, in which tokens that all see also see all. Positions count keys as they lie in the sequence or the
cache: tokens that pad a row on the left count too, so that they take the places of sinks and shift blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from codegen.sight import Pattern, Sight, visible
from passes.dataflow import Flow
from passes.match.attention import Evidence
from passes.site import AttentionSite
from passes.targets.grouped_query import describe, misplaced, shared_alone, specification
from passes.targets.replacement import Replacement
from passes.targets.whole import Whole

Form = Literal["merged", "alternating", "heads"]
"""How a pattern's two parts are assigned: each head sees both; layers see the local one (even layers) and the other one
(odd layers) in turn; or they are divided among heads."""

FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Sparse(Whole):
    """What sparse targets have in common; `sights` is a kind's own."""

    @property
    def name(self) -> str:
        raise NotImplementedError

    def sights(self, heads: int, layer: int, *, causal: bool) -> Pattern:
        """What the heads of the `layer`-th attention see."""
        raise NotImplementedError

    def pattern(self, site: AttentionSite) -> Pattern:
        """The sights of a site's heads."""
        return self.sights(site.heads, site.layer, causal=site.causal)

    def refuses(self, site: AttentionSite) -> str | None:
        """Why this site cannot follow a pattern of positions, or None."""
        if (reason := shared_alone(site)) is not None:
            return reason
        if site.cross:
            return "it is cross-attention: positions of two sequences do not correspond"
        if getattr(self, "form", "") == "alternating" and "#" in site.name:
            return "it is one module with an earlier layer, so that they cannot take turns"
        return misplaced(site)

    def transform(
        self, flow: Flow, site: AttentionSite, evidence: Evidence, sharing: Sequence[AttentionSite] = ()
    ) -> Replacement:
        """The same attention under the pattern; no weight changes, with or without calibration."""
        # a padded query may see padding alone, and NaN in its row would reach others through the layers above
        spec = replace(specification(site, site.kv_heads), pattern=self.pattern(site), masked_rows_are_zero=True)
        queries, keys = evidence.q.tokens.rows.shape[1], int(evidence.k.tokens.new.stop)
        notes: tuple[str, ...] = (_told(spec.pattern, site.causal, int(queries), keys),)
        if any(m.kind == "mask" or m.kind == "bias" for m in site.modifiers):
            notes = (*notes, "positions count padding: pad batches on the right, or not at all")
        return Replacement(site, spec, {}, False, describe(site), self.name, merge="none", notes=notes)


@dataclass(frozen=True)
class Window(Sparse):
    """The nearest keys, and the first ones of the sequence.

    Attributes:
        width: causal queries see `width` keys, themselves and those before; others see as many on each side, their
            own position counted on both.
        sinks: so many first tokens are seen by all; in the symmetric form they also see all.
    """

    width: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        _require(width=(self.width, 1), sinks=(self.sinks, 0))

    @property
    def name(self) -> str:
        return _name("window", (self.width, self.sinks), (128, 4))

    def sights(self, heads: int, layer: int, *, causal: bool) -> Pattern:
        return (Sight(reach=self.width, sinks=self.sinks, ordered=causal),)


@dataclass(frozen=True)
class SparseFixed(Sparse):
    """Blocks of tokens, and the last tokens of every block, which are to sum it up.

    Attributes:
        block: tokens of a block, l in the paper (128 or 256 there). Work grows with n * sqrt(n) where l = sqrt(n).
        summary: how many tokens of each block all queries see, c in the paper (8, 16 or 32 there).
        form: as `Form`. "heads": each head sees its block and `summary` tokens of its own in all blocks, head h the
            sub-block number h mod (block // summary) from the end, as in the published code.
    """

    block: int = 128
    summary: int = 8
    form: Form = "merged"

    def __post_init__(self) -> None:
        _require(block=(self.block, 1), summary=(self.summary, 1))
        _require_form(self.form)
        if self.summary > self.block:
            raise ValueError(f"summary={self.summary} tokens do not fit a block of {self.block}")

    @property
    def name(self) -> str:
        return _name("sparse-fixed", (self.block, self.summary), (128, 8), self.form)

    def sights(self, heads: int, layer: int, *, causal: bool) -> Pattern:
        blocks = Sight(block=self.block, ordered=causal)
        if self.form == "heads":
            return tuple(self._summing(blocks, number) for number in range(self.block // self.summary))[:heads]
        if self.form == "merged":
            return (self._summing(blocks, 0),)
        return (blocks if layer % 2 == 0 else self._summing(replace(blocks, block=1), 0),)

    def _summing(self, sight: Sight, number: int) -> Sight:
        last = self.block - number * self.summary
        return replace(sight, period=self.block, first=last - self.summary, last=last)


@dataclass(frozen=True)
class SparseStrided(Sparse):
    """The last `stride` tokens, and every token a multiple of `stride` away; for data with such a period, not for text.

    Attributes:
        stride: l in the paper. The near part holds l + 1 keys, as the paper writes it: ``i - l`` to ``i``.
        form: as `Form`. "heads": even heads see the near part, odd ones the strided one.
    """

    stride: int = 128
    form: Form = "merged"

    def __post_init__(self) -> None:
        _require(stride=(self.stride, 1))
        _require_form(self.form)

    @property
    def name(self) -> str:
        return _name("sparse-strided", (self.stride,), (128,), self.form)

    def sights(self, heads: int, layer: int, *, causal: bool) -> Pattern:
        near = Sight(reach=self.stride + 1, ordered=causal)
        strided = Sight(stride=self.stride, ordered=causal)
        if self.form == "heads":
            return (near, strided)[:heads]
        if self.form == "merged":
            return (replace(near, stride=self.stride),)
        return (near if layer % 2 == 0 else strided,)


def _told(pattern: Pattern, causal: bool, queries: int, keys: int) -> str:
    """What part of the recorded scores is left, so that a drift of nothing is not misread."""
    rows, columns = np.arange(keys - queries, keys)[:, None], np.arange(keys)
    before = np.broadcast_to(columns <= rows if causal else True, (queries, keys))
    left = [float((visible(sight, rows, columns) & before).sum()) for sight in pattern]
    share = sum(left) / max(len(left) * float(before.sum()), 1.0)
    if share == 1.0:
        return f"the {keys} recorded tokens lie within the pattern: what it costs on longer ones is not seen here"
    return f"{share:.1%} of the scores are left on the {keys} recorded tokens"


def _name(stem: str, numbers: Sequence[int], usual: Sequence[int], form: Form = "merged") -> str:
    words = [] if tuple(numbers) == tuple(usual) else [str(n) for n in numbers]
    words += [] if form == "merged" else [form]
    return f"{stem}:{','.join(words)}" if words else stem


def _require(**numbers: tuple[int, int]) -> None:
    for name, (number, least) in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")


def _require_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; there are {', '.join(FORMS)}")
