"""Linear attention in Triton without a graphics card: interpreted against the oracle, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codegen.device import Device, DType, Language
from codegen.errors import NotLegal, UnsafeInput
from codegen.launch import linear_op, linear_operator
from codegen.ops.grouped_query_attention.triton_kernel import WARPGROUP_ARCHS
from codegen.ops.linear_attention import torch_body
from codegen.ops.linear_attention.triton_kernel import kernel_name, legal, signatures, source, tiling
from codegen.registry import select
from codegen.spec import FeatureMap, GroupedQueryAttention, LinearAttention
from codegen.toolchain.triton_aot import compile_kernel
from tests.covering import covering
from tests.kernels.golden_source import require_golden
from tests.kernels.linear_problems import K, Operands, distance, draw
from tests.kernels.problems import TORCH
from tests.kernels.test_render import HOSTILE
from tests.kernels.test_triton_binaries import SHARED

pytest.importorskip("triton")

Run = Callable[..., Tensor]


def spec_of(
    heads: int, kv_heads: int, dim: int, value: int, chunk: int, features: FeatureMap, *, causal: bool = True
) -> LinearAttention:
    plain = GroupedQueryAttention(heads, kv_heads, dim, value, dim**-0.5, causal=causal, masked_rows_are_zero=True)
    return LinearAttention(plain, chunk, features)


SPECS = {
    "learned": spec_of(4, 2, 6, 5, 4, FeatureMap.LEARNED),
    "learned, both ways": spec_of(2, 1, 16, 16, 16, FeatureMap.LEARNED, causal=False),
    "one head of keys": spec_of(8, 1, 8, 8, 24, FeatureMap.LEARNED),
    "elu": spec_of(2, 2, 20, 8, 20, FeatureMap.ELU1),
    "elu, both ways": spec_of(3, 3, 7, 9, 5, FeatureMap.ELU1, causal=False),
    "favor": spec_of(2, 1, 24, 8, 16, FeatureMap.FAVOR),
    "favor, both ways": spec_of(2, 2, 8, 8, 7, FeatureMap.FAVOR, causal=False),
}


@pytest.fixture(scope="module")
def interpreted(triton_worker: Callable[..., Tensor]) -> Run:
    def run(spec: LinearAttention, x: Operands) -> Tensor:
        described = {**asdict(spec), "features": spec.features.value}
        parameters = [x.parameters.get(name) for name in linear_operator.PARAMETERS]
        return triton_worker("linear", described, (x.q, x.k, x.v, x.shown, *parameters), arch="sm_90")

    return run


@pytest.mark.parametrize(("name", "dtype"), covering(tuple(SPECS), tuple(DType)))
def test_it_is_within_rounding_of_the_oracle(interpreted: Run, name: str, dtype: DType) -> None:
    spec = SPECS[name]
    if legal(spec, dtype) is not None:
        assert (spec.features, dtype) == (FeatureMap.FAVOR, DType.FLOAT16)
        return
    x = draw(spec, TORCH[dtype], 1, 5 * spec.chunk + 2, 5 * spec.chunk + 2, hide=name == "learned")
    found = interpreted(spec, x)
    assert distance(spec, x, found) < K
    softer = {**x.parameters, "log_gain": x.parameters["log_gain"] - 6}
    assert distance(spec, replace(x, parameters=softer), found) > K, "the control: far keys count"


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (1, 1), (3, 3), (1, 19), (6, 23), (8, 8)])
def test_lengths_at_the_edges(interpreted: Run, queries: int, keys: int) -> None:
    for spec in (SPECS["learned"], replace(SPECS["elu, both ways"], chunk=4)):
        x = draw(spec, torch.float32, 2, queries, keys, hide=True)
        assert distance(spec, x, interpreted(spec, x)) < K


def test_queries_that_see_nothing_give_zeros_and_hidden_values_never_spread(interpreted: Run) -> None:
    spec = SPECS["learned"]
    x = draw(spec, torch.float32, 1, 30, 30)
    shown = torch.ones(1, 30, dtype=torch.bool)
    shown[:, :13] = False
    x = replace(x, shown=shown, v=x.v.clone())
    x.v[:, :, :13] = torch.nan
    found = interpreted(spec, x)
    assert bool((found[:, :, :13] == 0).all()) and bool(found.isfinite().all())
    assert bool(interpreted(spec, replace(x, shown=None)).isnan().any()), "the control"


def test_the_way_there() -> None:
    spec = SPECS["learned"]
    assert select(spec, Device("cuda", "sm_90"), DType.BFLOAT16, Language.TRITON) is not None
    assert "more than 128" in str(legal(spec_of(2, 2, 160, 8, 4, FeatureMap.ELU1), DType.BFLOAT16))
    assert "more than 64" in str(legal(spec_of(2, 2, 8, 80, 4, FeatureMap.ELU1), DType.FLOAT32))
    x = draw(spec, torch.float32, 1, 9, 9)
    for kernels in ("auto", "off"):
        found = linear_op.attention(spec, x.q, x.k, x.v, x.parameters, kernels=kernels)
        assert torch.equal(found, torch_body.linear_attention(spec, x.q, x.k, x.v, x.parameters))
    with pytest.raises(NotLegal, match="triton kernel"):
        linear_op.attention(spec, x.q, x.k, x.v, x.parameters, kernels="triton")


def test_an_exported_program_holds_the_operator() -> None:
    spec = SPECS["favor"]
    x = draw(spec, torch.float32, 1, 40, 40)

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return linear_op.attention(spec, q, k, v, x.parameters, kernels="triton")

    program = torch.export.export(Attend(), (x.q, x.k, x.v), strict=False)
    (call,) = [n for n in program.graph.nodes if "rewriter.linear_attention" in str(n.target)]
    assert call.args[-2:] == (spec.chunk, list(FeatureMap).index(FeatureMap.FAVOR))


# ---------------------------------------------------------------------- binaries and sources

BUILT = {
    "learned": (spec_of(32, 8, 64, 64, 64, FeatureMap.LEARNED), DType.BFLOAT16),
    "learned, wide": (spec_of(32, 8, 128, 128, 64, FeatureMap.LEARNED), DType.BFLOAT16),
    "elu": (spec_of(12, 12, 64, 64, 64, FeatureMap.ELU1, causal=False), DType.FLOAT16),
    "favor": (spec_of(32, 8, 64, 64, 64, FeatureMap.FAVOR), DType.BFLOAT16),
    "learned, float32": (spec_of(12, 12, 64, 64, 64, FeatureMap.LEARNED), DType.FLOAT32),
}


KINDS = {"states": "_states", "attention": ""}
KNOWN_SPILLS = {("favor", "sm_80", "states"), ("learned, float32", "sm_80", "states")}
"""What docs/kernels.md says of such cards; each is looked at, and must still spill."""


@pytest.mark.parametrize(
    ("name", "arch", "kind"), covering(tuple(BUILT), tuple(SHARED), tuple(KINDS), also=KNOWN_SPILLS)
)
def test_binaries_fit_and_spill_nothing(tmp_path: Path, name: str, arch: str, kind: str) -> None:
    if name == "learned, wide" and arch not in WARPGROUP_ARCHS:
        pytest.skip("learned features of 128 spill there, as docs/kernels.md says")
    (spec, dtype), suffix = BUILT[name], KINDS[kind]
    cut, kernel = tiling(spec, dtype, arch), str(kernel_name(spec, dtype, arch))
    path = tmp_path / f"{kernel}.py"
    path.write_text(source(spec, dtype, arch))
    made = compile_kernel(
        path, kernel + suffix, signatures(spec, dtype)[suffix], arch, warps=cut.warps, stages=cut.stages
    )
    found = made.resources
    assert ((found.stack, found.spills) != (0, 0)) is ((name, arch, kind) in KNOWN_SPILLS), found
    assert found.shared <= SHARED[arch] and found.matrix > 0 and found.vector_copies > 0, found


@pytest.mark.parametrize("name", ["learned", "favor, both ways"])
def test_golden_source(name: str) -> None:
    file = f"linear_{name.split(',')[0]}_bf16_sm_90.py.txt"
    require_golden(file, source(SPECS[name], DType.BFLOAT16, "sm_90"))


@pytest.mark.parametrize("field", ["chunk", "features", "heads", "head_dim", "value_dim", "scale", "causal"])
def test_every_field_changes_the_source_and_the_name(field: str) -> None:
    spec = SPECS["learned"]
    changes = {"chunk": 9, "features": FeatureMap.ELU1, "heads": 8, "head_dim": 7, "value_dim": 6, "scale": 0.5}
    changes["causal"] = False
    if field in ("chunk", "features"):
        other = replace(spec, **{field: changes[field]})  # type: ignore[arg-type]
    else:
        other = replace(spec, attention=replace(spec.attention, **{field: changes[field]}))  # type: ignore[arg-type]
    names = [str(kernel_name(s, DType.BFLOAT16, "sm_90")) for s in (spec, other)]
    texts = [source(s, DType.BFLOAT16, "sm_90").replace(n, "NAME") for s, n in zip((spec, other), names, strict=True)]
    assert names[0] != names[1] and texts[0] != texts[1]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("field", ["chunk", "features"])
def test_nothing_but_numbers_and_enums_comes_through_a_spec(field: str, hostile: object) -> None:
    spec = replace(SPECS["learned"])
    object.__setattr__(spec, field, hostile)
    with pytest.raises((UnsafeInput, TypeError, AttributeError, ValueError)):
        source(spec, DType.BFLOAT16, "sm_90")
