"""The spec of a linear layer with its activation, as C++ kernels compute it beside what mixes tokens."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.activation import Activation


@dataclass(frozen=True)
class Projection:
    """``activation(x weightᵀ + bias)``: [B, S, inputs] to [B, S, outputs], of weight [outputs, inputs], bias [outputs].

    Attributes:
        activation: None for none.
    """

    inputs: int
    outputs: int
    activation: Activation | None = None

    def __post_init__(self) -> None:
        if min(self.inputs, self.outputs) < 1:
            raise ValueError("inputs and outputs must be at least 1")

    def flops(self, batch: int, tokens: int) -> int:
        """Of the product, two for each multiplication."""
        return 2 * batch * tokens * self.inputs * self.outputs
