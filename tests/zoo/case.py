"""What a zoo case is: how to build it, feed it, read its output and make its K/V heads mergeable without loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
HeadViews = Callable[[nn.Module], Iterable[Tensor]]
"""Every key and value parameter of a module as a writable view ``[kv_heads, head_dim, ...]``."""


def main_output(result: Any) -> Tensor:
    """The one tensor that stands for a model's result: logits, the last hidden state, or the first element."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(result, Tensor):
        return result
    return main_output(result[0])


@dataclass(frozen=True)
class ZooCase:
    """One small model of the zoo, in float32 and eval mode, every parameter non-trivial.

    Attributes:
        name: unique, safe in file names and pytest ids.
        build: returns a fresh module; two calls give equal weights.
        inputs: ``(batch, length, seed)`` to keyword tensors. Row 0 is never padded; odd rows are padded on the
            right where the model takes a mask. ``length`` is ignored by models of a fixed size.
        head_views: see `HeadViews`; what `tie` and `perturb` write through.
        heads: query heads of every attention.
        kv_heads: key/value heads of every attention.
        sites: how many attentions the model has (refusable ones included).
        causal: true when every self-attention of the model's (only or decoder) stack is causal.
        axes: per input, its dynamic axes by name, for exporters.
        tags: "hf", "torch", "none" (no attention), "refuse" (must not be rewritten), "extra", "wide",
            "encoder-decoder", ...
        refused: how many of the sites must be refused; for "wide" cases.
        refusal: what the reason of each refusal must contain.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    head_views: HeadViews
    heads: int
    kv_heads: int
    sites: int
    causal: bool
    axes: Mapping[str, Mapping[int, str]]
    tags: frozenset[str] = field(default_factory=frozenset)
    refused: int = 0
    refusal: str = ""

    def tie(self, module: nn.Module, kv_heads: int) -> None:
        """Make K/V heads equal within each contiguous group: the module becomes a lossless gqa-`kv_heads` twin."""
        if self.kv_heads % kv_heads:
            raise ValueError(f"{self.name}: {kv_heads} does not divide {self.kv_heads}")
        with torch.no_grad():
            for view in self.head_views(module):
                groups = torch.unflatten(view, 0, (kv_heads, -1))
                groups.copy_(groups[:, :1].clone().expand_as(groups))

    def perturb(self, module: nn.Module, amount: float = 0.5) -> None:
        """Undo `tie` by adding noise to the last K/V head of every attention: the control of an equality test."""
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for view in self.head_views(module):
                view[-1] += amount * view[-1].std() * torch.randn(view[-1].shape, generator=generator)

    def run(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """The main output of `module` on `inputs`, without gradients."""
        with torch.no_grad():
            return main_output(module(**inputs))
