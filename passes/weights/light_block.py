"""A dense feed-forward block as a light branch and a heavy one that complete each other (CoLT5, arXiv 2303.09752).

The light branch keeps some of the hidden features. The heavy branch is the block's own hidden layer, its output
projection less what the light branch gives already, so that both together are the block: a token that is routed gets
what the block gave, whatever the light branch is.

Shape legend: N tokens, E features, F hidden features, f of them light.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codegen.activation import Activation
from passes.dataflow import Array
from passes.weights.experts import DenseBlock, hidden_layer
from passes.weights.router import RouterSums, amplified
from passes.weights.unit_refit import OutputSums


@dataclass(frozen=True)
class Light:
    """Attributes:
    kept: [f] hidden features, in ascending order.
    down: [f, E] what they are projected by; bias: [E] or None.
    router: [E].
    notes: what fits explain.
    """

    kept: Array
    down: Array
    bias: Array | None
    router: Array
    notes: tuple[str, ...] = ()


def selected(block: DenseBlock, count: int) -> Light:
    """By weights alone: the features whose matrices are the largest, and a router along what the block enlarges most,
    its activation left out."""
    sizes = [np.linalg.norm(m, axis=0) for m in (block.up, block.gate) if m is not None]
    kept = _largest(np.prod(sizes, axis=0) * np.linalg.norm(block.down, axis=1), count)
    up, down = block.up.astype(np.float64), block.down.astype(np.float64)
    router = amplified(len(up), lambda v: up @ (down @ (down.T @ (up.T @ v))))
    return Light(kept, block.down[kept], block.down_bias, router)


def fitted(block: DenseBlock, kind: Activation, count: int, x: Array) -> Light:
    """By hidden states x [N, E]: the features that give most, their output projection by least squares near the
    block's, and a router fitted to what is then missing of a token's result."""
    hidden = hidden_layer(block, kind, x)
    wanted = hidden @ block.down
    kept = _largest((hidden**2).mean(axis=0) * (block.down**2).sum(axis=1), count)
    sums = OutputSums()
    sums.add(hidden[:, kept], wanted)
    fit = sums.solve(block.down[kept].T, np.zeros(wanted.shape[1]))
    missing = wanted - fit.output(hidden[:, kept])
    routers = RouterSums()
    routers.add(x, np.linalg.norm(missing, axis=1))
    router = routers.solve()
    bias = fit.tensors["out_bias"] + (0 if block.down_bias is None else block.down_bias)
    notes = (
        f"the light branch explains {fit.explained:.1%} of the output's energy",
        f"the router explains {max(router.explained, 0.0):.1%} of the variance of what is missing",
    )
    return Light(kept, fit.tensors["out_weight"].T, bias, router.direction, notes)


def branches(block: DenseBlock, light: Light) -> dict[str, Array]:
    """Parameters by the names of `ConditionalFeedForward.shapes`, float32."""
    heavy_down = block.down.astype(np.float64)
    heavy_down[light.kept] -= light.down
    found: dict[str, Array | None] = {"router": light.router, "light_down_weight": light.down}
    found |= {"heavy_down_weight": heavy_down, "light_down_bias": light.bias}
    if light.bias is not None:
        found["heavy_down_bias"] = (0 if block.down_bias is None else block.down_bias) - light.bias
    for name in ("up", "gate"):
        for part in ("weight", "bias"):
            whole: Array | None = getattr(block, name if part == "weight" else f"{name}_bias")
            found[f"heavy_{name}_{part}"] = whole
            found[f"light_{name}_{part}"] = None if whole is None else whole[..., light.kept]
    return {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in found.items() if a is not None}


def _largest(sizes: Array, count: int) -> Array:
    return np.sort(np.argsort(-sizes, kind="stable")[:count])
