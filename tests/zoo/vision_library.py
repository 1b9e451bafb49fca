"""Small vision models of timm with random weights, where timm is installed: for `benchmarks.coverage`.

timm needs torchvision, whose wheel on PyPI does not load beside a CPU-only torch; the operators it then misses are
declared, since nothing here calls them. Tests use timm in an environment of its own (tests/e2e/test_timm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import ZooCase
from tests.zoo.feeds import pixels
from tests.zoo.randomize import randomize

_LEVIT = {"img_size": 64, "embed_dim": (32, 48), "key_dim": 8, "depth": (1, 1), "num_heads": (2, 4)}
"""Projections that end in batch norms; keys and values of different widths."""

_PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@dataclass(frozen=True)
class _Family:
    """A model of timm made small.

    Attributes:
        heads: the smallest number of heads of its attentions.
        refused: how many of its `sites` must be refused, with a reason that contains `refusal`.
    """

    model: str
    options: dict[str, Any]
    heads: int
    sites: int
    refused: int = 0
    refusal: str = ""


_FAMILIES = {
    "timm-beit": _Family("beit_base_patch16_224", _PLAIN, 4, 2),
    "timm-eva": _Family("eva02_tiny_patch14_224", _PLAIN, 4, 2),
    "timm-cait": _Family("cait_xxs24_224", {**_PLAIN, "depth": 1}, 4, 3, 1, "talking heads"),
    "timm-swinv2": _Family(
        "swinv2_tiny_window8_256",
        {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)},
        2,
        2,
    ),
    "timm-twins": _Family(
        "twins_svt_small",
        {
            "img_size": 64,
            "embed_dims": (16, 32),
            "num_heads": (2, 4),
            "mlp_ratios": (2, 2),
            "depths": (2, 2),
            "sr_ratios": (2, 1),
            "wss": (4, 4),
        },
        2,
        4,
    ),
    "timm-hiera": _Family(
        "hiera_tiny_224",
        {"img_size": (64, 64), "embed_dim": 16, "num_heads": 2, "stages": (2, 2), "q_pool": 1},
        2,
        4,
        1,
        "(pooling)",
    ),
    "timm-levit": _Family("levit_128s", _LEVIT, 2, 3),
    "timm-levit-conv": _Family("levit_conv_128s", _LEVIT, 2, 3),
    "timm-maxvit": _Family(
        "maxvit_rmlp_pico_rw_256",
        {"img_size": 64, "depths": (1,), "embed_dim": (64,), "block_type": ("M",), "stem_width": 16},
        2,
        2,
    ),
}


def timm_cases() -> dict[str, ZooCase]:
    """By name; empty without timm."""
    return {name: _case(name, family) for name, family in _FAMILIES.items()} if find_spec("timm") else {}


def _case(name: str, family: _Family) -> ZooCase:
    size = family.options["img_size"]
    return ZooCase(
        name=name,
        build=partial(_built, family),
        inputs=pixels("x", size if isinstance(size, int) else size[0]),
        head_views=_head_views,
        heads=family.heads,
        kv_heads=family.heads,
        sites=family.sites,
        causal=False,
        axes={"x": {0: "batch"}},
        tags=frozenset({"timm", "extra"}),
        refused=family.refused,
        refusal=family.refusal,
    )


def _built(family: _Family) -> nn.Module:
    _declare_operators()
    import timm

    torch.manual_seed(0)
    module: nn.Module = timm.create_model(family.model, num_classes=10, **family.options).eval()
    return randomize(module)


@cache
def _declare_operators() -> torch.library.Library:
    missing = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return missing


def _head_views(module: nn.Module) -> Iterator[Tensor]:
    """Keys' and values' rows by head, of projections that hold one, two or all three of the operands."""
    for attention in module.modules():
        heads = getattr(attention, "num_heads", None) or getattr(attention, "heads", None)
        if isinstance(heads, int) and hasattr(attention, "val_dim"):
            yield from _narrow_keys(attention, heads)
        elif isinstance(heads, int):
            for name, split in _PROJECTIONS.items():
                child = getattr(attention, name, None)
                stored = [child] if isinstance(child, nn.Parameter) else list(_parameters(child))
                by_head = name == "qkv" and getattr(attention, "head_first", False)
                for rows in stored:
                    yield from (_by_head if by_head else split)(rows.detach(), heads)


def _narrow_keys(attention: Any, heads: int) -> Iterator[Tensor]:
    """Keys and values side by side in each head, behind queries or without them; of norms, too."""
    packed, skipped = (attention.qkv, attention.key_dim) if hasattr(attention, "qkv") else (attention.kv, 0)
    for rows in (*packed.parameters(), *packed.buffers()):
        if rows.dim():
            apart = rows.detach().unflatten(0, (heads, -1))
            yield apart[:, skipped : skipped + attention.key_dim]
            yield apart[:, skipped + attention.key_dim :]


def _parameters(child: nn.Module | None) -> Iterator[nn.Parameter]:
    return iter(()) if child is None else child.parameters(recurse=False)


def _last(parts: int, kept: int) -> Callable[[Tensor, int], list[Tensor]]:
    """The last `kept` of `parts` operands in one projection."""
    return lambda rows, heads: list(rows.unflatten(0, (parts, heads, -1))[-kept:])


def _by_head(rows: Tensor, heads: int) -> list[Tensor]:
    """Keys and values where each head's query, key and value stand together."""
    apart = rows.unflatten(0, (heads, 3, -1))
    return [apart[:, 1], apart[:, 2]]


_PROJECTIONS = {
    "qkv": _last(3, 2),
    "kv": _last(2, 2),
    **dict.fromkeys(("k", "v", "k_proj", "v_proj", "v_bias"), _last(1, 1)),
}
