"""From a dense feed-forward block to a mixture of experts: pure functions of arrays.

Splitting (MoEfication, arXiv 2110.01786) shares the hidden features out among experts, those that are active together
to the same one; upcycling (arXiv 2212.05055) gives each expert a copy of the whole block. In both, a token's result is
a sum over experts weighted by the router's probabilities, which are not renormalised. Split experts must therefore be
scaled up by what probabilities take away: by the number of experts where they are all equal. With an even router, that
scale and room for all tokens, a split block is the dense one exactly.

Shape legend: N tokens, H features, F hidden features, E experts, f hidden features of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from codegen.activation import Activation
from codegen.ops.activation.reference import activate
from passes.dataflow import Array, Flow
from passes.feed_forward_site import FeedForwardSite, HiddenInput

COOL = 0.1
"""What the logits of a router without data are multiplied by."""

Parameters = Mapping[str, Array]
"""By the names of `codegen.spec.MixtureOfExperts.shapes`, float32."""


@dataclass(frozen=True)
class DenseBlock:
    """The matrices of one block, float32, [in, out]; vectors that it does not have are None.

    Attributes:
        up, gate: [H, F], the hidden features in the order in which `down` reads them.
        down: [F, H].
    """

    up: Array
    down: Array
    gate: Array | None = None
    up_bias: Array | None = None
    gate_bias: Array | None = None
    down_bias: Array | None = None


def dense_block(flow: Flow, site: FeedForwardSite) -> DenseBlock:
    """The weights of a site. Where only one of gate and up has a bias, the other's is zeros."""
    up, up_bias = _factor(flow, site.up)
    gate, gate_bias = (None, None) if site.gate is None else _factor(flow, site.gate)
    if site.gate is not None and (up_bias is None) != (gate_bias is None):
        zeros = np.zeros(site.hidden, np.float32)
        up_bias, gate_bias = (zeros if b is None else b for b in (up_bias, gate_bias))
    down = np.asarray(flow.value(site.down.weight), dtype=np.float32)
    bias = None if site.down.bias is None else flow.value(site.down.bias).astype(np.float32).reshape(-1)
    return DenseBlock(up, down.T if site.down.out_first else down, gate, up_bias, gate_bias, bias)


def _factor(flow: Flow, part: HiddenInput) -> tuple[Array, Array | None]:
    projection = part.projection
    weight = np.asarray(flow.value(projection.weight), dtype=np.float32)
    weight = (weight.T if projection.out_first else weight)[:, part.columns]
    if projection.bias is None:
        return weight, None
    positions = projection.bias_positions(part.columns)
    bias = flow.value(projection.bias).astype(np.float32).reshape(-1)
    return weight, np.where(positions < 0, np.float32(0), bias[positions])


def hidden_layer(block: DenseBlock, kind: Activation, x: Array) -> Array:
    """[N, F] of hidden states x [N, H], float32."""
    wide = np.asarray(x, dtype=np.float32)
    up = wide @ block.up + (0 if block.up_bias is None else block.up_bias)
    if block.gate is None:
        return np.asarray(activate(kind, up), dtype=np.float32)
    gate = wide @ block.gate + (0 if block.gate_bias is None else block.gate_bias)
    return np.asarray(activate(kind, gate) * up, dtype=np.float32)


def balanced_clusters(profiles: Array, count: int, rounds: int = 8) -> Array:
    """[count, F / count]: the F rows of `profiles` [F, D] in clusters of equal size, near in angle, by k-means.

    Raises ValueError if `count` does not divide F.
    """
    size, rest = divmod(len(profiles), count)
    if rest:
        raise ValueError(f"{count} experts do not divide {len(profiles)} hidden features")
    points = np.asarray(profiles, dtype=np.float64)
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-30)
    owner = np.repeat(np.arange(count), size)
    owner[np.argsort(points @ _main_direction(points), kind="stable")] = np.repeat(np.arange(count), size)
    for _ in range(rounds):
        centres = np.stack([points[owner == c].mean(axis=0) for c in range(count)])
        after = _assigned(points @ centres.T, size)
        if np.array_equal(after, owner):
            break
        owner = after
    return np.stack([np.flatnonzero(owner == c) for c in range(count)])


def _main_direction(points: Array) -> Array:
    """Where the points differ most; a few steps of power iteration are as good as an exact answer."""
    direction = np.ones(points.shape[1]) / np.sqrt(points.shape[1])
    centred = points - points.mean(axis=0)
    for _ in range(8):
        direction = centred.T @ (centred @ direction)
        direction = direction / max(float(np.linalg.norm(direction)), 1e-30)
    return np.asarray(direction)


def _assigned(nearness: Array, size: int) -> Array:
    """[F] a cluster for each row of `nearness` [F, E], none with more than `size`: the surest rows choose first."""
    best_two = np.sort(nearness, axis=1)[:, -2:]
    owner, room = np.zeros(len(nearness), np.int64), np.full(nearness.shape[1], size)
    for row in np.argsort(best_two[:, 0] - best_two[:, -1], kind="stable"):
        choice = int(np.argmax(np.where(room > 0, nearness[row], -np.inf)))
        owner[row], room[choice] = choice, room[choice] - 1
    return owner


