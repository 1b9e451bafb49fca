"""The module with a light and a routed heavy branch in a dense feed-forward block's place.

Shape legend: B batch, S tokens, H features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from codegen.activation import Activation
from codegen.conditional import ConditionalFeedForward, Router
from codegen.launch.feed_forward_op import conditional
from rewriter.install.mimicry import mimic_attributes


class ConditionalBlock(nn.Module):
    """Called like the block it replaces: hidden states in, hidden states out. Padding is not told apart.

    In training mode weights of routed tokens come from a soft top-k, so that the router learns; else they are 1.

    Attributes:
        kernels: which kernels compute the heavy branch; see `codegen.launch.feed_forward_op.mixture`.
    """

    def __init__(
        self, spec: ConditionalFeedForward, parameters: Mapping[str, nn.Parameter], *, batch_first: bool
    ) -> None:
        """`parameters` by the names of `ConditionalFeedForward.shapes`; `batch_first` tells [B, S, H] from
        [S, B, H]."""
        super().__init__()
        self.spec, self.batch_first = spec, batch_first
        self.kernels = "auto"
        for name in spec.shapes:
            self.register_parameter(name, parameters[name])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] of [..., H]: tokens are routed within each sequence; of two axes, among all."""
        if hidden_states.dim() not in (2, 3):
            raise TypeError(
                f"hidden states of {hidden_states.dim()} axes were not in use when this block was rewritten"
            )
        turned = hidden_states.dim() == 3 and not self.batch_first
        x = hidden_states[None] if hidden_states.dim() == 2 else hidden_states
        x = x.transpose(0, 1) if turned else x
        held = dict(self.named_parameters(recurse=False))
        found = conditional(self.spec, x, held, soft=self.training, kernels=self.kernels)
        return (found.transpose(0, 1) if turned else found).reshape(hidden_states.shape)

    def mimic(self, original: nn.Module) -> None:
        """Take over the plain attributes that surrounding code may read off the original."""
        mimic_attributes(self, original)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON; `rebuild` reads it."""
        spec = asdict(self.spec) | {"activation": self.spec.activation.value}
        return {"spec": spec, "batch_first": self.batch_first}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.describe()["spec"].items())


def rebuild(description: Mapping[str, Any], original: nn.Module) -> ConditionalBlock:
    """The module that `describe` described, with empty weights, in place of a freshly built `original`.

    Raises KeyError, TypeError or ValueError if the description is broken.
    """
    told = dict(description["spec"])
    told |= {"router": Router(**told["router"]), "activation": Activation(told["activation"])}
    spec = ConditionalFeedForward(**told)
    like = next(original.parameters())
    empty = {n: nn.Parameter(like.new_empty(s), requires_grad=like.requires_grad) for n, s in spec.shapes.items()}
    return ConditionalBlock(spec, empty, batch_first=bool(description["batch_first"]))


def conditional_blocks(model: nn.Module) -> dict[str, ConditionalBlock]:
    """The blocks with two branches, by dotted path, each once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ConditionalBlock)}
