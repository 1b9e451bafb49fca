"""The gated attention unit in a dense feed-forward block's place, behind a unit in an attention's.

A feed-forward block is called with hidden states alone. Where the attention's unit is called with a cache, it tells the
unit behind it, which then goes on from a state of its own kept with that cache.

Shape legend: B batch, S tokens, H features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from codegen.launch.mixing_op import mix
from codegen.ops.token_mixing import from_json, to_json
from codegen.spec import GatedAttention, GatedUnit, MixedChunkAttention
from rewriter.errors import UnsupportedModel
from rewriter.install.mimicry import mimic_attributes
from rewriter.install.token_mixer import TokenMixer
from rewriter.install.unit_cache import Step, resumed

NO_UNIT = "the attention before it did not become a gated unit, whose cache it would go on from"


class UnitBlock(nn.Module):
    """Called like the block it replaces: hidden states in, hidden states out. Padding is not told apart.

    Attributes:
        behind: dotted path of the unit in the place of the attention before it, "" where caches are of no concern.
        step: what that unit has read of a cache since this block was last called.
        kernels: which kernels compute it; see `codegen.launch.mixing_op.mix`.
    """

    def __init__(
        self, spec: GatedUnit, parameters: Mapping[str, nn.Parameter], *, batch_first: bool, behind: str = ""
    ) -> None:
        """`parameters` by the names of the spec's `shapes`; `batch_first` tells [B, S, H] from [S, B, H]."""
        super().__init__()
        self.spec, self.batch_first, self.behind = spec, batch_first, behind
        self.kernels = "auto"
        self.step: Step | None = None
        for name in spec.shapes:
            self.register_parameter(name, parameters[name])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H] of [B, S, H], or of one sequence [S, H].

        Raises TypeError for other sizes than those of the attention's unit where that has a cache.
        """
        step, self.step = self.step, None
        if hidden_states.dim() not in (2, 3):
            raise TypeError(f"hidden states of {hidden_states.dim()} axes were not in use when this was rewritten")
        turned = hidden_states.dim() == 3 and not self.batch_first
        x = hidden_states[None] if hidden_states.dim() == 2 else hidden_states
        x = x.transpose(0, 1) if turned else x
        held = dict(self.named_parameters(recurse=False))
        if step is None:
            found = mix(self.spec, x, held, kernels=self.kernels)
        else:
            if step.tokens != x.shape[:2]:
                raise TypeError("the block was called with other tokens than the attention before it")
            found = resumed(self, self.spec, step, x, held)
        return (found.transpose(0, 1) if turned else found).reshape(hidden_states.shape)

    def mimic(self, original: nn.Module) -> None:
        """Take over the plain attributes that surrounding code may read off the original."""
        mimic_attributes(self, original)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON; `rebuild` reads it."""
        return {"spec": to_json(self.spec), "batch_first": self.batch_first, "behind": self.behind}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in to_json(self.spec).items())


def rebuild(description: Mapping[str, Any], original: nn.Module) -> UnitBlock:
    """The module that `describe` described, with empty weights, in place of a freshly built `original`.

    Raises KeyError, TypeError or ValueError if the description is broken.
    """
    spec = from_json(description["spec"])
    if not isinstance(spec, (GatedAttention, MixedChunkAttention)):
        raise ValueError("a feed-forward block's place can be taken by a gated unit, not by another mix")
    like = next(original.parameters())
    empty = {n: nn.Parameter(like.new_empty(s), requires_grad=like.requires_grad) for n, s in spec.shapes.items()}
    return UnitBlock(
        spec, empty, batch_first=bool(description["batch_first"]), behind=str(description.get("behind", ""))
    )


def unit_blocks(model: nn.Module) -> dict[str, UnitBlock]:
    """The units in feed-forward blocks' places, by dotted path, each once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, UnitBlock)}


def follow(model: nn.Module) -> None:
    """Let units of attentions tell those behind them of caches.

    Raises UnsupportedModel if what a block is said to be behind is no such unit, AttributeError if it is not there.
    """
    for path, block in unit_blocks(model).items():
        if not block.behind:
            continue
        unit = model.get_submodule(block.behind)
        if not isinstance(unit, TokenMixer):
            raise UnsupportedModel(f"{path}: {NO_UNIT}")
        if not any(block is known for known in unit.followers):
            unit.followers.append(block)
