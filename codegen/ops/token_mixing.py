"""What all ops that mix tokens have in common: an oracle by spec, and a spec as JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.ops.fourier_mixing.reference import fourier_mixing
from codegen.ops.linear_mixing.reference import linear_mixing
from codegen.spec import FourierMixing, LinearMixing, Structure, TokenMixing


def token_mixing(spec: TokenMixing, x: NDArray[Any], **parameters: NDArray[Any]) -> NDArray[np.float64]:
    """The oracle: [B, S, hidden] of x [B, S, hidden] and the spec's parameters.

    Raises:
        ValueError: if operands contradict the spec.
    """
    if isinstance(spec, LinearMixing):
        return linear_mixing(spec, x, **parameters)
    return fourier_mixing(spec, x, **parameters)


def to_json(spec: TokenMixing) -> dict[str, Any]:
    """A spec as plain numbers, flags and words."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in asdict(spec).items()}


def from_json(fields: Mapping[str, Any]) -> TokenMixing:
    """What `to_json` wrote; raises TypeError or ValueError if it is broken."""
    if "structure" in fields:
        return LinearMixing(**{**fields, "structure": Structure(fields["structure"])})
    return FourierMixing(**fields)
