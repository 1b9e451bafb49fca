"""Mixed chunk attention in Triton without a card: interpreted against the oracle, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from codegen.device import Device, DType, Language
from codegen.errors import NotLegal, UnsafeInput
from codegen.launch import chunk_operator
from codegen.launch.mixing_op import mix
from codegen.ops.mixed_chunk_attention import torch_body
from codegen.ops.mixed_chunk_attention.triton_kernel import kernel_name, legal, signatures, source, tiling
from codegen.registry import select
from codegen.spec import MixedChunkAttention, PositionBias
from codegen.toolchain.triton_aot import compile_kernel
from tests.covering import covering
from tests.kernels.chunk_problems import K, Operands, distance, draw
from tests.kernels.golden_source import require_golden
from tests.kernels.problems import TORCH
from tests.kernels.test_render import HOSTILE
from tests.kernels.test_triton_binaries import SHARED
from tests.unit.gated_problems import hidden_of, tensors, weights_of

pytest.importorskip("triton")

Run = Callable[..., Tensor]

SPECS = {
    "causal": MixedChunkAttention(8, 20, 6, chunk=16, causal=True),
    "causal, summed, biased": MixedChunkAttention(
        8, 70, 16, chunk=24, causal=True, averaged=False, bias=PositionBias.TOEPLITZ, span=9
    ),
    "both ways": MixedChunkAttention(8, 33, 16, chunk=20),
    "both ways, biased": MixedChunkAttention(8, 16, 4, chunk=7, bias=PositionBias.TOEPLITZ, span=7),
}


@pytest.fixture(scope="module")
def interpreted(triton_worker: Callable[..., Tensor]) -> Run:
    def run(spec: MixedChunkAttention, x: Operands) -> Tensor:
        described = {name: f.value if isinstance(f, Enum) else f for name, f in asdict(spec).items()}
        operands = (x.gate, x.value, *x.heads, x.bias(spec), x.shown)
        return triton_worker("chunks", described, operands, arch="sm_90")

    return run


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.short)
@pytest.mark.parametrize("name", SPECS)
def test_it_is_within_rounding_of_the_oracle(interpreted: Run, name: str, dtype: DType) -> None:
    spec = SPECS[name]
    x = draw(spec, TORCH[dtype], 1, 3 * spec.chunk + 5, hide=name != "causal")
    found = interpreted(spec, x)
    assert distance(spec, x, found) < K
    other = replace(x, heads=(*x.heads[:3], x.heads[3] * 1.5))
    assert distance(spec, other, found) > K, "the control: other linear keys"


@pytest.mark.parametrize("tokens", [1, 7, 8, 17])
def test_lengths_at_the_edges(interpreted: Run, tokens: int) -> None:
    for spec in (replace(SPECS["causal"], chunk=8), SPECS["both ways, biased"]):
        x = draw(spec, torch.float32, 2, tokens)
        assert distance(spec, x, interpreted(spec, x)) < K
    assert interpreted(spec, draw(spec, torch.float32, 2, 0)).shape == (2, 0, spec.expanded)


def test_nothing_later_and_nothing_hidden_arrives(interpreted: Run) -> None:
    spec = SPECS["causal"]
    x = draw(spec, torch.float32, 1, 40)
    later = replace(x, value=x.value.clone())
    later.value[:, 21:] *= 1000.0
    found, other = interpreted(spec, x), interpreted(spec, later)
    assert torch.equal(other[:, :21], found[:, :21])
    assert not torch.equal(other[:, 21:], found[:, 21:]), "the control"
    later.value[:, 21:] = torch.nan
    hidden = replace(later, shown=(torch.arange(40) < 21)[None])
    assert bool(interpreted(spec, hidden).isfinite().all())
    assert bool(interpreted(spec, later).isnan().any()), "the control"


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_those_of_the_torch_body(name: str) -> None:
    """What stands in for the kernel backward, with the projections around it, is the whole of the torch body."""
    spec = SPECS[name]
    weights, x = tensors(weights_of(spec)), torch.from_numpy(hidden_of(spec, 2, 45))
    gate, value, latent = torch_body.expanded(spec, x, weights)
    shown = torch.from_numpy(np.random.default_rng(0).random((2, 45)) < 0.7)
    bias = torch_body.learned_bias(spec, weights, like=latent)
    operands = [gate, value, *torch_body.heads(spec, latent, weights), bias, shown]
    product = chunk_operator.by_torch(operands, spec.chunk, spec.causal, spec.averaged)
    found = torch.nn.functional.linear(product, weights["out_weight"], weights["out_bias"])
    right = torch_body.mixed_chunk_attention(spec, x, weights, shown)
    assert (found - right).abs().max() < 1e-5 * right.abs().max()
    other = torch_body.mixed_chunk_attention(replace(spec, chunk=spec.chunk - 1), x, weights, shown)
    assert (found - other).abs().max() > 1e-3 * right.abs().max(), "the control"


def test_the_way_there() -> None:
    spec = SPECS["causal"]
    assert select(spec, Device("cuda", "sm_90"), DType.BFLOAT16, Language.TRITON) is not None
    assert "128" in str(legal(replace(spec, base=130), DType.BFLOAT16))
    weights, x = tensors(weights_of(spec)), torch.from_numpy(hidden_of(spec, 1, 20))
    for kernels in ("auto", "off"):
        assert torch.equal(mix(spec, x, weights, kernels=kernels), torch_body.mixed_chunk_attention(spec, x, weights))
    with pytest.raises(NotLegal, match="triton kernel"):
        mix(spec, x, weights, kernels="triton")


def test_an_exported_program_holds_the_operator() -> None:
    spec = SPECS["both ways, biased"]
    weights = tensors(weights_of(spec))

    class Mix(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mix(spec, x, weights, kernels="triton")

    program = torch.export.export(Mix(), (torch.from_numpy(hidden_of(spec, 1, 20)),), strict=False)
    (call,) = [n for n in program.graph.nodes if "rewriter.mixed_chunks" in str(n.target)]
    assert call.args[-3:] == (spec.chunk, False, True)


# ---------------------------------------------------------------------- binaries and sources

FLASH = MixedChunkAttention(768, 1536, 128, 256, causal=True)
BUILT = {
    "causal": (FLASH, DType.BFLOAT16),
    "both ways, biased": (replace(FLASH, causal=False, bias=PositionBias.TOEPLITZ), DType.BFLOAT16),
    "biased, float16": (replace(FLASH, bias=PositionBias.ROTARY), DType.FLOAT16),
    "float32": (FLASH, DType.FLOAT32),
}


@pytest.mark.parametrize(("name", "arch"), covering(tuple(BUILT), tuple(SHARED)))
def test_binaries_fit_and_spill_nothing(tmp_path: Path, name: str, arch: str) -> None:
    spec, dtype = BUILT[name]
    cut, kernel = tiling(spec, dtype, arch), str(kernel_name(spec, dtype, arch))
    path = tmp_path / f"{kernel}.py"
    path.write_text(source(spec, dtype, arch))
    for suffix, signature in signatures(spec, dtype).items():
        made = compile_kernel(path, kernel + suffix, signature, arch, warps=cut.warps, stages=cut.stages)
        found = made.resources
        assert (found.stack, found.spills) == (0, 0), found
        assert found.shared <= SHARED[arch] and found.matrix > 0 and found.vector_copies > 0, found


@pytest.mark.parametrize("name", ["causal", "both ways, biased"])
def test_golden_source(name: str) -> None:
    file = f"mixed_chunk_{name.split(',')[0].replace(' ', '_')}_bf16_sm_90.py.txt"
    require_golden(file, source(SPECS[name], DType.BFLOAT16, "sm_90"))


@pytest.mark.parametrize(
    "change",
    [{"expanded": 40}, {"base": 8}, {"chunk": 32}, {"causal": False}, {"bias": PositionBias.TOEPLITZ}],
    ids=str,
)
def test_every_field_that_counts_changes_the_source_and_the_name(change: dict[str, object]) -> None:
    """Others are of the projections, or of the running sums."""
    specs = (SPECS["causal"], replace(SPECS["causal"], **change))  # type: ignore[arg-type]
    names = [str(kernel_name(s, DType.BFLOAT16, "sm_90")) for s in specs]
    texts = [source(s, DType.BFLOAT16, "sm_90").replace(n, "NAME") for s, n in zip(specs, names, strict=True)]
    assert names[0] != names[1] and texts[0] != texts[1]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["chunk", "base", "causal"])
def test_nothing_but_numbers_and_flags_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = replace(SPECS["causal"])
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError)):
        source(spec, DType.BFLOAT16, "sm_90")
