"""Linear and mixed chunk attention on a graphics card, where there is one: numbers against oracles, and the operators.

Skipped elsewhere, CI included; test_triton_linear.py and test_triton_chunks.py check what needs no card.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from codegen.device import DType
from codegen.launch import chunk_triton, linear_op
from codegen.launch.mixing_op import mix
from codegen.launch.torch_op import graphics_card
from codegen.ops.linear_attention import torch_body
from codegen.ops.linear_attention.triton_kernel import legal
from tests.kernels import chunk_problems, linear_problems
from tests.kernels.problems import TORCH
from tests.kernels.test_triton_chunks import SPECS as CHUNKS
from tests.kernels.test_triton_linear import BUILT, SPECS
from tests.unit.gated_problems import hidden_of, tensors, weights_of

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no graphics card")

LINEAR = SPECS | {f"real, {name}": spec for name, (spec, _) in BUILT.items()}
PAIRS = [(name, dtype) for name in LINEAR for dtype in DType if legal(LINEAR[name], dtype) is None]


@pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=[f"{name}-{dtype.short}" for name, dtype in PAIRS])
def test_linear_attention(name: str, dtype: DType) -> None:
    spec = LINEAR[name]
    x = linear_problems.draw(spec, TORCH[dtype], 2, 8 * spec.chunk + 3, 8 * spec.chunk + 3, hide=name == "learned")
    operands = [t.cuda() for t in (x.q, x.k, x.v)]
    named = {n: t.cuda() for n, t in x.parameters.items()}
    shown = None if x.shown is None else x.shown.cuda()
    found = linear_op.attention(spec, *operands, named, shown, kernels="triton").cpu()
    assert linear_problems.distance(spec, x, found) < linear_problems.K
    softer = replace(x, parameters={**x.parameters, "log_gain": x.parameters["log_gain"] - 6})
    assert linear_problems.distance(spec, softer, found) > linear_problems.K, "the control: far keys count"


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.short)
@pytest.mark.parametrize("name", CHUNKS)
def test_mixed_chunks(name: str, dtype: DType) -> None:
    arch = graphics_card(torch.device("cuda"))[0].arch
    for spec in (CHUNKS[name], replace(CHUNKS[name], expanded=320, base=64, chunk=128)):
        x = chunk_problems.draw(spec, TORCH[dtype], 2, 3 * spec.chunk + 5, hide=name == "both ways")
        bias, shown = (None if t is None else t.cuda() for t in (x.bias(spec), x.shown))
        heads = [h.cuda() for h in x.heads]
        found = chunk_triton.launch(spec, x.gate.cuda(), x.value.cuda(), heads, bias, shown, arch=arch).cpu()
        assert chunk_problems.distance(spec, x, found) < chunk_problems.K
        other = replace(x, heads=(*x.heads[:3], x.heads[3] * 3))
        assert chunk_problems.distance(spec, other, found) > chunk_problems.K, "the control: other linear keys"


def test_linear_attention_compiled_and_trained() -> None:
    spec = SPECS["learned, both ways"]
    x = linear_problems.draw(spec, torch.float32, 1, 70, 70)
    q, k, v = (t.cuda().requires_grad_() for t in (x.q, x.k, x.v))
    named = {n: t.cuda().requires_grad_() for n, t in x.parameters.items()}
    right = torch_body.linear_attention(spec, q, k, v, named)
    for call in (linear_op.attention, torch.compile(linear_op.attention)):
        found = call(spec, q, k, v, named, kernels="triton")
        assert (found - right).abs().max() < 1e-5
        for leaf in (k, named["key_map"]):
            (gradient,) = torch.autograd.grad(found.sum(), [leaf], retain_graph=True)
            (expected,) = torch.autograd.grad(right.sum(), [leaf], retain_graph=True)
            assert (gradient - expected).abs().max() < 1e-4


def test_mixed_chunk_attention_compiled_and_trained() -> None:
    spec = CHUNKS["causal"]
    weights = {n: t.cuda().requires_grad_() for n, t in tensors(weights_of(spec)).items()}
    x = torch.from_numpy(hidden_of(spec, 2, 50)).cuda()
    expected = mix(spec, x, weights, kernels="off")
    (wanted,) = torch.autograd.grad(expected.sum(), [weights["scale"]], retain_graph=True)
    for call in (mix, torch.compile(mix)):
        found = call(spec, x, weights, kernels="triton")
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        (gradient,) = torch.autograd.grad(found.sum(), [weights["scale"]], retain_graph=True)
        assert (gradient - wanted).abs().max() < 1e-3 * wanted.abs().max()