def split(block: DenseBlock, clusters: Array, scale: Array) -> dict[str, Array]:
    """Experts of the hidden features in `clusters` [E, f], their results times `scale` [E]; the bias stays common."""
    found = {"up_weight": block.up[:, clusters].transpose(1, 0, 2)}
    if block.gate is not None:
        found["gate_weight"] = block.gate[:, clusters].transpose(1, 0, 2)
        if block.gate_bias is not None:
            found["gate_bias"] = block.gate_bias[clusters]
    if block.up_bias is not None:
        found["up_bias"] = block.up_bias[clusters]
    found["down_weight"] = block.down[clusters] * np.asarray(scale, dtype=np.float32)[:, None, None]
    if block.down_bias is not None:
        found["bias"] = block.down_bias
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in found.items()}


def copies(block: DenseBlock, count: int, scale: Array) -> dict[str, Array]:
    """`count` experts that are the whole block each, their results times `scale` [E]."""
    return split(block, np.tile(np.arange(len(block.down)), (count, 1)), scale)


def central_router(parameters: Parameters) -> dict[str, Array]:
    """A router without data: how far an expert's hidden features are active on average, before the nonlinearity.

    Mean columns of length 1, so that no expert is preferred for the size of its weights; and cool, so that it decides
    who is served and probabilities stay near ``1 / experts``, which is what results are scaled by.
    """
    name = "gate" if "gate_weight" in parameters else "up"
    weight = parameters[f"{name}_weight"].astype(np.float64)
    length = np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-30)
    mean = COOL * (weight / length).mean(axis=2).T
    bias = parameters.get(f"{name}_bias")
    shift = np.zeros(len(weight)) if bias is None else COOL * (bias / length[:, 0]).mean(axis=1)
    return {"router_weight": mean.astype(np.float32), "router_bias": shift.astype(np.float32)}


def fitted_router(x: Array, importance: Array, ridge: float = 1e-3) -> dict[str, Array]:
    """The router whose logits come nearest, by least squares on [x; 1], to the logarithm of `importance` [N, E].

    Softmax then gives each expert a probability in proportion to its importance, as far as that is linear in x [N, H].
    `ridge` is relative to the mean variance of x, which keeps directions that calibration hardly shows out of it.
    """
    wide = np.asarray(x, dtype=np.float64)
    floor = 1e-3 * max(float(importance.mean()), 1e-30)
    wanted = np.log(np.maximum(np.asarray(importance, dtype=np.float64), floor))
    wanted = wanted - wanted.mean(axis=1, keepdims=True)
    centre, mean = wide.mean(axis=0), wanted.mean(axis=0)
    centred = wide - centre
    moment = centred.T @ centred
    moment[np.diag_indices_from(moment)] += ridge * max(float(np.trace(moment)) / len(moment), 1e-30)
    weight = np.linalg.solve(moment, centred.T @ (wanted - mean))
    return {
        "router_weight": weight.astype(np.float32),
        "router_bias": (mean - centre @ weight).astype(np.float32),
    }


@dataclass(frozen=True)
class Products:
    """Scalar products of what experts give and of what is wanted, token by token, relative to the token's wanted size.

    A few tokens of a trained model carry activations a thousand times the others'; relative errors let each count.

    Attributes:
        among: [N, E, E] of the experts' results.
        wanted: [N, E] of each with what is wanted.
    """

    among: Array
    wanted: Array

    @staticmethod
    def of(outputs: Array, wanted: Array) -> Products:
        """Of outputs [E, N, H], the common bias left out, and wanted [N, H]."""
        energy = np.einsum("nh,nh->n", wanted, wanted)
        size = np.maximum(energy, 1e-3 * max(float(np.median(energy)), 1e-30))
        by_token = outputs.transpose(1, 0, 2)
        among = by_token @ by_token.transpose(0, 2, 1) / size[:, None, None]
        hits = (by_token @ wanted[:, :, None])[:, :, 0] / size[:, None]
        return Products(among.astype(np.float64), hits.astype(np.float64))

    def scales(self, gates: Array) -> tuple[Array, float]:
        """[E] factors that bring ``sum of gate · factor · result`` nearest to what is wanted, and how much of the
        wanted energy that explains; `gates` [N, E] are 0 where a token was not routed to an expert."""
        moment = np.einsum("ne,nf,nef->ef", gates, gates, self.among, optimize=True)
        hits = np.einsum("ne,ne->e", gates, self.wanted)
        moment[np.diag_indices_from(moment)] += 1e-6 * max(float(np.trace(moment)) / len(moment), 1e-30)
        scale = np.linalg.solve(moment, hits)
        return scale, float(scale @ hits) / len(gates)
