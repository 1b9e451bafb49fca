"""The torch body of a spec as a flat aten graph, for any batch and length, to be copied into others
(`rewriter/install/fx_body.py`).

Shape legend: B batch, S tokens, H features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from codegen.conditional import ConditionalAttention, ConditionalFeedForward
from codegen.ops.conditional_attention import torch_body as attention
from codegen.ops.conditional_feed_forward import torch_body as branches
from codegen.ops.gated_attention.torch_body import gated_attention
from codegen.ops.mixed_chunk_attention.torch_body import mixed_chunk_attention
from codegen.ops.mixture_of_experts import torch_body as experts
from codegen.spec import GatedAttention, GatedUnit, MixedChunkAttention, MixtureOfExperts
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_body import exported_body
from rewriter.install.fx_emit import HINT

BATCH, TOKENS = 3, 37
"""Sizes to export at; any would do."""

BodySpec = ConditionalAttention | ConditionalFeedForward | MixtureOfExperts | GatedUnit


def groups(spec: BodySpec, sizes: tuple[int, int]) -> int:
    """In how many groups a mixture of experts takes so many tokens: a number that is found by trying, which graphs of
    open sizes cannot."""
    return spec.groups(sizes[0] * sizes[1]) if isinstance(spec, MixtureOfExperts) else 1


class SpecBody(nn.Module):
    """Of hidden states [B, S, H], the spec's parameters in order, which tokens are shown [B, S], and the buckets of
    distances."""

    def __init__(self, spec: BodySpec, groups: int = 1) -> None:
        super().__init__()
        self.spec, self.groups = spec, groups

    def forward(self, x: Tensor, held: tuple[Tensor, ...], shown: Tensor | None, numbers: Tensor | None) -> Tensor:
        parameters = dict(zip(self.spec.shapes, held, strict=True))
        if isinstance(self.spec, ConditionalAttention):
            return attention.unguarded(self.spec, x, shown, parameters, numbers=numbers)
        if isinstance(self.spec, ConditionalFeedForward):
            return branches.unguarded(self.spec, x, shown, parameters)
        if isinstance(self.spec, GatedAttention):
            return gated_attention(self.spec, x, parameters, shown)
        if isinstance(self.spec, MixedChunkAttention):
            return mixed_chunk_attention(self.spec, x, parameters, shown)
        return experts.unguarded(self.spec, x, parameters, groups=self.groups)


@lru_cache(maxsize=32)
def spec_body(spec: BodySpec, dtype: torch.dtype, fixed: tuple[int, int] | None, shown: bool) -> GraphModule:
    """A graph of what `SpecBody` takes, as far as there is any.

    Args:
        fixed: batch and tokens, None for any.

    Raises UnsupportedModel where torch.export fixes sizes that are to be open.
    """
    batch, tokens = fixed or (BATCH, TOKENS)
    x = torch.zeros(batch, tokens, spec.hidden, dtype=dtype)
    held = tuple(torch.zeros(shape, dtype=dtype) for shape in spec.shapes.values())
    visible = torch.ones(batch, tokens, dtype=torch.bool) if shown else None
    numbers = attention.numbers_of(spec) if isinstance(spec, ConditionalAttention) and spec.buckets else None
    # how many tokens are routed is no number that exporters can bound, so sizes are open without a promise of any
    open_sizes = None if fixed else {0: Dim.AUTO, 1: Dim.AUTO}
    free: dict[str, Any] = {
        "x": open_sizes, "held": tuple(None for _ in held), "shown": open_sizes if shown else None, "numbers": None,
    }  # fmt: skip
    body = SpecBody(spec, groups(spec, fixed) if fixed else 1)
    graph = exported_body(body, (x, held, visible, numbers), free)
    sizes = next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"].shape[:2]
    if not fixed and any(isinstance(n, int) for n in sizes):
        raise UnsupportedModel(f"torch.export fixed the sizes {tuple(sizes)} of a body's hidden states", hint=HINT)
    return graph
