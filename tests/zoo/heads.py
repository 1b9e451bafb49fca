"""Writable per-head views of K and V parameters, one function per storage layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.zoo.case import HeadViews


def _parameters(module: nn.Module, suffix: str) -> Iterator[Tensor]:
    """Weight and bias, output rows first, of every submodule whose name ends with `suffix`."""
    for name, child in module.named_modules():
        if name == suffix or name.endswith("." + suffix):
            transposed = type(child).__name__ == "Conv1D"  # stored [in, out]
            for parameter in child.parameters(recurse=False):
                yield parameter.detach().mT if transposed and parameter.ndim == 2 else parameter.detach()


def separate(kv_heads: int, *suffixes: str) -> HeadViews:
    """K and V are linear layers of their own, ``[kv_heads * head_dim, in]``."""

    def views(module: nn.Module) -> Iterator[Tensor]:
        for suffix in suffixes:
            for rows in _parameters(module, suffix):
                yield torch.unflatten(rows, 0, (kv_heads, -1))

    return views


def stacked(heads: int, kv_heads: int, suffix: str) -> HeadViews:
    """One fused layer holding all Q rows, then all K rows, then all V rows."""

    def views(module: nn.Module) -> Iterator[Tensor]:
        for rows in _parameters(module, suffix):
            by_head = torch.unflatten(rows, 0, (heads + 2 * kv_heads, -1))
            yield by_head[heads : heads + kv_heads]
            yield by_head[heads + kv_heads :]

    return views


def interleaved(kv_heads: int, group: int, suffix: str) -> HeadViews:
    """One fused layer holding, for each K/V head, its `group` query heads, its K head and its V head."""

    def views(module: nn.Module) -> Iterator[Tensor]:
        for rows in _parameters(module, suffix):
            by_group = torch.unflatten(rows, 0, (kv_heads, group + 2, -1))
            yield by_group[:, group]
            yield by_group[:, group + 1]

    return views


def in_projection(heads: int) -> HeadViews:
    """`nn.MultiheadAttention`'s ``in_proj_weight`` and ``in_proj_bias``: Q, K and V rows stacked."""

    def views(module: nn.Module) -> Iterator[Tensor]:
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in ("in_proj_weight", "in_proj_bias"):
                by_head = torch.unflatten(parameter.detach(), 0, (3, heads, -1))
                yield by_head[1]
                yield by_head[2]

    return views


def vectors(kv_heads: int, *names: str) -> HeadViews:
    """Parameters of these names, one number for each feature of each head, in any shape that runs over heads first."""

    def views(module: nn.Module) -> Iterator[Tensor]:
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in names:
                yield parameter.detach().view(kv_heads, -1)

    return views


def joined(*parts: HeadViews) -> HeadViews:
    """What several of them yield."""

    def views(module: nn.Module) -> Iterator[Tensor]:
        for part in parts:
            yield from part(module)

    return views


def nothing() -> HeadViews:
    """A model without attention."""
    empty: Callable[[nn.Module], Iterator[Tensor]] = lambda module: iter(())  # noqa: E731
    return empty
