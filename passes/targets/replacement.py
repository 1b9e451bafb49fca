"""What a target hands to the doors out: a spec, tensors for it, and whether the step was exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from codegen.sight import Pattern
from codegen.spec import DecoupledAttention, GroupedQueryAttention, LinearAttention, Spec, TokenMixing
from passes.dataflow import Array
from passes.site import AttentionSite
from passes.sublayer import Sublayer


@dataclass(frozen=True)
class Replacement:
    """A site's new mixer.

    Attributes:
        spec: what it computes. Grouped and linear attention take the place of the contractions and the softmax, mixing
            that of the whole sublayer: all projections, that of the output included.
        tensors: new parameters by role. For mixing and linear attention those of the spec's `shapes`. For grouped and
            decoupled attention ``k_weight`` [kv_heads * head_dim, in], ``k_bias`` [kv_heads * head_dim],
            ``v_weight``, ``v_bias`` (of further streams of tokens ``k1_weight``...); rows are head-major in the order
            of `Operand.columns`. Where a norm multiplies each head by its own numbers also ``k_gain`` [kv_heads *
            head_dim], ``k_shift``, ``v_gain``, ``v_shift``. If queries and output follow the merge also ``q_weight``
            [heads * head_dim, in], ``q_bias``, ``out_weight`` [features, heads * value_dim] and ``out_bias``. Roles
            that are absent keep the site's own parameters.
        exact: True if the new mixer equals the old one up to rounding.
        before, after: short descriptions, e.g. ``"mha12"`` and ``"gqa4"``.
        merge: how heads became one: "mean", "aligned" or "joint"; for mixing how its result was fitted to the
            attention's: "none", "initialised", "diagonal", "matrices" or "output", for light and heavy heads
            "selected" or "fitted". "none" too where only what queries see changes.
        gathered: where `tensors` leave query heads in places where those of one group are no neighbours, the roles that
            are added to bring them together: ``q_weight``, ``out_weight``... with heads in another order.
        scattered: why there are no such roles, where they would be needed.
        combined: which operands a merge combined within their heads, so that only queries or an output projection
            that follow it make sense of them: "keys", "values".
        may_average: whether heads may be averaged where queries and output cannot follow, since nobody asked for more.
        notes: what was done otherwise than `merge` says, and why.
        sublayer: for mixing what it takes the place of.
        shown: for conditional attention bool [B, S], the recorded tokens that are no padding.
    """

    site: AttentionSite
    spec: Spec
    tensors: Mapping[str, Array]
    exact: bool
    before: str
    after: str
    merge: str = "mean"
    gathered: Mapping[str, Array] = field(default_factory=dict)
    scattered: str | None = None
    combined: tuple[str, ...] = ()
    may_average: bool = False
    notes: tuple[str, ...] = ()
    sublayer: Sublayer | None = None
    shown: Array | None = None

    @property
    def grouped(self) -> GroupedQueryAttention:
        """The spec of a replacement that is grouped attention, or as which decoupled attention is computed, or the
        heads of linear attention; raises TypeError for any other."""
        if isinstance(self.spec, LinearAttention | DecoupledAttention):
            return self.spec.attention
        if not isinstance(self.spec, GroupedQueryAttention):
            raise TypeError(f"{self.site.name} becomes {self.after}, which is no grouped attention")
        return self.spec

    @property
    def mixing(self) -> TokenMixing | None:
        """The spec of a replacement that mixes tokens without attention, None for any other."""
        kept = GroupedQueryAttention | DecoupledAttention | LinearAttention
        return None if isinstance(self.spec, kept) else self.spec

    @property
    def decoupled(self) -> DecoupledAttention | None:
        """The spec of a replacement whose keys and values differ in their number of heads, None for any other."""
        return self.spec if isinstance(self.spec, DecoupledAttention) else None

    @property
    def kv_heads(self) -> tuple[int, int]:
        """Heads of keys and of values; none of either where the step leaves no attention."""
        if self.decoupled is not None:
            return self.decoupled.key_heads, self.decoupled.value_heads
        return (0, 0) if self.mixing is not None else (self.grouped.kv_heads, self.grouped.kv_heads)

    @property
    def linear(self) -> LinearAttention | None:
        """The spec of a replacement that is linear attention, None for any other."""
        return self.spec if isinstance(self.spec, LinearAttention) else None

    @property
    def around(self) -> Sublayer:
        """What a mix takes the place of; raises TypeError for a replacement that is none."""
        if self.sublayer is None:
            raise TypeError(f"{self.site.name} becomes {self.after}, which mixes nothing")
        return self.sublayer

    @property
    def pattern(self) -> Pattern:
        """What queries see after the step; empty where that does not change."""
        return self.spec.pattern if isinstance(self.spec, GroupedQueryAttention) else ()

    @property
    def reads(self) -> tuple[int, ...]:
        """For each query head, as `tensors` place them, the new key/value head that it reads."""
        heads, kv_heads = self.grouped.heads, self.grouped.kv_heads
        if self.turned or (self.scattered is None and not self.gathered):
            return tuple(h * kv_heads // heads for h in range(heads))
        return tuple(g * kv_heads // self.site.kv_heads for g in self.site.group)

    def together(self) -> Replacement:
        """For doors that write the attention anew: heads of one group are neighbours, as specs have them.

        Raises ValueError if they cannot be.
        """
        if self.scattered is not None:
            raise ValueError(
                "query heads that share a key/value head are no neighbours, and cannot change places: " + self.scattered
            )
        return replace(self, tensors={**self.tensors, **self.gathered}, gathered={}) if self.gathered else self

    @property
    def turned(self) -> bool:
        """Whether queries or the output change with the keys and values, so that these alone are not enough."""
        return any(role.startswith(("q_", "out_")) for role in self.tensors)
