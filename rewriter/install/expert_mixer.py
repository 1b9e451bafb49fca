"""The module that routes tokens to experts in a dense feed-forward block's place.

Shape legend: B batch, S tokens, H features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from codegen.launch.feed_forward_op import mixture
from codegen.ops.mixture_of_experts.torch_body import Routed
from codegen.spec import Activation, MixtureOfExperts, Routing
from rewriter.install.mimicry import mimic_attributes


class ExpertMixer(nn.Module):
    """A mixture of experts that is called like the block it replaces: hidden states in, hidden states out.

    Attributes:
        kernels: which kernels compute the experts; see `codegen.launch.feed_forward_op.mixture`.
        last: in training mode what the last call gave, with the router's losses: add ``last.loss`` to the model's.
    """

    def __init__(self, spec: MixtureOfExperts, parameters: Mapping[str, nn.Parameter]) -> None:
        """`parameters` by the names of `MixtureOfExperts.shapes`."""
        super().__init__()
        self.spec = spec
        self.kernels = "auto"
        self.last: Routed | None = None
        for name in spec.shapes:
            self.register_parameter(name, parameters[name])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] of [..., H]: of more than three axes, all but the last one run over tokens."""
        x = hidden_states if hidden_states.dim() == 3 else hidden_states.reshape(1, -1, self.spec.hidden)
        found = mixture(self.spec, x, dict(self.named_parameters(recurse=False)), kernels=self.kernels)
        self.last = found if self.training else None
        return found.output.reshape(hidden_states.shape)

    def mimic(self, original: nn.Module) -> None:
        """Take over the plain attributes that surrounding code may read off the original."""
        mimic_attributes(self, original)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON; `rebuild` reads it."""
        spec = asdict(self.spec)
        return {"spec": {**spec, "routing": self.spec.routing.value, "activation": self.spec.activation.value}}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.describe()["spec"].items())


def rebuild(description: Mapping[str, Any], original: nn.Module) -> ExpertMixer:
    """The module that `describe` described, with empty weights, in place of a freshly built `original`.

    Raises KeyError, TypeError or ValueError if the description is broken.
    """
    told = dict(description["spec"])
    told |= {"routing": Routing(told["routing"]), "activation": Activation(told["activation"])}
    spec = MixtureOfExperts(**told)
    like = next(original.parameters())
    return ExpertMixer(
        spec, {n: nn.Parameter(like.new_empty(s), requires_grad=like.requires_grad) for n, s in spec.shapes.items()}
    )


def expert_mixers(model: nn.Module) -> dict[str, ExpertMixer]:
    """The mixtures of experts that replaced blocks, by dotted path, each once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ExpertMixer)}


def parameters_like(tensors: Mapping[str, Any], like: Tensor) -> dict[str, nn.Parameter]:
    """Arrays as parameters of `like`'s dtype, on its device."""
    return {
        name: nn.Parameter(
            torch.from_numpy(array.copy()).to(dtype=like.dtype, device=like.device), requires_grad=like.requires_grad
        )
        for name, array in tensors.items()
    }
