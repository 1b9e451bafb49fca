"""Routed feed-forward blocks on a graphics card, where there is one: numbers against the oracle, and the operator.

Skipped elsewhere, CI included; test_triton_routed.py and test_routed_operator.py check what needs no card.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codegen.device import DType
from codegen.launch import routed_triton
from codegen.launch.feed_forward_op import conditional, mixture
from codegen.launch.torch_op import graphics_card
from tests.kernels.problems import TORCH
from tests.kernels.routed_problems import SPECS, K, distance, draw
from tests.kernels.test_routed_operator import BRANCHES, MIXTURES, parameters_of
from tests.kernels.test_triton_routed import BUILT

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no graphics card")

REAL = SPECS | {f"real, {name}": spec for name, (spec, _) in BUILT.items()}


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.short)
@pytest.mark.parametrize("name", REAL)
def test_numbers(name: str, dtype: DType) -> None:
    spec = REAL[name]
    arch = graphics_card(torch.device("cuda"))[0].arch
    for tokens, places in ((300, 5), (300, 150)):
        x = draw(spec, TORCH[dtype], tokens, places, based=spec.once)
        held = {n: p.cuda() for n, p in x.parameters.items()}
        base = None if x.base is None else x.base.cuda()
        operands = (x.x.cuda(), x.rows.cuda(), x.weights.cuda(), held, base)
        found = routed_triton.launch(spec, *operands, arch=arch)
        assert torch.equal(found, routed_triton.launch(spec, *operands, arch=arch)), "sums have one order"
        assert distance(spec, x, found.cpu()) < K
        assert distance(spec, replace(x, weights=x.weights * 1.2), found.cpu()) > K, "the control"


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_compiled_and_trained(name: str) -> None:
    spec = MIXTURES[name]
    held = {n: p.cuda().requires_grad_() for n, p in parameters_of(spec.shapes, torch.float32).items()}
    x = torch.randn(2, 9, 12, device="cuda")
    leaves = [held["router_weight"], held["up_weight"]]
    right = mixture(spec, x, held, kernels="off").output
    expected = torch.autograd.grad(right.sum(), leaves)
    for call in (mixture, torch.compile(mixture)):
        found = call(spec, x, held, kernels="triton").output
        assert (found - right).abs().max() < 1e-5 * right.abs().max()
        for gradient, wanted in zip(torch.autograd.grad(found.sum(), leaves), expected, strict=True):
            assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_heavy_branch_compiled_and_trained() -> None:
    held = {n: p.cuda().requires_grad_() for n, p in parameters_of(BRANCHES.shapes, torch.float32).items()}
    x = torch.randn(2, 11, 12, device="cuda")
    right = conditional(BRANCHES, x, held, soft=True, kernels="off")
    leaves = [held["router"], held["heavy_up_weight"], held["light_up_weight"]]
    expected = torch.autograd.grad(right.sum(), leaves)
    for call in (conditional, torch.compile(conditional)):
        found = call(BRANCHES, x, held, soft=True, kernels="triton")
        assert (found - right).abs().max() < 1e-5 * right.abs().max()
        for gradient, wanted in zip(torch.autograd.grad(found.sum(), leaves), expected, strict=True):
            assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max()
