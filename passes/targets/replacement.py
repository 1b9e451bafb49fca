"""What a target hands to the doors out: a spec, tensors for it, and whether the step was exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from codegen.spec import GroupedQueryAttention
from passes.dataflow import Array
from passes.site import AttentionSite


@dataclass(frozen=True)
class Replacement:
    """A site's new mixer.

    Attributes:
        spec: what it computes.
        tensors: new parameters by role: ``k_weight`` [kv_heads * head_dim, in], ``k_bias`` [kv_heads * head_dim],
            ``v_weight``, ``v_bias``; rows are head-major in the order of `Operand.columns`. Where queries and output
            follow the merge also ``q_weight`` [heads * head_dim, in], ``q_bias``, ``out_weight``
            [features, heads * value_dim] and ``out_bias``. Roles that are absent keep the site's own parameters.
        exact: True if the new mixer equals the old one up to rounding.
        before, after: short descriptions, e.g. ``"mha12"`` and ``"gqa4"``.
        merge: how heads became one: "mean", "aligned" or "joint".
        notes: what was done otherwise than `merge` says, and why.
    """

    site: AttentionSite
    spec: GroupedQueryAttention
    tensors: Mapping[str, Array]
    exact: bool
    before: str
    after: str
    merge: str = "mean"
    notes: tuple[str, ...] = ()

    @property
    def turned(self) -> bool:
        """Whether queries or the output change with the keys and values, so that these alone are not enough."""
        return any(role.startswith(("q_", "out_")) for role in self.tensors)
