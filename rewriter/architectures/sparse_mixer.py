"""Sparse Mixer from scratch: "Combining MoE and Mixing to build a more efficient BERT" (arXiv 2205.12399).

Learned matrices mix tokens in the lower layers, the top four attend, and in the middle four the feed-forward block is
a mixture of experts. The base model and the fast one, whose experts have half the capacity, are as the paper's code has
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from codegen.spec import LinearMixing, MixtureOfExperts, Routing, Structure
from rewriter.architectures.mixing_encoder import (
    Attention,
    EncoderSizes,
    Experts,
    FeedForward,
    Layer,
    Matrices,
    MixingEncoder,
    PretrainingModel,
)


@dataclass(frozen=True)
class SparseMixerConfig:
    """Sizes; by default Sparse Mixer Base.

    Attributes:
        sizes: around the layers.
        layers, feed_forward: their number, and features inside of each dense feed-forward block.
        structure: of the matrices that mix.
        attention_layers, heads: how many of the top layers attend, and with how many heads.
        expert_layers: how many of the middle layers have experts.
        experts, expert_hidden: their number, and features inside of each.
        routing: who chooses.
        training_capacity, capacity: capacity factors in training and in inference.
    """

    sizes: EncoderSizes = EncoderSizes(hidden=512)  # noqa: RUF009  frozen
    layers: int = 14
    feed_forward: int = 2048
    structure: Structure = Structure.DENSE
    attention_layers: int = 4
    heads: int = 8
    expert_layers: int = 4
    experts: int = 16
    expert_hidden: int = 2048
    routing: Routing = Routing.EXPERTS_CHOOSE
    training_capacity: float = 1.0
    capacity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("attention_layers", "expert_layers"):
            if not 0 <= getattr(self, name) <= self.layers:
                raise ValueError(f"{name}={getattr(self, name)} of {self.layers} layers")
        if self.sizes.hidden % self.heads:
            raise ValueError(f"heads={self.heads} do not divide hidden={self.sizes.hidden}")

    def attends(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is among the top ones that attend."""
        return layer >= self.layers - self.attention_layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is among the middle ones."""
        return self.layers - self.expert_layers <= 2 * layer < self.layers + self.expert_layers

    @property
    def expert_spec(self) -> MixtureOfExperts:
        """Of each mixture, in inference."""
        return MixtureOfExperts(
            self.sizes.hidden, self.expert_hidden, self.experts, self.routing, capacity_factor=self.capacity
        )


def fast(config: SparseMixerConfig = SparseMixerConfig()) -> SparseMixerConfig:
    """The fast variant: experts with half the capacity."""
    return replace(config, training_capacity=0.5, capacity=0.5)


def sparse_mixer_encoder(config: SparseMixerConfig = SparseMixerConfig()) -> MixingEncoder:
    """The encoder, randomly initialised, in training mode."""
    return MixingEncoder(config.sizes, [_layer(config, number) for number in range(config.layers)])


def sparse_mixer(config: SparseMixerConfig = SparseMixerConfig()) -> PretrainingModel:
    """The model for pre-training, randomly initialised, in training mode; add its `router_loss` to the loss."""
    return PretrainingModel(sparse_mixer_encoder(config), config.sizes)


def _layer(config: SparseMixerConfig, number: int) -> Layer:
    sizes = config.sizes
    matrices = LinearMixing(sizes.hidden, sizes.longest, config.structure)
    attends, experts = config.attends(number), config.has_experts(number)
    return Layer(
        sizes.hidden,
        Attention(sizes.hidden, config.heads, sizes.dropout) if attends else Matrices(matrices),
        Experts(config.expert_spec, config.training_capacity, sizes.dropout)
        if experts
        else FeedForward(sizes.hidden, config.feed_forward, sizes.dropout),
    )
