"""What a kernel must compute, as integers, enums and one small expression tree.

Specs are the contract between the floors: targets produce them, doors out and templates consume them.
Nothing in a spec is text that came from a model.
"""

from __future__ import annotations

from codegen.activation import Activation
from codegen.conditional import ConditionalAttention
from codegen.spec.experts import MixtureOfExperts, Routing
from codegen.spec.gated import GatedAttention, GatedUnit, MixedChunkAttention, PositionBias
from codegen.spec.linear import FeatureMap, LinearAttention
from codegen.spec.mixing import FourierMixing, LinearMixing, Structure
from codegen.spec.softmax import DecoupledAttention, GroupedQueryAttention

TokenMixing = FourierMixing | LinearMixing | GatedUnit | ConditionalAttention
"""What takes the place of an attention with all its projections."""

Spec = GroupedQueryAttention | DecoupledAttention | LinearAttention | TokenMixing
"""Everything that can take an attention's place."""

__all__ = [
    "Activation", "ConditionalAttention", "DecoupledAttention", "FeatureMap", "FourierMixing", "GatedAttention",
    "GatedUnit", "GroupedQueryAttention", "LinearAttention", "LinearMixing", "MixedChunkAttention", "MixtureOfExperts",
    "PositionBias", "Routing", "Spec", "Structure", "TokenMixing",
]  # fmt: skip
