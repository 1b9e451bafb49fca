"""What all ops that mix tokens have in common: an oracle by spec, and a spec as JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.conditional import ConditionalAttention, Router
from codegen.ops.conditional_attention.reference import conditional_attention
from codegen.ops.fourier_mixing.reference import fourier_mixing
from codegen.ops.gated_attention import reference as unit
from codegen.ops.linear_mixing.reference import linear_mixing
from codegen.ops.mixed_chunk_attention import reference as chunked
from codegen.spec import (
    Activation,
    FourierMixing,
    GatedAttention,
    GatedUnit,
    LinearMixing,
    MixedChunkAttention,
    PositionBias,
    Structure,
    TokenMixing,
)


def token_mixing(
    spec: TokenMixing, x: NDArray[Any], shown: NDArray[np.bool_] | None = None, **parameters: NDArray[Any]
) -> NDArray[np.float64]:
    """The oracle: [B, S, hidden] of x [B, S, hidden] and the spec's parameters.

    Args:
        shown: [B, S], False for padding, which conditional attention alone heeds.

    Raises:
        ValueError: if operands contradict the spec.
    """
    if isinstance(spec, ConditionalAttention):
        return conditional_attention(spec, x, shown, soft=False, **parameters)
    if isinstance(spec, LinearMixing):
        return linear_mixing(spec, x, **parameters)
    if isinstance(spec, GatedAttention):
        return unit.gated_attention(spec, x, parameters)
    if isinstance(spec, MixedChunkAttention):
        return chunked.mixed_chunk_attention(spec, x, parameters)
    return fourier_mixing(spec, x, **parameters)


def before_output(spec: GatedUnit, x: NDArray[Any], parameters: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """[B, S, expanded]: what a gated unit's output projection reads. Raises ValueError as `token_mixing`."""
    if isinstance(spec, GatedAttention):
        return unit.before_output(spec, x, parameters)
    return chunked.before_output(spec, x, parameters)


def to_json(spec: TokenMixing) -> dict[str, Any]:
    """A spec as plain numbers, flags and words."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in asdict(spec).items()}


def from_json(fields: Mapping[str, Any]) -> TokenMixing:
    """What `to_json` wrote; raises TypeError or ValueError if it is broken."""
    if "structure" in fields:
        return LinearMixing(**{**fields, "structure": Structure(fields["structure"])})
    if "light_heads" in fields:
        return ConditionalAttention(**{**fields, **{n: Router(**fields[n]) for n in ("queries", "keys")}})
    if "expanded" in fields:
        return _unit(dict(fields))
    return FourierMixing(**fields)


def _unit(fields: dict[str, Any]) -> GatedUnit:
    for name in ("gate", "value", "latent"):
        if fields.get(name) is not None:
            fields[name] = Activation(fields[name])
    fields["bias"] = PositionBias(fields["bias"])
    return MixedChunkAttention(**fields) if "chunk" in fields else GatedAttention(**fields)
