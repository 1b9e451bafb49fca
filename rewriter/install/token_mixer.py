"""The module that mixes tokens in an attention's place, behind the original's own call.

Shape legend: B batch, S tokens, E model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from codegen.conditional import ConditionalAttention
from codegen.launch.mixing_op import mix
from codegen.ops.token_mixing import from_json, to_json
from codegen.spec import GatedAttention, MixedChunkAttention, TokenMixing
from rewriter.install.mimicry import mimic_attributes
from rewriter.install.mixer import stripped
from rewriter.install.padding import shown_tokens
from rewriter.install.protocol import Protocol
from rewriter.install.unit_cache import advanced, resumed


class TokenMixer(nn.Module):
    """A mix that is called and answers like the attention module it replaces.

    Masks and score biases that a caller gives have no effect, as the mix has no scores: padded tokens take part.
    Conditional attention alone heeds padding, and routes softly in training mode. There are no attention weights: where
    the original returned them there is None. In training mode nothing is dropped.
    """

    def __init__(
        self,
        spec: TokenMixing,
        protocol: Protocol,
        parameters: Mapping[str, nn.Parameter],
        *,
        input_norm: nn.Module | None = None,
        output_norm: nn.Module | None = None,
        position: nn.Module | None = None,
    ) -> None:
        """`parameters` are those of the spec's `shapes`; `input_norm` and `output_norm` are what the original
        normalised its input and its result with; `position` computes the score bias that it handed on, with
        ``compute_bias(S, S, device=...)``."""
        super().__init__()
        self.spec, self.protocol = spec, protocol
        self.kernels = "auto"
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.input_norm, self.output_norm, self.position = input_norm, output_norm, position
        self.followers: list[Any] = []  # units in feed-forward blocks' places, which are told of the cache

    @property
    def __signature__(self) -> inspect.Signature:
        return self.protocol.signature()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the replaced module took and returned.

        Raises TypeError for arguments that were not in use when the module was rewritten, and for what no mix over all
        tokens can do: another sequence to attend to, a cache, a causal order, attention weights.
        """
        call = self.protocol.read(args, kwargs)
        hidden: Tensor = call["hidden"]
        _require_mixable(call, hidden, causal=self._causal)
        x = hidden if self.input_norm is None else self.input_norm(hidden)
        turned = hidden.dim() == 3 and not self.protocol.batch_first
        batched = x[None] if hidden.dim() == 2 else x.transpose(0, 1) if turned else x
        parameters: dict[str, Tensor] = {name: getattr(self, name) for name in self.spec.shapes}
        mixed = self._mixed(batched, parameters, call)
        output = mixed[0] if hidden.dim() == 2 else mixed.transpose(0, 1) if turned else mixed
        output = output + hidden if self.protocol.adds_input else output
        output = output if self.output_norm is None else self.output_norm(output)
        if self.protocol.bare:
            return output
        return tuple(self._element(name, call, output) for name in self.protocol.returns)

    @property
    def _causal(self) -> bool:
        return isinstance(self.spec, (GatedAttention, MixedChunkAttention)) and self.spec.causal

    def _mixed(self, x: Tensor, parameters: Mapping[str, Tensor], call: Mapping[str, Any]) -> Tensor:
        cache = call.get("cache")
        for follower in self.followers:
            follower.step = None
        if isinstance(self.spec, ConditionalAttention):
            shown = shown_tokens(self.protocol, call, *x.shape[:2])
            return mix(self.spec, x, parameters, shown=shown, soft=self.training)
        if cache is not None and isinstance(self.spec, (GatedAttention, MixedChunkAttention)):
            step = advanced(self, cache, x)
            for follower in self.followers:
                follower.step = step
            return resumed(self, self.spec, step, x, parameters)
        return mix(self.spec, x, parameters, kernels=self.kernels)

    def _element(self, name: str, call: Mapping[str, Any], output: Tensor) -> Any:
        if name == "output":
            return output
        if name == "bias":
            return call["bias"] if call.get("bias") is not None else self._position_bias(output)
        if name.startswith("argument:"):
            argument = name.removeprefix("argument:")
            return call.get(self.protocol.roles.get(argument, argument))
        return None

    def _position_bias(self, output: Tensor) -> Any:
        if self.position is None:
            return None
        compute: Any = self.position.compute_bias
        length = output.shape[1 if self.protocol.batch_first else 0]
        return compute(length, length, device=output.device, past_seen_tokens=0)

    def mimic(self, original: nn.Module) -> None:
        """Take over the plain attributes that surrounding code may read off the original."""
        mimic_attributes(self, original)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON; `rebuild` reads it."""
        return {
            "spec": to_json(self.spec),
            "protocol": self.protocol.to_json(),
            "position": self.position is not None,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in to_json(self.spec).items())


class Absorbed(nn.Identity):
    """Stands where an output projection stood that the mix took over together with the attention."""

    def mimic(self, original: nn.Module) -> None:
        """Take over the plain attributes that surrounding code may read off the original."""
        mimic_attributes(self, original)


def rebuild(description: Mapping[str, Any], original: nn.Module) -> TokenMixer:
    """The mixer that `describe` described, with empty weights, in place of a freshly built `original`.

    Raises KeyError, TypeError, ValueError or AttributeError if the description is broken or fits another module.
    """
    spec = from_json(description["spec"])
    protocol = Protocol.from_json(description["protocol"])
    like = next(original.parameters())
    parameters = {
        name: nn.Parameter(like.new_empty(shape), requires_grad=like.requires_grad)
        for name, shape in spec.shapes.items()
    }
    position = stripped(original) if description["position"] else None
    return TokenMixer(spec, protocol, parameters, position=position, **norms(protocol, original))


def norms(protocol: Protocol, original: nn.Module) -> dict[str, Any]:
    """The original's norms that a mixer in its place takes over."""
    paths = {"input_norm": protocol.input_norm, "output_norm": protocol.output_norm}
    return {role: None if path is None else original.get_submodule(path) for role, path in paths.items()}


def token_mixers(model: nn.Module) -> dict[str, TokenMixer]:
    """The mixing modules of a model by dotted path, each once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TokenMixer)}


def absorbed(model: nn.Module) -> list[str]:
    """Paths at which an output projection stood that is part of a mix now."""
    return [path for path, module in model.named_modules() if isinstance(module, Absorbed)]


def _require_mixable(call: Mapping[str, Any], hidden: Tensor, *, causal: bool) -> None:
    context = call.get("context")
    if context is not None and context is not hidden:
        raise TypeError("attention to another sequence was replaced by a mix of one")
    if call.get("cache") is not None and not causal:
        raise TypeError("a mix of all tokens has no key/value cache; call the model with use_cache=False")
    if call.get("is_causal") and not causal:
        raise TypeError("a mix of all tokens has no causal order")
    if call.get("wants_weights"):
        raise TypeError("a mix of tokens has no attention weights")
