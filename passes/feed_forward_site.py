"""What matching feed-forward blocks yields: W2·act(W1 x + b1) + b2, or W2·(act(Wg x) ⊙ Wu x), described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from passes.dataflow import Array, Value
from passes.site import Projection


@dataclass(frozen=True)
class HiddenInput:
    """What one factor of the hidden layer is made of.

    Attributes:
        projection: from the hidden states; gate and up of a fused block share it.
        columns: [hidden] the projection's column for each feature of the hidden layer, in the order in which the output
            projection reads them.
    """

    projection: Projection
    columns: Array


@dataclass(frozen=True)
class Activation:
    """The nonlinearity of a block, read by running the program's own nodes.

    Attributes:
        name: a key of `passes.nonlinearities.NONLINEARITIES`, None for one without a name there.
        of: the function itself, of an array of any shape; None where gate and up are combined otherwise than by a
            product. Exact where it has a name; else the program's nodes, in float32.
        nodes: indices of the nodes between the projections, mere layout among them.
    """

    name: str | None
    of: Callable[[Array], Array] | None = field(repr=False, compare=False)
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward block that replayed.

    It is ``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` where there is a gate. Dropout, scaling, norm and the
    residual connection around it are no part of it.

    Attributes:
        layer: the first number in the name.
        width: features of input and output.
        hidden: features of the hidden layer.
        up: what is activated, or multiplied by the activated gate.
        gate: None in a plain block.
        down: the output projection; its `output` is the block's, bias included.
        input: hidden states [..., width] that the projections read, above mere reshapes.
        residual: the value that is added to the block's output; None for a program that is nothing but the block.
        nodes: indices of everything between `input` and the output, projections and biases included.
        replay_error: largest relative error of the replay.
        owner: the door's opaque id.
    """

    name: str
    layer: int
    width: int
    hidden: int
    up: HiddenInput
    gate: HiddenInput | None
    activation: Activation
    down: Projection
    input: Value
    residual: Value | None
    nodes: tuple[int, ...]
    replay_error: float
    owner: str = ""

    @property
    def output(self) -> Value:
        return self.down.output

    @property
    def anchor(self) -> int:
        """The output projection, by which sites are ordered."""
        return self.down.node

    @property
    def cross(self) -> bool:
        """A block reads one sequence; layer selectors ask."""
        return False

    @property
    def style(self) -> str:
        """In words: "plain", "gated", or "gated, gate and up in one projection"."""
        if self.gate is None:
            return "plain"
        fused = self.gate.projection.node == self.up.projection.node
        return "gated, gate and up in one projection" if fused else "gated"
