"""What a kernel must compute, as integers, enums and one small expression tree.

Specs are the contract between the floors: targets produce them, doors out and templates consume them.
Nothing in a spec is text that came from a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from codegen.activation import Activation as Activation
from codegen.conditional import ConditionalAttention
from codegen.sight import Pattern


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Softmax attention whose `heads` query heads share `kv_heads` key/value heads (arXiv 2305.13245).

    Operands are q [B, heads, S, head_dim], k [B, kv_heads, T, head_dim], v [B, kv_heads, T, value_dim]
    and, when `bias` is set, an additive score bias broadcastable to [B, heads, S, T]; query head h reads
    key/value head ``h // (heads // kv_heads)``. The result is [B, heads, S, value_dim].

    Attributes:
        scale: multiplies q·k before softcap and bias.
        causal: query i sees keys j <= i + (T - S); the mask is aligned to the end.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the bias; None for none.
        masked_rows_are_zero: a row whose keys are all masked gives zeros instead of NaN.
        sinks: further score columns [B, heads, S, n] take part in the softmax and are dropped after it.
        pattern: which keys each head's queries see, beside `causal` and `bias`; empty for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = False
    bias: bool = False
    softcap: float | None = None
    masked_rows_are_zero: bool = False
    sinks: bool = False
    pattern: Pattern = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class DecoupledAttention:
    """Softmax attention whose keys and values have different numbers of heads (DHA, arXiv 2406.06567).

    Operands are q and v as in `GroupedQueryAttention`, but k [B, key_heads, T, head_dim] and v [B, value_heads, T,
    value_dim]; query head h reads key head ``h // (heads // key_heads)`` and value head
    ``h // (heads // value_heads)``. That is what a cache holds, too.

    Attributes:
        attention: as which it is computed: its `kv_heads` is the least common multiple of both numbers, to which keys
            and values are repeated.
    """

    attention: GroupedQueryAttention
    key_heads: int
    value_heads: int

    def __post_init__(self) -> None:
        for name in ("key_heads", "value_heads"):
            if getattr(self, name) < 1 or self.attention.heads % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} does not divide heads={self.attention.heads}")
        if self.attention.kv_heads != math.lcm(self.key_heads, self.value_heads):
            raise ValueError(
                f"kv_heads={self.attention.kv_heads} is not the least common multiple of {self.key_heads} and "
                f"{self.value_heads}"
            )


class FeatureMap(Enum):
    """What queries and keys become where a product of features stands in for an exponentiated score."""

    LEARNED = "learned"
    """``softmax(W x), softmax(-W x)`` side by side, W learned for each head (Hedgehog, arXiv 2402.04347)."""
    ELU1 = "elu1"
    """``elu(x) + 1`` (arXiv 2006.16236)."""
    FAVOR = "favor+"
    """``exp(w x - |x|^2 / 2)`` for orthogonal random w: an unbiased estimate of ``exp(q k)`` (arXiv 2009.14794)."""


@dataclass(frozen=True)
class LinearAttention:
    """Attention that is a softmax nearby and a product of features beyond, normalised together (arXiv 2410.10254).

    Sequences are cut into chunks. A query's near keys are those of its own chunk and of the one before, where it is
    not causal also of the one behind; far keys are all others that it may see. With s the scores ``scale * q k``, m
    the greatest near one and f the features, a near key has the weight ``exp(s - m)``, a far one
    ``gain * f(q) f(k)``, with FAVOR+ ``gain * exp(-m) * f(q) f(k)``; weights are divided by their sum. Features read
    ``x * sqrt(scale) * head_dim ** (1/4)``, which is x at the usual scale, those of FAVOR+ ``x * sqrt(scale)``.

    Operands are q, k and v as in `GroupedQueryAttention`, the queries being the last S of T positions, and those of
    `shapes`. Keys may be hidden from all queries; a query that sees none gives zeros.

    Attributes:
        attention: heads, scale and order; without anything else that changes scores.
        chunk: tokens of a chunk.
        features: the feature map.
    """

    attention: GroupedQueryAttention
    chunk: int = 64
    features: FeatureMap = FeatureMap.LEARNED

    def __post_init__(self) -> None:
        plain = self.attention
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {self.chunk}")
        if plain.pattern or plain.softcap is not None or plain.sinks or plain.bias:
            raise ValueError("features know no pattern, softcap, sinks or bias")
        if not plain.scale > 0:
            raise ValueError(f"scale must be positive, not {plain.scale}")

    @property
    def directions(self) -> int:
        """Random directions of FAVOR+ for each key/value head: d log d for d features, as in the published code."""
        return max(int(self.attention.head_dim * math.log(self.attention.head_dim)), 1)

    @property
    def width(self) -> int:
        """Features of a head."""
        sizes = {FeatureMap.LEARNED: 2 * self.attention.head_dim, FeatureMap.FAVOR: self.directions}
        return sizes.get(self.features, self.attention.head_dim)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name: ``log_gain`` [heads], and what the features need."""
        heads, groups, size = self.attention.heads, self.attention.kv_heads, self.attention.head_dim
        found: dict[str, tuple[int, ...]] = {"log_gain": (heads,)}
        if self.features is FeatureMap.LEARNED:
            found |= {"query_map": (heads, size, size), "key_map": (groups, size, size)}
        elif self.features is FeatureMap.FAVOR:
            found["directions"] = (groups, self.directions, size)
        return found

    def flops(self, batch: int, tokens: int) -> int:
        """Of all products, two for each multiplication, every chunk taken for a whole one."""
        plain, padded = self.attention, -(-tokens // self.chunk) * self.chunk
        near = plain.heads * self.chunk * (2 if plain.causal else 3) * (plain.head_dim + plain.value_dim)
        far = (plain.heads + plain.kv_heads) * self.width * plain.value_dim
        columns = {FeatureMap.LEARNED: plain.head_dim, FeatureMap.FAVOR: self.directions}.get(self.features, 0)
        return 2 * batch * padded * (near + far + (plain.heads + plain.kv_heads) * plain.head_dim * columns)


@dataclass(frozen=True)
class FourierMixing:
    """Tokens mixed by a discrete Fourier transform over sequence and features (FNet, arXiv 2105.03824).

    The operand x is [B, S, hidden], S any length; the result, of the same shape, is ``Re F`` where F is the
    unnormalised two-dimensional transform of each sequence, or ``Re F - Im F`` (Hartley, arXiv 2205.12399). There is
    no mask: every token takes part in every result.

    Attributes:
        hidden: number of features.
        hartley: the Hartley transform instead of the Fourier transform's real part.
        gain: the result is multiplied by a vector [hidden].
        bias: a vector [hidden] is added after that.
    """

    hidden: int
    hartley: bool = False
    gain: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, not {self.hidden}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name."""
        return {name: (self.hidden,) for name in ("gain", "bias") if getattr(self, name)}

    @property
    def half(self) -> int:
        """Feature frequencies that the others mirror."""
        return self.hidden // 2 + 1

    def flops(self, batch: int, tokens: int) -> int:
        """Of a fast transform, by the usual count: 5 n log2 n for n complex numbers, half of it for real ones."""
        points = batch * tokens * self.hidden
        return round(2.5 * points * math.log2(max(tokens * self.hidden, 2)))


class Structure(Enum):
    """What a mixing matrix may be, and the parameters that it is made of."""

    DENSE = "dense"
    """Any N x N matrix."""
    CIRCULANT = "circulant"
    """``M[i, j] = c[(i - j) mod N]`` of a vector [N]."""
    TOEPLITZ = "toeplitz"
    """``M[i, j] = v[N - 1 + j - i]`` of a vector [2 N - 1]."""


@dataclass(frozen=True)
class LinearMixing:
    """Tokens mixed by one matrix and features by another (Sparse Mixer, arXiv 2205.12399).

    The operand x is [B, S, hidden], S at most `tokens`; shorter sequences use the first S rows and columns of the
    matrix over tokens. With T that matrix, F that over features, a sequence becomes ``T x F`` where both are dense, and
    ``T x F'`` (F transposed) where they have a structure, as in the paper's code. There is no mask: every token takes
    part in every result.

    Attributes:
        hidden: number of features.
        tokens: the longest sequence.
        structure: of both matrices.
        bias: a vector [hidden] is added to every token.
    """

    hidden: int
    tokens: int
    structure: Structure = Structure.DENSE
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape by its name: ``sequence``, ``features``, and ``bias`` if there is one."""
        found = {"sequence": self.stored(self.tokens), "features": self.stored(self.hidden)}
        return found | ({"bias": (self.hidden,)} if self.bias else {})

    def stored(self, size: int) -> tuple[int, ...]:
        """The shape of what a matrix of this size is made of."""
        if self.structure is Structure.DENSE:
            return (size, size)
        return (size,) if self.structure is Structure.CIRCULANT else (2 * size - 1,)

    def flops(self, batch: int, tokens: int) -> int:
        """Of both products, two for each multiplication."""
        return 2 * batch * tokens * self.hidden * (tokens + self.hidden)


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


class PositionBias(Enum):
    """What is added to a gated attention's scores by the distance of two tokens.

    TOEPLITZ is a number for each distance; ROTARY the product of two learned vectors, each rotated by its token's
    position, which serves any length.
    """

    NONE = "none"
    TOEPLITZ = "toeplitz"
    ROTARY = "rotary"


@dataclass(frozen=True)
class GatedAttention:
    """A gated attention unit without norm and residual (GAU, arXiv 2202.10447): [B, S, hidden] to [B, S, hidden].

    With gate U and value V of `expanded` features, base Z of `base` features, and for each token i a query
    ``scale[0] * z + offset[0]`` and a key ``scale[1] * z + offset[1]``, both rotated by its position::

        A = relu(q kᵀ / n + bias)²,   out = (U ⊙ A V) W_out + b_out

    There is no softmax; hidden keys are dropped after the square. The paper's code divides by the current length; a
    causal spec divides by a constant instead, or a prefix's outputs would change as a sequence grows.

    Attributes:
        hidden: features of input and output.
        expanded: features of gate and value, 2 * hidden in the paper.
        base: features of z, 128 in the paper; even where rotated.
        length: the divisor n; None for the number of tokens at hand (bidirectional only).
        causal: token i sees tokens j <= i.
        bias: what is added to the scores.
        span: for TOEPLITZ, distances of magnitude below this have numbers of their own; longer ones have the last's.
        rotary: queries and keys are rotated, features (i, i + base / 2) by position * 10000^(-2 i / base).
        gate, value, latent: activations of U, V and Z, all SiLU in the paper, None for none. With others a unit can be
            a trained feed-forward exactly.
    """

    hidden: int
    expanded: int
    base: int = 128
    length: int | None = None
    causal: bool = False
    bias: PositionBias = PositionBias.NONE
    span: int = 512
    rotary: bool = True
    gate: Activation | None = Activation.SILU
    value: Activation | None = Activation.SILU
    latent: Activation | None = Activation.SILU

    heads: ClassVar[int] = 2
    """Scale and offset pairs: query and key."""

    def __post_init__(self) -> None:
        _check_gated(self.hidden, self.expanded, self.base, self.rotary or self.bias is PositionBias.ROTARY)
        if self.causal and self.length is None:
            raise ValueError("a causal unit divides by a constant: give length")
        if (self.length is not None and self.length < 1) or self.span < 1:
            raise ValueError("length and span must be at least 1")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the operands beside x, by role; rows of the expansion are gate, value, base. Weights are [out, in]."""
        return _gated_shapes(self)

    def flops(self, batch: int, tokens: int) -> int:
        """Of all products, two for each multiplication; hidden scores are counted too."""
        return _projection_flops(self, batch * tokens) + 2 * batch * tokens**2 * (self.base + self.expanded)


@dataclass(frozen=True)
class MixedChunkAttention:
    """A gated attention unit in linear time (FLASH, arXiv 2202.10447): [B, S, hidden] to [B, S, hidden].

    As `GatedAttention`, with four heads of scale and offset: quadratic query, linear query, quadratic key, linear key.
    Within each chunk of C tokens A is relu(q kᵀ / C + bias)², masked after the square where causal. Between chunks
    there is no activation: to A V is added a product of linear queries with the sum of kᵀ v over all preceding chunks
    (causal; the first chunk gets zero), or over all tokens divided by their number. The gate applies to both together.

    Attributes (others as in `GatedAttention`):
        chunk: C, 256 in the paper. Any length is allowed, the last chunk may be a part.
        averaged: causal only: the sum over preceding chunks is divided by the number of their tokens, as the paper's
            code does, whose mask's rows are divided by their sums; else by C alone, as the paper's equation and ports
            have it.
        span: for TOEPLITZ, at most C is of use.
    """

    hidden: int
    expanded: int
    base: int = 128
    chunk: int = 256
    causal: bool = False
    averaged: bool = True
    bias: PositionBias = PositionBias.NONE
    span: int = 256
    rotary: bool = True
    gate: Activation | None = Activation.SILU
    value: Activation | None = Activation.SILU
    latent: Activation | None = Activation.SILU

    heads: ClassVar[int] = 4

    def __post_init__(self) -> None:
        _check_gated(self.hidden, self.expanded, self.base, self.rotary or self.bias is PositionBias.ROTARY)
        if self.chunk < 1 or self.span < 1:
            raise ValueError("chunk and span must be at least 1")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the operands beside x, as in `GatedAttention`."""
        return _gated_shapes(self)

    def flops(self, batch: int, tokens: int) -> int:
        """Of all products, two for each multiplication, the last chunk taken for a whole one."""
        padded = -(-tokens // self.chunk) * self.chunk
        within = 2 * batch * padded * self.chunk * (self.base + self.expanded)
        return _projection_flops(self, batch * tokens) + within + 4 * batch * padded * self.base * self.expanded


def _check_gated(hidden: int, expanded: int, base: int, rotated: bool) -> None:
    if min(hidden, expanded, base) < 1:
        raise ValueError("hidden, expanded and base must be at least 1")
    if rotated and base % 2:
        raise ValueError(f"base must be even where it is rotated, not {base}")


def _projection_flops(spec: GatedAttention | MixedChunkAttention, rows: int) -> int:
    return 2 * rows * spec.hidden * (3 * spec.expanded + spec.base)


def _gated_shapes(spec: GatedAttention | MixedChunkAttention) -> dict[str, tuple[int, ...]]:
    rows = 2 * spec.expanded + spec.base
    shapes: dict[str, tuple[int, ...]] = {
        "expand_weight": (rows, spec.hidden),
        "expand_bias": (rows,),
        "scale": (spec.heads, spec.base),
        "offset": (spec.heads, spec.base),
        "out_weight": (spec.hidden, spec.expanded),
        "out_bias": (spec.hidden,),
    }
    if spec.bias is PositionBias.TOEPLITZ:
        shapes["distances"] = (2 * spec.span - 1,)  # of query minus key, from 1 - span up
    elif spec.bias is PositionBias.ROTARY:
        shapes |= {"query_vector": (spec.base,), "key_vector": (spec.base,)}
    return shapes


GatedUnit = GatedAttention | MixedChunkAttention
"""A map of hidden states that is an attention and a feed-forward in one."""

TokenMixing = FourierMixing | LinearMixing | GatedUnit | ConditionalAttention
"""What takes the place of an attention with all its projections."""

Spec = GroupedQueryAttention | DecoupledAttention | LinearAttention | TokenMixing
"""Everything that can take an attention's place."""
