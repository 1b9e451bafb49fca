"""A feed-forward block of which each token uses some experts only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from codegen.activation import Activation


class Routing(Enum):
    """Who chooses whom in a mixture of experts."""

    EXPERTS_CHOOSE = "experts_choose"
    """Each expert takes the tokens that want it most, up to its capacity (arXiv 2202.09368); not causal."""
    TOKENS_CHOOSE = "tokens_choose"
    """Each token asks for its best experts; within a group, tokens of higher probability are served first
    (batch-prioritised, arXiv 2106.05974), until an expert's capacity is used up. Not causal either, where it is."""


@dataclass(frozen=True)
class MixtureOfExperts:
    """A feed-forward block of which each token uses some experts only (Sparse Mixer, arXiv 2205.12399).

    The operand x is [B, S, hidden]; its B S tokens, in order, are cut into groups of equal size. A router gives each
    token a probability for each expert, ``softmax(x router_weight + router_bias)`` in float32 at least. The result of a
    token is the sum over the experts that it was routed to of

        probability · (activation(x up_weight + up_bias) down_weight + down_bias),

    or, with `gated`, of ``activation(x gate_weight + gate_bias) * (x up_weight + up_bias)`` in the middle. The
    probabilities are not renormalised, and a token may be routed nowhere: its result is then zero. Ties go to the lower
    token and the lower expert. There is no mask, as in the paper's code: padded tokens take part in the routing.

    Attributes:
        hidden, expert_hidden: features outside, and within each of the `experts`.
        routing: who chooses.
        activation: of the experts.
        capacity_factor: experts have room for ``capacity_factor · tokens / experts`` tokens of a group, rounded half to
            even, but for `min_capacity` at least (and for no more than there are).
        group_limit: groups have at most this many tokens; there are as few as divide all tokens evenly.
        selected: experts that each token asks for, where tokens choose; first choices are served before second ones.
        gated: experts multiply two projections.
        router_bias, up_bias, down_bias: vectors are added there; `up_bias` speaks for the gate too.
        bias: a vector [hidden] is added to the result of every token, wherever it was routed to.
    """

    hidden: int
    expert_hidden: int
    experts: int
    routing: Routing = Routing.EXPERTS_CHOOSE
    activation: Activation = Activation.GELU_TANH
    capacity_factor: float = 1.0
    min_capacity: int = 4
    group_limit: int = 4096
    selected: int = 1
    gated: bool = False
    router_bias: bool = True
    up_bias: bool = True
    down_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "expert_hidden", "experts", "min_capacity", "group_limit", "selected"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be a positive number, not {self.capacity_factor}")
        if self.selected > (self.experts if self.routing is Routing.TOKENS_CHOOSE else 1):
            raise ValueError(f"selected={self.selected} experts of {self.experts}, with {self.routing.value}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name, in the order in which bodies take them."""
        outer, inner, experts = self.hidden, self.expert_hidden, self.experts
        found: dict[str, tuple[int, ...]] = {"router_weight": (outer, experts)}
        found |= {"router_bias": (experts,)} if self.router_bias else {}
        for name in ("gate", "up") if self.gated else ("up",):
            found[f"{name}_weight"] = (experts, outer, inner)
            found |= {f"{name}_bias": (experts, inner)} if self.up_bias else {}
        found["down_weight"] = (experts, inner, outer)
        found |= {"down_bias": (experts, outer)} if self.down_bias else {}
        return found | ({"bias": (outer,)} if self.bias else {})

    def groups(self, tokens: int) -> int:
        """The smallest number of groups within the limit that divides the tokens."""
        if tokens <= self.group_limit:
            return 1
        least = -(-tokens // self.group_limit)
        return next(n for n in range(least, tokens + 1) if tokens % n == 0)

    def capacity(self, group: int) -> int:
        """Tokens that an expert has room for, in a group of this many."""
        return min(max(round(self.capacity_factor * group / self.experts), self.min_capacity), group)

    @property
    def drops_nothing(self) -> bool:
        """Whether every token gets all experts that it asks for, at any length."""
        return self.routing is Routing.TOKENS_CHOOSE and self.capacity_factor >= self.experts

    def flops(self, tokens: int) -> int:
        """Of the router and of experts that work at capacity, two for each multiplication."""
        groups = self.groups(tokens)
        slots = groups * self.experts * self.capacity(tokens // groups)
        if self.routing is Routing.TOKENS_CHOOSE:
            slots = min(slots, tokens * self.selected)
        return 2 * self.hidden * (tokens * self.experts + slots * self.expert_hidden * (3 if self.gated else 2))
