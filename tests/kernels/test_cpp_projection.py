"""The C++ kernel of a linear layer with its activation against the float64 oracle."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from codegen.activation import Activation
from codegen.device import DType, Isa, host
from codegen.errors import NotLegal, UnsafeInput
from codegen.launch import projection_host
from codegen.launch.host import ProjectionLaunch, load
from codegen.ops.projection.cpp_kernel import kernel_name, source
from codegen.ops.projection.reference import projection
from codegen.projection import Projection
from tests.kernels.golden_source import require_golden
from tests.kernels.problems import choice, here
from tests.kernels.test_render import HOSTILE

needs_kernels = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

CLOSE = 4.0
"""In units of what rounding makes of sums; see `distance`."""

SPECS = {
    "odd": Projection(19, 37, Activation.SILU),
    "several blocks": Projection(800, 130),  # of weights, in both directions
    "one": Projection(1, 1, Activation.GELU),
}


def draw(spec: Projection, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((batch, tokens, spec.inputs), (spec.outputs, spec.inputs), (spec.outputs,))
    x, weight, bias = (torch.randn(s, generator=random) for s in shapes)
    return x, weight / spec.inputs**0.5, bias


def distance(spec: Projection, found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The largest error in units of what rounding makes of sums; activations stretch by little more than one."""
    parts = [t.double().numpy() for t in (x, weight)] + ([] if bias is None else [bias.double().numpy()])
    right = projection(spec, *parts)
    floor = projection(replace(spec, activation=None), *(np.abs(part) for part in parts)) * 2.0**-23
    return float((np.abs(found.double().numpy() - right) / floor).max())


@needs_kernels
@pytest.mark.parametrize("name", SPECS)
def test_it_is_the_oracle(name: str) -> None:
    """Tokens of less than a vector, of several tasks, and none; parts of larger tensors; no bias."""
    spec = SPECS[name]
    for batch, tokens in ((2, 1), (1, 9), (2, 261)):
        x, weight, bias = draw(spec, batch, tokens)
        for added in (bias, None):
            assert distance(spec, projection_host.launch(spec, x, weight, added), x, weight, added) < CLOSE
        around = torch.full((batch, tokens + 2, spec.outputs + 3), 7.0)
        spread = torch.cat((x, x, x), dim=2)[:, :, spec.inputs : 2 * spec.inputs]
        wide = torch.cat((weight, weight), dim=1)[:, : spec.inputs]
        projection_host.launch(spec, spread, wide, bias, out=around[:, 1:-1, 1:-2])
        assert distance(spec, around[:, 1:-1, 1:-2], x, weight, bias) < CLOSE
        around[:, 1:-1, 1:-2] = 7
        assert (around == 7).all(), "nothing beside the result is written"
    assert projection_host.launch(spec, x[:, :0], weight, bias).shape == (2, 0, spec.outputs)
    other = replace(spec, activation=Activation.TANH)  # the control
    assert distance(other, projection_host.launch(spec, x, weight, bias), x, weight, bias) > 1e3


@needs_kernels
def test_results_are_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["several blocks"]
    x, weight, bias = draw(spec, 2, 300)
    alone = projection_host.launch(spec, x, weight, bias)
    for threads in (2, 5, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(projection_host.launch(spec, x, weight, bias), alone)
    assert not torch.equal(projection_host.launch(spec, x, weight, bias + 1e-3), alone)  # the control


@needs_kernels
def test_what_is_said_of_scratch_and_what_it_refuses() -> None:
    spec = SPECS["odd"]
    made = choice(spec, DType.FLOAT32, Isa(host().arch))
    assert load(made).plan(ctypes.byref(ProjectionLaunch(threads=1))) == made.resources()["scratch_bytes"]
    x, weight, bias = draw(spec, 1, 3)
    with pytest.raises(NotLegal, match="float64"):
        projection_host.launch(spec, x.double(), weight.double(), bias.double())
    with pytest.raises(NotLegal, match="bfloat16"):
        projection_host.launch(spec, x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    with pytest.raises(NotLegal, match="16384"):
        wide = Projection(20_000, 1)
        projection_host.launch(wide, *draw(wide, 1, 1))
    with pytest.raises(ValueError, match="contradict"):
        projection_host.launch(spec, x, weight.T, bias)
    with pytest.raises(ValueError, match="does not fit"):
        projection_host.launch(spec, x, weight, bias, out=torch.empty(1, 4, spec.outputs))


def test_golden_source() -> None:
    require_golden("projection_f32_avx512.cpp", source(SPECS["odd"], DType.FLOAT32, Isa.AVX512))


@pytest.mark.parametrize("change", [{"inputs": 20}, {"outputs": 36}, {"activation": None}], ids=str)
def test_every_field_changes_the_source_and_the_name(change: dict[str, object]) -> None:
    specs = (SPECS["odd"], replace(SPECS["odd"], **change))  # type: ignore[arg-type]
    names = [str(kernel_name(s, DType.FLOAT32, Isa.AVX2)) for s in specs]
    first, second = (source(s, DType.FLOAT32, Isa.AVX2).replace(n, "") for s, n in zip(specs, names, strict=True))
    assert names[0] != names[1]
    assert first.partition("#include")[2] != second.partition("#include")[2]


@pytest.mark.parametrize("hostile", HOSTILE[:2], ids=range(2))
def test_nothing_but_numbers_comes_through(hostile: object) -> None:
    spec = replace(SPECS["odd"])
    object.__setattr__(spec, "inputs", hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.FLOAT32, Isa.AVX2)
