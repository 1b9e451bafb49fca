"""What matching yields: attention sites, refusals, and softmaxes that are no attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from passes.dataflow import Array, Value


@dataclass(frozen=True)
class Projection:
    """A learned linear map: ``output[..., c] = input @ W[c] + bias[c]``.

    Where the bias is added behind a split or some other layout, `output` is without it, and `bias_index` says which
    number of `bias` is added to each column.

    Attributes:
        node: index of the contraction in the flow.
        input, output: activations before, and after the bias; the last axis is the feature axis.
        weight: value name of the matrix as the contraction reads it.
        out_first: True if that matrix is [out, in], False if it is [in, out].
        bias: value name of the bias, None if there is none.
        features: number of output features (all columns, also those of other operands of a fused projection).
        bias_index: [features] flat position in `bias` for each column, -1 where nothing is added; None if they are
            alike.
        weight_axes: where the weight is no matrix, its axes, those that are summed over first: transposed so, these
            joined and all others joined, it is [in, out]; input and output may have features on as many axes.
        factor: what the product is multiplied by before the bias is added.
    """

    node: int
    input: Value
    output: Value
    weight: Value
    out_first: bool
    bias: Value | None
    features: int
    bias_index: Array | None = None
    weight_axes: tuple[int, ...] | None = None
    factor: float = 1.0

    def matrix(self, stored: Array) -> Array:
        """The stored weight as the matrix of this map, [out, in] if `out_first`, else [in, out]."""
        if self.weight_axes is not None:
            stored = stored.transpose(self.weight_axes).reshape(-1, self.features)
        return stored if self.factor == 1.0 else stored * stored.dtype.type(self.factor)

    def stored(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """A matrix [out, in] as the weight is stored, with this shape: the inverse of `matrix`."""
        rows = rows if self.factor == 1.0 else rows / rows.dtype.type(self.factor)
        if self.weight_axes is None:
            return rows if self.out_first else rows.T
        back = [self.weight_axes.index(axis) for axis in range(len(shape))]
        return rows.T.reshape([shape[axis] for axis in self.weight_axes]).transpose(back)

    def feature_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of a stored weight of this shape along which output features lie; joined, they are all of them."""
        if self.weight_axes is None:
            return (0,) if self.out_first else (len(shape) - 1,)
        count = next(
            n for n in range(1, len(shape)) if np.prod([shape[a] for a in self.weight_axes[-n:]]) == self.features
        )
        return self.weight_axes[-count:]

    def bias_positions(self, columns: Array) -> Array:
        """Where in the bias the numbers for these columns stand."""
        return columns if self.bias_index is None else self.bias_index[columns]


@dataclass(frozen=True)
class Rotary:
    """A rotation of feature pairs that depends on position only.

    Attributes:
        kind: "half" pairs (i, i + d/2), "interleaved" pairs (2i, 2i + 1), "partial" leaves features unrotated.
        partner: for each feature its partner, itself where unrotated.
    """

    kind: Literal["half", "interleaved", "partial"]
    partner: tuple[int, ...]


@dataclass(frozen=True)
class HeadGains:
    """What a norm multiplies the features of each head by, and adds to them, where heads differ in that.

    Attributes:
        gain: the numbers, of any shape; shift: likewise, None if nothing is added.
        places: [heads, dim], which of the numbers (counted flat) is each feature's; head after head.
        reader: index of the node that reads them.
    """

    gain: Value
    shift: Value | None
    places: Array
    reader: int


@dataclass(frozen=True)
class Norm:
    """A norm over each head's features (or over all of them) between projection and score, or a clamp.

    Attributes:
        kind: "rms", "layer" or "l2"; "clip" keeps each feature within bounds.
        per_head: False if it spans the features of all heads, so that heads are not independent.
        output: with `gains` behind the multiplication by them.
        gains: None where all heads are multiplied by the same numbers, or by none.
    """

    kind: Literal["rms", "layer", "l2", "clip"]
    per_head: bool
    input: Value
    output: Value
    gains: HeadGains | None = None


