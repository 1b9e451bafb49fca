"""What makes a generated attention module linear: its feature maps, and what it makes of a call's mask.

Feature maps cannot follow a mask of any form. What they follow is an order and keys that are hidden from all queries,
so masks are read as that, and calls with any other are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from codegen.launch.linear_op import attention
from codegen.ops.linear_attention.torch_body import resume
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention
from passes.hidden_keys import HIDES


class LinearTerm(nn.Module):
    """Parameters of a `LinearAttention` by the names of its `shapes`, all of them to be trained."""

    def __init__(self, spec: LinearAttention, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        for name in spec.shapes:
            tensor = parameters[name]
            kept = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, tensor.requires_grad)
            self.register_parameter(name, kept)

    def claim(self, cache: Any, index: int | None) -> None:
        """Let a cache that would grow hold this attention's state instead, if it can."""
        if hasattr(cache, "layers"):  # of transformers, which is imported already then
            from rewriter.install.linear_cache import claim

            claim(cache, index, self.spec)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        layer: Any = None,
        kernels: str = "auto",
    ) -> Tensor:
        """[B, H, S, V] of q [B, H, S, D], k [B, N, T, D], v [B, N, T, V].

        `mask` is boolean (True keeps) or additive, broadcasts to [B, H, S, T], and comes in addition to `causal`.
        `layer` is the cache's, which k and v come from; if it is a `LinearLayer`, it is brought up to date, by torch.

        Raises TypeError for a mask that is more than the spec's order and hidden keys.
        """
        parameters = {name: getattr(self, name) for name in self.spec.shapes}
        shown = self._shown(q, k, mask, causal)
        if not hasattr(layer, "settle"):
            return attention(self.spec, q, k, v, parameters, shown, kernels=kernels)
        output, after = resume(self.spec, q, k, v, parameters, layer.sums, shown)
        layer.settle(after)
        return output

    def _shown(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
        """[B, T]: keys that the last query sees, once the others are known to see the same of those before them."""
        queries, keys = q.shape[2], k.shape[2]
        ordered = self.spec.attention.causal
        if mask is None:
            if queries > 1 and causal != ordered:
                raise TypeError("this attention was rewritten for another order of tokens (causal or not)")
            return None
        kept = mask if mask.dtype == torch.bool else mask > HIDES
        shown = kept[:, 0, -1].expand(q.shape[0], keys)
        if torch.compiler.is_compiling():
            return shown
        order = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        implied = order if causal else torch.ones_like(order)
        wanted = shown[:, None, None] & (order if ordered else torch.ones_like(order))
        counts = shown[:, None, keys - queries :, None]  # a padded query may see what it likes
        biased = mask.dtype != torch.bool and bool(((mask != 0) & kept).any())
        if biased or bool((((kept & implied) != wanted) & counts).any()):
            raise TypeError("features follow an order and hidden keys, and this mask is more than that")
        return shown

    def describe(self) -> dict[str, Any]:
        """The spec as JSON; `from_json` reads it."""
        heads, features = asdict(self.spec.attention), self.spec.features.value
        return {"attention": heads, "chunk": self.spec.chunk, "features": features}

    @staticmethod
    def from_json(described: Mapping[str, Any], like: Tensor) -> LinearTerm:
        """With empty weights of `like`'s dtype, on its device. Raises KeyError, TypeError or ValueError for anything
        that `describe` does not give."""
        heads = GroupedQueryAttention(**{**described["attention"], "pattern": ()})
        spec = LinearAttention(heads, int(described["chunk"]), FeatureMap(described["features"]))
        empty = {n: like.new_empty(shape, requires_grad=like.requires_grad) for n, shape in spec.shapes.items()}
        return LinearTerm(spec, empty)
