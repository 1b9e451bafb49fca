"""A dense feed-forward block becomes a mixture of experts (Sparse Mixer, arXiv 2205.12399).

Split: the block's hidden features in clusters, one for each expert, so that the mixture has the block's weights, a
router and nothing else. The paper's experts are whole blocks, each token visiting one of them on average; of a split
block that would be a fraction ``1 / experts``. So work is given as a share of the dense block's: with half of it, a
token visits half of the experts on average. With all of it every expert works on every token: the router is then
even, and the mixture computes what the block did. Copies: every expert starts as the whole block (upcycling), at the
paper's capacities and with a random router, for training on.

Where tokens choose, they ask for as many split experts as that work is, of copies for one, and experts have room for
what is asked for on average, so that some choices are left out. A larger capacity factor leaves out fewer; one as large
as the number of experts none.

Probabilities are not renormalised, as in the paper's code, so split experts are scaled up: by the number of experts
without calibration, by least squares with it. Without calibration the router points at each expert's own columns; with
it, it is fitted to how much each expert contributes to the original's result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from codegen.ops.mixture_of_experts.reference import routed_gates
from codegen.spec import MixtureOfExperts, Routing
from passes.dataflow import Array, Flow
from passes.feed_forward_site import FeedForwardSite
from passes.targets.block import ACTIVATIONS, BlockReplacement, Surroundings
from passes.weights.experts import (
    DenseBlock,
    Products,
    balanced_clusters,
    central_router,
    copies,
    dense_block,
    fitted_router,
    hidden_layer,
    split,
)

WARMTHS = (1.0, 0.3, 0.1, 0.03)
"""What a fitted router's logits may be multiplied by. A cool router says who is served as a warm one does, and weighs
experts more evenly."""

PROFILE_TOKENS = 512
"""Calibration tokens by whose hidden features clusters are found."""


@dataclass(frozen=True)
class Experts:
    """Make experts of feed-forward blocks.

    Attributes:
        experts: how many.
        work: share of the dense block's products that split experts do, in (0, 1]; the capacity factor of copies.
        method: "split" or "copies".
        routing: who chooses.
        capacity_factor: where tokens choose, the room of an expert over an even share of the tokens (that many over
            `experts`); None for what `work` asks for.
        middle: how many blocks in the middle of all that are selected; None for all.
        contrib: in a file, write onnxruntime's com.microsoft.MoE where it computes the same. Such files run in
            onnxruntime alone. Elsewhere, and in modules, it changes nothing.
    """

    experts: int = 16
    work: float = 0.5
    method: Literal["split", "copies"] = "split"
    routing: Routing = Routing.EXPERTS_CHOOSE
    capacity_factor: float | None = None
    middle: int | None = None
    contrib: bool = False

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"there must be two experts at least, not {self.experts}")
        if self.method not in ("split", "copies"):
            raise ValueError(f'method must be "split" or "copies", not {self.method!r}')
        if not 0 < self.work <= 1:
            raise ValueError(f"work must be in (0, 1], not {self.work}")
        if self.capacity_factor is None:
            return
        if self.routing is Routing.EXPERTS_CHOOSE:
            raise ValueError("capacity_factor must be left out where experts choose: it is their work")
        if not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be a positive number, not {self.capacity_factor}")

    @property
    def computes_the_block(self) -> bool:
        """Whether nothing is left out, so that split experts are the dense block."""
        room = self.capacity_factor is None or self.capacity_factor >= self.experts
        return self.method == "split" and self.work == 1 and room

    def chosen(self, sites: Sequence[FeedForwardSite]) -> tuple[FeedForwardSite, ...]:
        """Those in the middle: blocks 5 to 8 of the paper's 14."""
        if self.middle is None or len(sites) <= self.middle:
            return tuple(sites)
        start = (len(sites) - self.middle) // 2
        return tuple(sites[start : start + self.middle])

    def refuses(self, site: FeedForwardSite, around: Surroundings) -> str | None:
        """Why this block stays dense."""
        if around.causal_model:
            return "the model is causal, and who is served depends on later tokens"
        if site.activation.name not in ACTIVATIONS:
            return f"no expert applies its activation ({site.activation.name or 'one without a name'})"
        if self.method == "split" and site.hidden % self.experts:
            return f"{self.experts} experts do not divide its {site.hidden} hidden features"
        return None

    def spec(self, site: FeedForwardSite, block: DenseBlock) -> MixtureOfExperts:
        name = site.activation.name
        assert name is not None
        is_split = self.method == "split"
        asked = self.experts * self.work if is_split else self.work
        return MixtureOfExperts(
            site.width,
            site.hidden // self.experts if is_split else site.hidden,
            self.experts,
            routing=self.routing,
            activation=ACTIVATIONS[name],
            capacity_factor=asked if self.capacity_factor is None else self.capacity_factor,
            selected=1 if self.routing is Routing.EXPERTS_CHOOSE else max(1, round(asked)),
            gated=block.gate is not None,
            up_bias=block.up_bias is not None,
            down_bias=False,
            bias=block.down_bias is not None,
        )

    def transform(self, flow: Flow, site: FeedForwardSite, around: Surroundings) -> BlockReplacement:
        """Without data: clusters by the weights (MoEfication's parameter clustering), a router that points at them."""
        block = dense_block(flow, site)
        scale = np.full(self.experts, float(self.experts))
        if self.method == "copies":
            return self._replacement(site, block, copies(block, self.experts, scale), "copies", ())
        weights = block.up if block.gate is None else block.gate
        tensors = split(block, balanced_clusters(weights.T, self.experts), scale)
        return self._replacement(site, block, tensors, "split", ())

    def fitted(self, flow: Flow, site: FeedForwardSite, around: Surroundings, x: Array) -> BlockReplacement:
        """By the block's hidden states x [N, width] on calibration data."""
        if self.method == "copies" or self.computes_the_block:
            return self.transform(flow, site, around)
        block = dense_block(flow, site)
        kind = ACTIVATIONS[site.activation.name or ""]
        hidden = hidden_layer(block, kind, x)
        profile = np.abs(hidden[:: max(1, len(x) // PROFILE_TOKENS)])
        clusters = balanced_clusters(profile.T, self.experts)
        outputs = np.stack([hidden[:, members] @ block.down[members] for members in clusters])
        products = Products.of(outputs, hidden @ block.down)
        spec = self.spec(site, block)
        router = fitted_router(x, np.linalg.norm(outputs, axis=2).T)
        logits = x @ router["router_weight"] + router["router_bias"]
        tried = []
        for warmth in WARMTHS:
            gates = routed_gates(spec, _softmax(warmth * logits))
            tried.append((*products.scales(gates), warmth, float((gates.sum(axis=1) == 0).mean())))
        scale, explained, warmth, left = max(tried, key=lambda t: t[1])
        tensors = split(block, clusters, scale) | {n: (warmth * a).astype(np.float32) for n, a in router.items()}
        told = f"the fit explains {explained:.1%} of the output's energy, token by token"
        lost = (f"{left:.1%} of the calibration tokens are left to no expert",) if left else ()
        return self._replacement(site, block, tensors, "split, fitted", (told, *lost))

    def _replacement(
        self, site: FeedForwardSite, block: DenseBlock, tensors: dict[str, Array], how: str, notes: tuple[str, ...]
    ) -> BlockReplacement:
        spec = self.spec(site, block)
        exact = self.computes_the_block
        router = {} if "router_weight" in tensors else self._router(tensors)
        ordered = {name: (tensors | router)[name] for name in spec.shapes}
        notes = notes if exact else (*notes, "padded tokens are routed too")
        return BlockReplacement(
            site,
            spec,
            ordered,
            f"ffn{site.hidden}",
            f"moe{self.experts}",
            how,
            exact=exact,
            notes=notes,
            contrib=self.contrib,
        )

    def _router(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Without data."""
        router = central_router(tensors)
        if self.computes_the_block:
            return {name: np.zeros_like(array) for name, array in router.items()}
        if self.method == "split":
            return router
        random = np.random.default_rng(0)  # copies are alike: chance tells them apart until they are trained
        return {name: (0.02 * random.normal(size=a.shape)).astype(np.float32) for name, a in router.items()}


def _softmax(logits: Array) -> Array:
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))
