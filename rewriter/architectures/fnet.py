"""FNet from scratch: "Mixing Tokens with Fourier Transforms" (arXiv 2105.03824).

The paper counts, with its heads for pre-training, 83 million parameters for FNet, 94 for the same model with learned
matrices, and 112 for BERT, at the base size; all three are built here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from codegen.launch.mixing_op import mix
from codegen.spec import FourierMixing, LinearMixing, TokenMixing
from rewriter.architectures.mixing_encoder import (
    Attention,
    EncoderSizes,
    FeedForward,
    Layer,
    Matrices,
    MixingEncoder,
    PretrainingModel,
)


class Mixer(Enum):
    """What mixes tokens in the layers below the top ones with attention."""

    FOURIER = "fourier"
    HARTLEY = "hartley"
    LINEAR = "linear"
    ATTENTION = "attention"


@dataclass(frozen=True)
class FNetConfig:
    """Sizes; by default FNet-Base.

    Attributes:
        sizes: around the layers.
        layers, feed_forward: their number, and features inside of each feed-forward block.
        mixer: of all layers but the top ones.
        attention_layers, heads: how many of the top layers attend (2 in the paper's hybrid), and with how many heads.
    """

    sizes: EncoderSizes = EncoderSizes()  # noqa: RUF009  frozen
    layers: int = 12
    feed_forward: int = 3072
    mixer: Mixer = Mixer.FOURIER
    attention_layers: int = 0
    heads: int = 12

    def __post_init__(self) -> None:
        if not 0 <= self.attention_layers <= self.layers:
            raise ValueError(f"attention_layers={self.attention_layers} of {self.layers} layers")
        if self.sizes.hidden % self.heads:
            raise ValueError(f"heads={self.heads} do not divide hidden={self.sizes.hidden}")


class Transform(nn.Module):
    """Fourier mixing without parameters. There is no mask."""

    def __init__(self, spec: TokenMixing) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, shown: Tensor | None) -> Tensor:
        return mix(self.spec, x, {})


def fnet_encoder(config: FNetConfig = FNetConfig()) -> MixingEncoder:
    """The encoder, randomly initialised, in training mode."""
    sizes = config.sizes
    layers = []
    for number in range(config.layers):
        attends = number >= config.layers - config.attention_layers
        mixer = _mixer(config, Mixer.ATTENTION if attends else config.mixer)
        layers.append(Layer(sizes.hidden, mixer, FeedForward(sizes.hidden, config.feed_forward, sizes.dropout)))
    return MixingEncoder(sizes, layers)


def fnet(config: FNetConfig = FNetConfig()) -> PretrainingModel:
    """The model for pre-training, randomly initialised, in training mode."""
    return PretrainingModel(fnet_encoder(config), config.sizes)


def _mixer(config: FNetConfig, kind: Mixer) -> nn.Module:
    sizes = config.sizes
    if kind is Mixer.ATTENTION:
        return Attention(sizes.hidden, config.heads, sizes.dropout)
    if kind is Mixer.LINEAR:
        return Matrices(LinearMixing(sizes.hidden, sizes.longest))
    return Transform(FourierMixing(sizes.hidden, hartley=kind is Mixer.HARTLEY))