@dataclass(frozen=True)
class Operand:
    """How one operand of attention was made from one projection.

    Attributes:
        projection: where its elements come from.
        columns: [heads, dim] column of the projection that feeds (head, feature), the rotation's own term;
            for k and v one row per *distinct* head.
        seam: the last value on the way to the anchor that holds exactly the distinct heads; "" where heads are repeated
            before they are rotated or normalised, so that only values above that hold each once.
        seam_axes: what each axis of the seam is, major part first where one axis holds two: ("b", "h", "s", "d")
            or ("bh", "s", "d"). A query's heads may lie along two: ("b", "h", "g", "s", "d") has groups on axis "h" and
            the heads of each group on axis "g".
        path: indices of the nodes from the projection's output to the seam (without one, to the anchor), in order.
        stem: the last value that is a pure re-layout of the projection and holds exactly the distinct heads; whatever
            lies between stem and seam (norm, rotation, cache) treats heads alike and works on fewer of them.
        stem_axes: as `seam_axes`.
        stem_features: for each feature at the stem its feature at the anchor; the path may permute them in between.
        batch_first: whether the projection's rows run over tokens fastest, [batch, tokens], or [tokens, batch].
        gain: constant factor from the projection (or the norm) to the seam; 1 where a norm scales features apart.
        rotary, norm: peeled on the way; None if absent.
        past: program input concatenated before the new tokens; None without a cache.
        past_head_axis: its axis that runs over heads; None without a cache or with one head.
        reshapes: (node, axis) for nodes between stem and seam whose output shape is written out: the axis of that
            shape which counts heads, perhaps times features.
        presents: (program output, axis that runs over heads) for outputs that lie on the path.
        streams: where tokens are joined from several projections, what the others of them make, in the order of tokens:
            operands of the same heads and with the same seam.
        headwise: whether what lies between projection and anchor is not read (pooled tokens, say) and known by running
            it only: it treats every head by itself and all alike. Such an operand has no seam, and no row of the
            projection is one of its tokens.
    """

    projection: Projection
    columns: Array
    seam: Value
    seam_axes: tuple[str, ...]
    path: tuple[int, ...]
    stem: Value
    stem_axes: tuple[str, ...]
    stem_features: tuple[int, ...]
    batch_first: bool
    gain: float = 1.0
    rotary: Rotary | None = None
    norm: Norm | None = None
    past: Value | None = None
    past_head_axis: int | None = None
    presents: tuple[tuple[Value, int], ...] = ()
    reshapes: tuple[tuple[int, int], ...] = ()
    streams: tuple[Operand, ...] = ()
    headwise: bool = False

    @property
    def parts(self) -> tuple[Operand, ...]:
        """One operand for each stream of tokens, itself first."""
        return (self, *self.streams)

    @property
    def heads(self) -> int:
        return int(self.columns.shape[0])

    @property
    def dim(self) -> int:
        return int(self.columns.shape[1])


Source = Literal["", "hidden", "keys"]
"""What of a call makes a bias of scores, beyond masks and positions."""


@dataclass(frozen=True)
class Modifier:
    """One step between score and softmax.

    Attributes:
        kind: "temperature" multiplies by `value`, one number for each head, or by ``1 / value`` where `number` is -1;
            "bias" adds ``number * value``; "mask" keeps scores where the boolean `value` is True, "unmask" where it
            is False; "causal" needs no value; "softcap" is ``number * tanh(score / number)``; "sinks" are further
            columns [B, heads, S, n] that take part in the softmax and are dropped after it (always last).
        value: name of the live tensor, broadcastable to [B, heads, S, T] (or [B * heads, S, T]).
        number: factor of a bias, what masked scores become, or softcap's constant.
        windows: W where `value` is broadcastable to [B / W, W, heads, S, T] instead: the batch counts the
            windows of each image, and a mask knows which is which.
        apart: (KV, G) where `value` is broadcastable to [B, KV, G, S, T] instead: its heads lie along two axes.
        heads_first: whether `value` is [heads * B, S, T], its sequences one after the other for each head.
        source: "" where `value` is made of masks, positions and other inputs; "hidden" where hidden states reach it,
            "keys" where the attention's own keys or values do.
    """

    kind: Literal["temperature", "bias", "mask", "unmask", "causal", "softcap", "sinks"]
    value: Value | None = None
    number: float | None = None
    apart: tuple[int, int] | None = None
    windows: int | None = None
    heads_first: bool = False
    source: Source = ""


