"""Routed feed-forward blocks: problems, and rows of `benchmarks.kernels` and `benchmarks.gpu`.

The C++ kernel stands beside the torch body, which gathers, multiplies as a batch and adds up by index, and beside what
such a body's matrix products take by themselves, gathered tokens given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Clock, Row, interleaved
from codegen.activation import Activation
from codegen.launch.routed_host import launch
from codegen.ops.routed_feed_forward.torch_body import routed_feed_forward
from codegen.routed import RoutedFeedForward

Call = Callable[[], Tensor]
BODY, PRODUCTS = "the torch body", "torch's products alone"

SPLIT = RoutedFeedForward(768, 192, 16, Activation.GELU, up_bias=True)
"""BERT's block cut in 16 experts."""
MIXER = RoutedFeedForward(512, 2048, 16, Activation.GELU_TANH, up_bias=True, down_bias=True)
"""Experts of Sparse Mixer."""
HEAVY = RoutedFeedForward(768, 2048, 1, Activation.GELU_TANH, gated=True, once=True)
"""CoLT5's heavy branch."""


@dataclass(frozen=True)
class Case:
    """One problem: `places` of each expert, all taken."""

    name: str
    spec: RoutedFeedForward
    tokens: int
    places: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        spec, dtype = self.spec, str(self.dtype).removeprefix("torch.")
        sizes = f"{spec.experts} of {spec.hidden} and {spec.inner} features"
        return f"routed feed-forward, {self.name}, {self.tokens} tokens, {self.places} places, {sizes}, {dtype}"

    def operands(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """x, rows, weights and parameters."""
        random = torch.Generator().manual_seed(0)
        each = [torch.randperm(self.tokens, generator=random)[: self.places] for _ in range(self.spec.experts)]
        x, weights = (
            torch.randn(s, generator=random) for s in ((self.tokens, self.spec.hidden), (len(each), self.places))
        )
        held = {n: torch.randn(s, generator=random) / s[1] ** 0.5 for n, s in self.spec.shapes.items()}
        parameters = {name: p.to(device, self.dtype) for name, p in held.items()}
        return x.to(device, self.dtype), torch.stack(each).to(device), weights.to(device), parameters


def cases(*, quick: bool) -> list[Case]:
    """On processors."""
    found = [
        Case("split block", SPLIT, 512, 256),
        Case("experts", MIXER, 1024, 64),
        Case("heavy branch", HEAVY, 2048, 128),
    ]
    return found if quick else [*found, *(Case(c.name, c.spec, c.tokens, c.places, torch.bfloat16) for c in found)]


def run_case(case: Case, runs: int, threads: int, clock: Clock) -> list[Row]:
    """Rows of one case: beside the torch body, beside its products alone, and the error beside double precision."""
    x, rows, weights, held = case.operands()
    peers = {BODY: lambda: routed_feed_forward(case.spec, x, rows, weights, held), PRODUCTS: _products(case)}

    def ours() -> Tensor:
        return launch(case.spec, x, rows, weights, held)

    wide = {name: p.double() for name, p in held.items()}
    right = routed_feed_forward(case.spec, x.double(), rows, weights.double(), wide)
    error, theirs = (float((f().double() - right).abs().max() / right.abs().max()) for f in (ours, peers[BODY]))
    mine, *others = interleaved(runs, ours, *peers.values(), clock=clock)
    found = []
    for name, t in zip(peers, others, strict=True):
        more: dict[str, Any] = {"kind": "routed", "error": error, "ours_median": mine.median * 1e3}
        more |= {"peer_median": t.median * 1e3, "best_peer": name == BODY, "peer_differs_by": theirs}
        ms = (mine.minimum * 1e3, t.minimum * 1e3)
        found.append(Row("time", str(case), *ms, name, "ms", ms[1] / ms[0], None, None, more))
    return found


def _products(case: Case) -> Call:
    x, rows, _, held = case.operands()
    given, inner = x[rows], torch.randn(*rows.shape, case.spec.inner).to(x.dtype)
    ups = [held[name] for name in ("gate_weight", "up_weight") if name in held]

    def run() -> Tensor:
        for matrix in ups:
            given @ matrix
        return inner @ held["down_weight"]

    return run


def tuned_cases() -> list[Case]:
    """Few and many places, on processors."""
    few = [Case(c.name, c.spec, c.tokens // 4, c.places // 4) for c in cases(quick=True)]
    return [*few, *cases(quick=True), Case("split block", SPLIT, 32, 16)]


def card_cases(*, quick: bool) -> list[Case]:
    """On graphics cards."""
    found = [
        Case("split block", SPLIT, 8192, 4096, torch.bfloat16),
        Case("experts", MIXER, 8192, 512, torch.bfloat16),
        Case("heavy branch", HEAVY, 16384, 1024, torch.bfloat16),
    ]
    return found[:1] if quick else found


def card_works(case: Case) -> tuple[dict[str, Call], float]:
    """The kernel and what runs otherwise, on a card; and the kernel's error beside double precision, relative to the
    largest output."""
    from codegen.launch import routed_triton
    from codegen.launch.torch_op import graphics_card

    x, rows, weights, held = case.operands("cuda")
    arch = graphics_card(x.device)[0].arch
    works: dict[str, Call] = {
        "ours": lambda: routed_triton.launch(case.spec, x, rows, weights, held, arch=arch),
        "the torch body": lambda: routed_feed_forward(case.spec, x, rows, weights, held),
    }
    wide = {name: p.double() for name, p in held.items()}
    right = routed_feed_forward(case.spec, x.double(), rows, weights.double(), wide)
    return works, float((works["ours"]().double() - right).abs().max() / right.abs().max())
