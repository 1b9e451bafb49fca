"""The spec of what routed tokens go through: gather, one feed-forward block of several, and scatter by weight.

It is what a mixture of experts does once it is known who is routed where, and the heavy branch of conditional
feed-forward blocks, which is the same with one block.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.activation import Activation
from codegen.conditional import ConditionalFeedForward
from codegen.spec import MixtureOfExperts, Routing

MATRICES = ("gate_weight", "up_weight", "down_weight")
VECTORS = ("gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class RoutedFeedForward:
    """Tokens x [N, hidden] through `experts` blocks, each of which has M places for tokens.

    `rows` [experts, M], integers, says which token stands in a place, -1 for none; no expert has a token twice.
    `weights` [experts, M], in float32, is what its result is multiplied by. The result [N, hidden] of a token is the
    sum over its places of ``weight · block(x)``, added to `base` [N, hidden] where there is one; a token without a
    place has zero, or its base. A block is

        activation(x up_weight + up_bias) down_weight + down_bias

    or, with `gated`, has ``activation(x gate_weight + gate_bias) * (x up_weight + up_bias)`` in the middle.

    Attributes:
        hidden, inner: features outside, and within each block.
        experts: how many blocks.
        activation, gated: of the blocks.
        up_bias, down_bias: vectors are added there; `up_bias` speaks for the gate too.
        once: no token has more than one place, so that results are written where they belong, without a sum.
    """

    hidden: int
    inner: int
    experts: int = 1
    activation: Activation = Activation.GELU_TANH
    gated: bool = False
    up_bias: bool = False
    down_bias: bool = False
    once: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "inner", "experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name, in the order of `MATRICES` and `VECTORS`; matrices are [in, out]."""
        ups = ("gate", "up") if self.gated else ("up",)
        found: dict[str, tuple[int, ...]] = {f"{name}_weight": (self.experts, self.hidden, self.inner) for name in ups}
        found["down_weight"] = (self.experts, self.inner, self.hidden)
        found |= {f"{name}_bias": (self.experts, self.inner) for name in ups if self.up_bias}
        return found | ({"down_bias": (self.experts, self.hidden)} if self.down_bias else {})

    def flops(self, places: int) -> int:
        """Of all products with this many places filled, over all experts; two for each multiplication."""
        return 2 * places * self.hidden * self.inner * (3 if self.gated else 2)


def of_mixture(spec: MixtureOfExperts) -> RoutedFeedForward:
    """What is behind the router of a mixture of experts."""
    return RoutedFeedForward(
        spec.hidden,
        spec.expert_hidden,
        spec.experts,
        spec.activation,
        spec.gated,
        spec.up_bias,
        spec.down_bias,
        once=spec.experts == 1 or (spec.routing is Routing.TOKENS_CHOOSE and spec.selected == 1),
    )


def of_heavy_branch(spec: ConditionalFeedForward) -> RoutedFeedForward:
    """The heavy branch of a conditional feed-forward block; its base is the light one."""
    return RoutedFeedForward(
        spec.hidden, spec.heavy, 1, spec.activation, spec.gated, spec.up_bias, spec.down_bias, once=True
    )