@dataclass(frozen=True)
class AttentionSite:
    """One attention that replayed: rewriting it is understood.

    Attributes:
        group: for each query head the distinct key/value head it reads.
        scale: total factor between the seams' q·k and the softmax input (before modifiers).
        modifiers: in order from score to softmax.
        output: the value that carries the attention output (per head, before heads are merged).
        output_axes: as `Operand.seam_axes`.
        merged: the first later value that holds the heads merged into one feature axis; the input of `out`.
        out: output projection, None if there is none.
        weights_read: whether something beside the product with values reads the attention weights, too, which the
            program gives out (output_attentions), say.
        scores_rounded: whether fake quantisation of the scores makes another output than scores would.
        scores, probabilities: the values entering and leaving softmax; None if the anchor is a fused operator.
        replay_error: worst relative error of the replay.
        owner: the door's opaque id.
        whole: why what lies between its projections and its merged heads is not read, "" if it is; that heads are made
            apart and alike is known by running it. Its operands are `headwise` then, scale and modifiers tell nothing.
    """

    name: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    group: tuple[int, ...]
    q: Operand
    k: Operand
    v: Operand
    scale: float
    modifiers: tuple[Modifier, ...]
    causal: bool
    cross: bool
    anchor: int
    output: Value
    output_axes: tuple[str, ...]
    merged: Value | None
    out: Projection | None
    nodes: tuple[int, ...]
    masked_rows_are_zero: bool = False
    weights_read: bool = False
    scores_rounded: bool = False
    replay_error: float = 0.0
    owner: str = ""
    whole: str = ""

    @property
    def by_blocks(self) -> bool:
        """Whether its sequences are blocks of tokens, which have an axis of their own behind the batch's."""
        return self.output_axes.count("b") > 1

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Those of queries, keys and values, of every stream of tokens."""
        return (*self.q.parts, *self.k.parts, *self.v.parts)

    @property
    def shared(self) -> tuple[tuple[str, Operand], ...]:
        """Operands of keys and values with the role of their new tensors: "k" and "v", of further streams "k1"..."""
        return tuple(
            (f"{role}{number or ''}", part)
            for role, operand in (("k", self.k), ("v", self.v))
            for number, part in enumerate(operand.parts)
        )

    @property
    def joined(self) -> bool:
        """Whether tokens of several projections are joined."""
        return any(o.streams for o in (self.q, self.k, self.v))

    @property
    def headwise(self) -> bool:
        """Whether queries, keys or values are, as `Operand.headwise`."""
        return any(o.headwise for o in (self.q, self.k, self.v))

    @property
    def interleaved(self) -> bool:
        """Whether query heads that read one key/value head are no neighbours."""
        return tuple(sorted(self.group)) != self.group

    @property
    def cached(self) -> bool:
        return self.k.past is not None

    @property
    def temperature(self) -> Modifier | None:
        """A factor that each head's scores have of their own, where that comes before all other modifiers."""
        first = self.modifiers[:1]
        return first[0] if first and first[0].kind == "temperature" else None

    @property
    def steps(self) -> tuple[str, ...]:
        """Kinds of the modifiers behind `temperature`."""
        kinds = tuple(m.kind for m in self.modifiers)
        return kinds if self.temperature is None else kinds[1:]

    @property
    def hidden_bias(self) -> Source:
        """Whether hidden states bias its scores, and if its own keys are among them."""
        found = {m.source for m in self.modifiers}
        return "keys" if "keys" in found else "hidden" if "hidden" in found else ""

    @property
    def stays(self) -> str:
        """Why no attention can be written in its place, "" if one can: it does more than that would, or tells more."""
        if self.hidden_bias == "keys":
            return "its scores get a bias that is computed from its keys"
        if self.whole:
            return f"what it computes is run and not read: {self.whole}"
        if self.headwise:
            return "its tokens are pooled, put into blocks or changed otherwise between projections and scores"
        if self.weights_read:
            return "something else reads its attention weights, too (an output, say)"
        if self.scores_rounded:
            return (
                "quantisers between its scores and the softmax change what it attends to (their range holds masked "
                "scores, say)"
            )
        return ""

    @property
    def qk_norm(self) -> bool:
        return any(o.norm is not None and o.norm.kind != "clip" for o in (self.q, self.k))

    @property
    def bent(self) -> bool:
        """Whether queries or keys at the score are no linear map of their projections: normalised or clamped."""
        return self.k.norm is not None or self.q.norm is not None


@dataclass(frozen=True)
class Refusal:
    """An attention that is there and will not be rewritten, and why, in words a person can act on."""

    name: str
    layer: int
    reason: str
    anchor: int
    owner: str = ""
    heads: int | None = None
    head_dim: int | None = None

    @staticmethod
    def of(site: AttentionSite, reason: str) -> Refusal:
        """Of an attention that is understood."""
        return Refusal(site.name, site.layer, reason, site.anchor, site.owner, site.heads, site.head_dim)


@dataclass(frozen=True)
class NotAttention:
    """A softmax that mixes no tokens."""

    name: str
    reason: str
    anchor: int
