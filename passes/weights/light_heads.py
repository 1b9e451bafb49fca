"""An attention's heads shared out among a light branch and a heavy one (CoLT5, arXiv 2303.09752).

Light heads go to all tokens and see near keys; heavy heads go from routed tokens to routed keys. Each head keeps its
projections, so that with all tokens routed and a window over all of them both branches add up to the attention.

Shape legend: B batch, S tokens, H heads, D features of a head, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from codegen.conditional import ConditionalAttention
from codegen.ops.conditional_attention.reference import bucket, conditional_attention
from passes.dataflow import Array
from passes.weights.projection import SiteWeights
from passes.weights.router import Router, RouterSums, amplified
from passes.weights.unit_refit import OutputSums


@dataclass(frozen=True)
class Heads:
    """One attention, each head with keys and values of its own, float64.

    Attributes:
        q, k, v: [H, D, E + 1], the bias last; out: [H, E, D]; out_bias: [E].
        table: [R, H] by bucket of distance, None for none.
    """

    q: Array
    k: Array
    v: Array
    out: Array
    out_bias: Array
    table: Array | None

    @staticmethod
    def of(weights: SiteWeights, group: Sequence[int], gain: float, table: Array | None) -> Heads:
        """`gain` is what values are multiplied by behind their projection."""
        assert weights.out is not None
        index = list(group)
        bias = np.zeros(weights.out.shape[1]) if weights.out_bias is None else weights.out_bias
        return Heads(weights.q, weights.k[index], gain * weights.v[index], weights.out, bias, table)

    @property
    def biased(self) -> bool:
        """Whether queries or values have a bias."""
        return bool(self.q[..., -1].any() or self.v[..., -1].any())


def strongest(heads: Heads, count: int) -> tuple[int, ...]:
    """By weights alone: the heads whose values and output projections are the largest together."""
    sizes = [float(np.linalg.norm(o @ v)) for o, v in zip(heads.out, heads.v[..., :-1], strict=True)]
    return tuple(sorted(np.argsort(-np.asarray(sizes), kind="stable")[:count].tolist()))


def branches(spec: ConditionalAttention, heads: Heads, light: Sequence[int]) -> dict[str, Array]:
    """Parameters by the names of `ConditionalAttention.shapes`, float64; routers point along what heavy queries, and
    heavy heads of their keys, enlarge most."""
    heavy = [h for h in range(len(heads.q)) if h not in light]
    found: dict[str, Array] = {}
    for branch, chosen in (("light", list(light)), ("heavy", heavy)):
        for name, whole in (("query", heads.q), ("key", heads.k), ("value", heads.v)):
            rows = whole[chosen].reshape(-1, whole.shape[-1])
            found[f"{branch}_{name}_weight"], found[f"{branch}_{name}_bias"] = rows[:, :-1].T, rows[:, -1]
        found[f"{branch}_output_weight"] = heads.out[chosen].transpose(0, 2, 1).reshape(-1, spec.hidden)
    if heads.table is not None:
        found["distances"] = np.concatenate([heads.table[:, list(light)], heads.table[:, heavy]], axis=1)
    query, value, out = (found[f"heavy_{name}_weight"] for name in ("query", "value", "output"))
    found["query_router"] = amplified(spec.hidden, lambda x: query @ (query.T @ x))
    found["key_router"] = amplified(spec.hidden, lambda x: value @ (out @ (out.T @ (value.T @ x))))
    found["output_bias"] = heads.out_bias
    return {name: found[name] for name in spec.shapes}


# ------------------------------------------------------------------ with data


@dataclass(frozen=True)
class HeadsFit:
    """Attributes:
    spec, tensors: of the conditional attention.
    explained, constant: parts of the output's energy that it, and that a constant, accounts for.
    routers: parts of the variance of heavy queries' results, and of what keys add to them, that routers explain.
    """

    spec: ConditionalAttention
    tensors: dict[str, Array]
    explained: float
    constant: float
    routers: tuple[float, float]

    def output(self, prepared: Array) -> Array:
        """[B, S, E] of hidden states and, as the last feature, which tokens are shown."""
        return np.asarray(
            conditional_attention(self.spec, prepared[..., :-1], prepared[..., -1] > 0.5, soft=False, **self.tensors)
        )


@dataclass
class HeadsFitting:
    """Collects batches, then chooses the light heads, fits routers, and the light output projection to what the heavy
    branch leaves.

    Attributes:
        spec: with the number of light heads and an output bias.
    """

    spec: ConditionalAttention
    heads: Heads
    seen: list[tuple[Array, Array]] = field(default_factory=list)

    def prepare(self, hidden: Array, shown: Array) -> Array:
        return np.concatenate([hidden, shown[..., None].astype(hidden.dtype)], axis=-1)

    def add(self, prepared: Array, output: Array, asking: Array) -> None:
        self.seen.append((prepared, np.asarray(output, dtype=np.float64)))

    def solve(self) -> HeadsFit:
        light = self._nearest()
        tensors = branches(self.spec, self.heads, light)
        routers = self._routers([h for h in range(len(self.heads.q)) if h not in light])
        tensors |= {"query_router": routers[0].direction, "key_router": routers[1].direction}
        tensors |= self._light_output(tensors, light)
        explained, constant = self._explained(tensors)
        return HeadsFit(self.spec, tensors, explained, constant, (routers[0].explained, routers[1].explained))

    def _nearest(self) -> tuple[int, ...]:
        """Heads that, seeing near keys only, miss least of the output by themselves."""
        gains = np.zeros(len(self.heads.q))
        for prepared, output in self.seen:
            wanted = output - self.heads.out_bias
            near = self._near(_attention(self.spec, self.heads, prepared))
            values = _projected(self.heads.v, prepared)
            for h in range(len(gains)):
                given = (near[:, h] @ values[:, h]) @ self.heads.out[h].T
                counted = prepared[..., -1:] > 0.5
                gains[h] += float(((2 * wanted - given) * given * counted).sum())
        return tuple(sorted(np.argsort(-gains, kind="stable")[: self.spec.light_heads].tolist()))

    def _near(self, weights: Array) -> Array:
        at = np.arange(weights.shape[-1])
        kept = weights * (np.abs(at[None, :] - at[:, None]) <= self.spec.radius)
        return np.asarray(kept / np.maximum(kept.sum(axis=-1, keepdims=True), 1e-30))

    def _routers(self, heavy: Sequence[int]) -> tuple[Router, Router]:
        queries, keys = RouterSums(), RouterSums()
        for prepared, _ in self.seen:
            counted = prepared[..., -1] > 0.5
            weights = _attention(self.spec, self.heads, prepared)[:, list(heavy)]
            values = _projected(self.heads.v[list(heavy)], prepared)
            outputs = values @ self.heads.out[list(heavy)].transpose(0, 2, 1)  # [B, h, S, E]
            given = np.linalg.norm((weights @ outputs).sum(axis=1), axis=-1)
            asked = weights * counted[:, None, :, None]
            worth = np.sqrt(((asked**2).sum(axis=2) * (outputs**2).sum(axis=-1)).sum(axis=1))
            hidden = prepared[..., :-1][counted]
            queries.add(hidden, given[counted])
            keys.add(hidden, worth[counted])
        return queries.solve(), keys.solve()

    def _light_output(self, tensors: dict[str, Array], light: Sequence[int]) -> dict[str, Array]:
        weight = tensors["light_output_weight"]
        alone = tensors | {"light_output_weight": np.zeros_like(weight), "output_bias": np.zeros(self.spec.hidden)}
        sums = OutputSums()
        for prepared, output in self.seen:
            counted = prepared[..., -1] > 0.5
            near = self._near(_attention(self.spec, self.heads, prepared)[:, list(light)])
            values = near @ _projected(self.heads.v[list(light)], prepared)
            merged = values.transpose(0, 2, 1, 3).reshape(*counted.shape, -1)
            heavy = conditional_attention(self.spec, prepared[..., :-1], counted, soft=False, **alone)
            sums.add(merged[counted], (output - heavy)[counted])
        fit = sums.solve(weight.T, tensors["output_bias"])
        return {"light_output_weight": fit.tensors["out_weight"].T, "output_bias": fit.tensors["out_bias"]}

    def _explained(self, tensors: dict[str, Array]) -> tuple[float, float]:
        missed = energy = count = 0.0
        total = np.zeros(self.spec.hidden)
        for prepared, output in self.seen:
            counted = prepared[..., -1] > 0.5
            got = conditional_attention(self.spec, prepared[..., :-1], counted, soft=False, **tensors)
            missed += float(((got - output)[counted] ** 2).sum())
            energy += float((output[counted] ** 2).sum())
            total, count = total + output[counted].sum(axis=0), count + float(counted.sum())
        energy = max(energy, 1e-30)
        return 1 - missed / energy, float((total**2).sum()) / max(count, 1.0) / energy


def _projected(weights: Array, prepared: Array) -> Array:
    """[B, H, S, D]."""
    wide = prepared[..., :-1].astype(np.float64)
    return np.asarray(np.einsum("bse,hde->bhsd", wide, weights[..., :-1], optimize=True) + weights[:, None, :, -1])


def _attention(spec: ConditionalAttention, heads: Heads, prepared: Array) -> Array:
    """[B, H, S, S]: the original's softmax; zeros for hidden keys."""
    shown = prepared[..., -1] > 0.5
    scores = spec.scale * _projected(heads.q, prepared) @ _projected(heads.k, prepared).swapaxes(2, 3)
    if heads.table is not None:
        at = np.arange(prepared.shape[1])
        scores = scores + heads.table[bucket(spec, at[None, :] - at[:, None])].transpose(2, 0, 1)
    scores = np.where(shown[:, None, None, :], scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    raised = np.exp(scores - np.where(np.isfinite(highest), highest, 0.0))
    return np.asarray(raised / np.maximum(raised.sum(axis=-1, keepdims=True), 1e-30))
