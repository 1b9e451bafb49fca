"""Specs of conditional computation (CoLT5, arXiv 2303.09752): a light branch for all tokens, a heavy one for some.

A router gives each token a score, ``x · u``; of each sequence the highest are routed. Not causal: who is routed depends
on the whole sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from codegen.activation import Activation


@dataclass(frozen=True)
class Router:
    """How many tokens of a sequence are routed, and how their weights are found.

    In inference the k tokens of the highest scores are, each with weight 1 (hard). In training weights come from an
    iterative soft top-k (arXiv 2211.01267), which has gradients; those of the `surplus` k highest scores are kept
    (soft). Ties go to the lower token. Padding is never routed.

    Attributes:
        fraction: k over the number of tokens, padding included; k is rounded half to even, and at least 1.
        epsilon: the soft top-k's temperature; its limit at 0 is the hard one.
        iterations: of the soft top-k.
        surplus: how many times k tokens are kept in training, rounded up.
    """

    fraction: float = 1 / 16
    epsilon: float = 1.0
    iterations: int = 50
    surplus: float = 9 / 8

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {self.fraction}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a positive number, not {self.epsilon}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")
        if not 1 <= self.surplus < math.inf:
            raise ValueError(f"surplus must be a number from 1 up, not {self.surplus}")

    def budget(self, tokens: int) -> int:
        """k, for sequences of this many tokens."""
        return min(max(round(self.fraction * tokens), 1), tokens)

    def kept(self, tokens: int, *, soft: bool) -> int:
        """How many tokens the heavy branch works on."""
        k = self.budget(tokens)
        return min(math.ceil(self.surplus * k), tokens) if soft else k


@dataclass(frozen=True)
class ConditionalFeedForward:
    """``light(x) + weight · heavy(x)`` of x [B, S, hidden]; the weight is 0 for tokens that are not routed.

    Both branches are ``(activation(x gate_weight) * (x up_weight)) down_weight``, or without `gated`
    ``activation(x up_weight) down_weight``. The router reads the same x. There is no residual.

    Attributes:
        hidden, light, heavy: features outside, and inside of each branch.
        router: of the tokens.
        activation, gated: of both branches.
        up_bias: vectors are added to what is activated, and to what a gate multiplies.
        down_bias: a vector [hidden] is added to each branch's result.
    """

    hidden: int
    light: int
    heavy: int
    router: Router = field(default_factory=Router)
    activation: Activation = Activation.GELU_TANH
    gated: bool = True
    up_bias: bool = False
    down_bias: bool = False

    def __post_init__(self) -> None:
        _at_least_one(hidden=self.hidden, light=self.light, heavy=self.heavy)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name; weights are [in, out]."""
        found: dict[str, tuple[int, ...]] = {"router": (self.hidden,)}
        for branch, inner in (("light", self.light), ("heavy", self.heavy)):
            for name in ("gate", "up") if self.gated else ("up",):
                found[f"{branch}_{name}_weight"] = (self.hidden, inner)
                found |= {f"{branch}_{name}_bias": (inner,)} if self.up_bias else {}
            found[f"{branch}_down_weight"] = (inner, self.hidden)
            found |= {f"{branch}_down_bias": (self.hidden,)} if self.down_bias else {}
        return found

    def flops(self, batch: int, tokens: int, *, soft: bool = False) -> int:
        """Of all products, two for each multiplication; the soft top-k is not counted."""
        products = 3 if self.gated else 2
        inner = tokens * self.light + self.router.kept(tokens, soft=soft) * self.heavy
        return 2 * batch * self.hidden * (tokens + products * inner)


@dataclass(frozen=True)
class ConditionalAttention:
    """``light(x, x) + query weight · heavy(x, key weight · x)`` of x [B, S, hidden].

    Light heads see the keys within a radius. Heavy heads attend from routed tokens to tokens that another router chose,
    whose *input* is multiplied by their weights (biases are not); if a norm lies before keys, it must come before that
    product, so x is the normed state. Weights are 0 for tokens that are not routed, and these are no keys. Each branch
    has projections of its own, and both add up. A query that sees no key (all padding) gives zeros. No residual.

    Attributes:
        hidden, head_dim: features outside, and of each head.
        light_heads, heavy_heads: of the branches; a quarter and three quarters in the paper.
        queries, keys: routers; n/16 and n/8 tokens are typical.
        radius: light queries see as many keys on either side: 127 in the paper, a window of 255.
        scale: of the scores; 1 in T5.
        buckets: to scores is added a number by head and by the bucket of key minus query position, as in T5
            (arXiv 1910.10683), in both branches; 0 for none. A multiple of 4.
        farthest: from this distance on all are in the last bucket.
        bias: vectors are added to queries and values; a softmax does not see what is added to keys.
        output_bias: a vector [hidden] is added to the result of every token.
    """

    hidden: int
    head_dim: int
    light_heads: int
    heavy_heads: int
    queries: Router = field(default_factory=Router)
    keys: Router = field(default_factory=lambda: Router(fraction=1 / 8))
    radius: int = 127
    scale: float = 1.0
    buckets: int = 0
    farthest: int = 128
    bias: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        _at_least_one(hidden=self.hidden, head_dim=self.head_dim)
        _at_least_one(light_heads=self.light_heads, heavy_heads=self.heavy_heads)
        if self.radius < 0:
            raise ValueError(f"radius must not be negative, but is {self.radius}")
        if self.buckets < 0 or self.buckets % 4:
            raise ValueError(f"buckets must be a multiple of 4, not {self.buckets}")
        if self.buckets and self.farthest <= self.buckets // 4:
            raise ValueError(f"farthest must be more than {self.buckets // 4}, not {self.farthest}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name; weights are [in, out], distances are light heads first."""
        found: dict[str, tuple[int, ...]] = {"query_router": (self.hidden,), "key_router": (self.hidden,)}
        for branch, heads in (("light", self.light_heads), ("heavy", self.heavy_heads)):
            inner = heads * self.head_dim
            for name in ("query", "key", "value"):
                found[f"{branch}_{name}_weight"] = (self.hidden, inner)
                found |= {f"{branch}_{name}_bias": (inner,)} if self.bias and name != "key" else {}
            found[f"{branch}_output_weight"] = (inner, self.hidden)
        found |= {"output_bias": (self.hidden,)} if self.output_bias else {}
        if self.buckets:
            found["distances"] = (self.buckets, self.light_heads + self.heavy_heads)
        return found

    def block(self, tokens: int) -> int:
        """Light queries are taken in blocks of this many tokens, each with the blocks before and behind it."""
        return min(self.radius + 1, tokens)

    def flops(self, batch: int, tokens: int, *, soft: bool = False) -> int:
        """Of all products, two for each multiplication, hidden scores included; the soft top-k is not counted."""
        light, heavy = self.light_heads * self.head_dim, self.heavy_heads * self.head_dim
        queries, keys = self.queries.kept(tokens, soft=soft), self.keys.kept(tokens, soft=soft)
        block = self.block(tokens)
        padded = -(-tokens // block) * block
        projections = 4 * tokens * light + 2 * (queries + keys) * heavy + 2 * tokens
        scores = padded * 3 * block * light + queries * keys * heavy
        return 2 * batch * (self.hidden * projections + 2 * scores)


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
