"""The conditional feed-forward block in plain, differentiable torch: the heavy branch is given routed tokens only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from codegen.conditional import ConditionalFeedForward
from codegen.ops.activation.torch_body import activate
from codegen.ops.conditional_routing.reference import require_fitting
from codegen.ops.conditional_routing.torch_body import route


def conditional_feed_forward(
    spec: ConditionalFeedForward,
    x: Tensor,
    shown: Tensor | None = None,
    *,
    soft: bool = False,
    **parameters: Tensor,
) -> Tensor:
    """[B, S, hidden] of x [B, S, hidden] and parameters of `ConditionalFeedForward.shapes`, in x's dtype.

    Args:
        shown: bool [B, S], False for padding.
        soft: as in training.

    Raises:
        ValueError: if x or a parameter contradicts the spec, or a parameter is given or missing against it.
    """
    require_fitting(spec, tuple(x.shape), {name: tuple(p.shape) for name, p in parameters.items()})
    return unguarded(spec, x, shown, parameters, soft=soft)


def unguarded(
    spec: ConditionalFeedForward,
    x: Tensor,
    shown: Tensor | None,
    parameters: Mapping[str, Tensor],
    *,
    soft: bool = False,
) -> Tensor:
    """`conditional_feed_forward`, with shapes unchecked: what is written into graphs."""
    routed = route(spec.router, x, parameters["router"], shown, soft=soft)
    heavy = _branch(spec, "heavy", routed.gather(x), parameters)
    return routed.add(_branch(spec, "light", x, parameters), heavy)


Heavy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[N, hidden] of N = B S tokens: the light branch's answers [N, hidden], to which are added, of the tokens `rows`
[1, M], the heavy one's times `weights` [1, M]."""


def conditional_through(
    spec: ConditionalFeedForward,
    x: Tensor,
    heavy: Heavy,
    shown: Tensor | None = None,
    *,
    soft: bool = False,
    **parameters: Tensor,
) -> Tensor:
    """As `conditional_feed_forward`, with the heavy branch computed by `heavy`."""
    require_fitting(spec, tuple(x.shape), {name: tuple(p.shape) for name, p in parameters.items()})
    routed = route(spec.router, x, parameters["router"], shown, soft=soft)
    starts = x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]
    rows, weights = (routed.index + starts).reshape(1, -1), routed.weight.reshape(1, -1)
    light = _branch(spec, "light", x, parameters).reshape(-1, spec.hidden)
    return heavy(light, rows, weights).reshape(x.shape)


def _branch(spec: ConditionalFeedForward, name: str, x: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    def product(role: str, given: Tensor) -> Tensor:
        bias = held.get(f"{name}_{role}_bias")
        found = given @ held[f"{name}_{role}_weight"]
        return found if bias is None else found + bias

    up = product("up", x)
    inner = activate(spec.activation, product("gate", x)) * up if spec.gated else activate(spec.activation, up)
    return product("down", inner)
