"""The torch operator: eager, compiled, exported, differentiated, and when it leaves the work to torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.device import DType
from codegen.errors import NoCompiler, NotLegal
from codegen.launch import torch_op
from codegen.launch.torch_op import attention
from codegen.ops.grouped_query_attention import torch_body
from codegen.spec import GroupedQueryAttention
from codegen.tuning import table
from tests.kernels.problems import BIASED, CAUSAL, EVERYTHING, PLAIN, SINKS, here, operands

pytestmark = pytest.mark.skipif(not here(), reason="no instruction set that there are kernels for")

SPECS = {"plain": PLAIN, "causal": CAUSAL, "biased": BIASED, "sinks": SINKS, "everything": EVERYTHING}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuning table by which a kernel always wins."""
    monkeypatch.setattr(torch_op, "faster", lambda *_: True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = torch_op.launch

    def spy(kernel: Any, *rest: Any) -> Tensor:
        seen.append(kernel.name)
        return real(kernel, *rest)

    monkeypatch.setattr(torch_op, "launch", spy)
    return seen


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bias", ["additive", "boolean"])
def test_the_operator_is_the_torch_body(name: str, bias: str, launches: list[str]) -> None:
    spec = SPECS[name]
    x = operands(spec, torch.float32, 2, 33, 33, bias=bias)
    if x.bias is not None and x.bias.dtype == torch.bool:
        x.bias[0] = False  # a row of the batch that is all padding: what becomes of it is torch's to say
    ours = attention(spec, x.q, x.k, x.v, x.bias, sinks=x.sinks, kernels="cpp")
    theirs = torch_body.grouped_query_attention(spec, x.q, x.k, x.v, x.bias, sinks=x.sinks)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    assert len(launches) == 1
    off = attention(spec, x.q, x.k, x.v, x.bias, sinks=x.sinks, kernels="off")
    assert len(launches) == 1 and torch.equal(off.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_the_operator_passes_torchs_own_checks(name: str) -> None:
    spec = SPECS[name]
    x = operands(spec, torch.float32, 1, 4, 6)
    numbers = (spec.kv_heads, spec.scale, spec.causal, spec.softcap, spec.masked_rows_are_zero, [], "cpp")
    q, k, v = (t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v))
    torch.library.opcheck(torch_op._operator, (q, k, v, x.bias, x.sinks, *numbers))


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_the_torch_bodys(name: str) -> None:
    spec = SPECS[name]
    x = operands(spec, torch.float32, 2, 9, 9)
    found = []
    for run in (attention, torch_body.grouped_query_attention):
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
        more: dict[str, Any] = {"kernels": "cpp"} if run is attention else {}
        output = run(spec, *leaves, x.bias, sinks=x.sinks, **more)
        weight = torch.arange(output.numel(), dtype=torch.float32).reshape(output.shape) / output.numel()
        found.append(torch.autograd.grad((output * weight).sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert theirs.abs().max() > 1e-3


class _Layer(torch.nn.Module):
    def __init__(self, spec: GroupedQueryAttention, kernels: str) -> None:
        super().__init__()
        self.spec, self.kernels = spec, kernels

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(self.spec, q * 2.0, k, v, kernels=self.kernels).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kernels", ["cpp", "auto"])
def test_compiled_without_a_break(kernels: str, always: None, launches: list[str]) -> None:
    x = operands(CAUSAL, torch.float32, 1, 20, 20)
    layer = _Layer(CAUSAL, kernels)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (20, 31):
            x = operands(CAUSAL, torch.float32, 1, tokens, tokens)
            torch.testing.assert_close(compiled(x.q, x.k, x.v), layer(x.q, x.k, x.v))
    assert len(launches) == 4


def test_exported_by_name_it_keeps_the_operator_and_free_lengths(launches: list[str]) -> None:
    x = operands(CAUSAL, torch.float32, 1, 20, 20)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    shapes = {name: {2: tokens} for name in ("q", "k", "v")}
    with torch.no_grad():
        program = torch.export.export(_Layer(CAUSAL, "cpp"), (x.q, x.k, x.v), dynamic_shapes=shapes, strict=False)
    assert "rewriter.grouped_query_attention" in str(program.graph)
    y = operands(CAUSAL, torch.float32, 1, 77, 77)
    theirs = _Layer(CAUSAL, "off")(y.q, y.k, y.v)
    torch.testing.assert_close(program.module()(y.q, y.k, y.v), theirs, rtol=1e-4, atol=1e-5)
    assert len(launches) == 1


def test_exported_by_default_it_holds_torchs_own_operators(always: None) -> None:
    x = operands(CAUSAL, torch.float32, 1, 20, 20)
    with torch.no_grad():
        program = torch.export.export(_Layer(CAUSAL, "auto"), (x.q, x.k, x.v), strict=False)
    assert "rewriter" not in str(program.graph)


def test_auto_asks_the_table(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    x = operands(CAUSAL, torch.float32, 1, 20, 20)
    answers = []
    monkeypatch.setattr(torch_op, "faster", lambda *asked: answers.append(asked) or False)
    with torch.no_grad():
        attention(CAUSAL, x.q, x.k, x.v)
        assert not launches and answers[0][3] == table.Problem(1, 20, 20, torch.get_num_threads())
        monkeypatch.setattr(torch_op, "faster", lambda *_: True)
        attention(CAUSAL, x.q, x.k, x.v)
        assert len(launches) == 1


def test_auto_leaves_training_dropout_autocast_and_other_dtypes_to_torch(always: None, launches: list[str]) -> None:
    x = operands(CAUSAL, torch.float32, 1, 20, 20)
    attention(CAUSAL, x.q.requires_grad_(), x.k, x.v)
    x.q.requires_grad_(False)
    attention(CAUSAL, x.q, x.k, x.v, dropout=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        attention(CAUSAL, x.q, x.k, x.v)
    attention(CAUSAL, x.q.double(), x.k.double(), x.v.double())
    assert not launches
    attention(CAUSAL, x.q, x.k, x.v)
    assert len(launches) == 1


def test_without_a_compiler_auto_warns_once_and_goes_on(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise NoCompiler("there is no C++ compiler")

    monkeypatch.setattr(torch_op, "load", refuse)
    torch_op._warn_once.cache_clear()
    x = operands(CAUSAL, torch.float32, 1, 20, 20)
    with pytest.warns(UserWarning, match="no kernel could be built"):
        found = attention(CAUSAL, x.q, x.k, x.v)
    torch.testing.assert_close(found, attention(CAUSAL, x.q, x.k, x.v, kernels="off"))
    with pytest.raises(NoCompiler):
        attention(CAUSAL, x.q, x.k, x.v, kernels="cpp")


def test_asked_for_by_name_what_is_not_legal_is_an_error() -> None:
    x = operands(CAUSAL, torch.float32, 1, 3, 3)
    with pytest.raises(NotLegal, match="float64"):
        attention(CAUSAL, x.q.double(), x.k.double(), x.v.double(), kernels="cpp")
    wide = replace(CAUSAL, head_dim=600)
    with pytest.raises(NotLegal, match="512"):
        q, k = torch.zeros(1, 6, 1, 600), torch.zeros(1, 6, 2, 600)
        attention(wide, q, k, x.v[:, :, :2], kernels="cpp")
    with pytest.raises(ValueError, match="do not fit"):
        attention(CAUSAL, x.q, x.k[:, :3], x.v, kernels="cpp")


def test_a_module_with_kernels_can_be_copied() -> None:
    layer = copy.deepcopy(_Layer(PLAIN, "cpp"))
    x = operands(PLAIN, torch.float32, 1, 3, 3)
    assert layer(x.q, x.k, x.v).shape == (1, 3, 512)


# ---------------------------------------------------------------------- the table


def _measured(**more: Any) -> table.Measured:
    line = {"dtype": "float32", "isa": "avx2", "regime": "decode", "group": 4, "head_dim": 64, "work": 1e9}
    return table.Measured(**{**line, "speedup": 2.0, **more})


def test_a_problem_is_judged_by_the_measured_one_most_like_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (_measured(), _measured(group=1, speedup=1.05), _measured(regime="prefill", speedup=3.0))
    monkeypatch.setattr(table, "measurements", lambda: lines)
    table.faster.cache_clear()
    problem = table.Problem(16, 1, 4096, 2)

    def wins(group: int, problem: table.Problem = problem, dtype: DType = DType.FLOAT32, isa: str = "avx2") -> bool:
        return table.faster(GroupedQueryAttention(32, 32 // group, 64, 64, 0.1), dtype, isa, problem)

    assert wins(4) and wins(8) and not wins(1), "too small a gain is none"
    assert not wins(4, dtype=DType.BFLOAT16) and not wins(4, isa="avx512"), "nothing like it was measured"
    assert not wins(4, table.Problem(1, 1, 8, 2)), "far smaller than anything measured"
    table.faster.cache_clear()


def test_a_masked_problem_is_judged_by_a_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (_measured(isa="sm_90", speedup=1.0), _measured(isa="sm_90", bias=True, head_dim=128, speedup=3.0))
    monkeypatch.setattr(table, "measurements", lambda: lines)
    table.faster.cache_clear()
    problem, plain = table.Problem(16, 1, 4096, 0), GroupedQueryAttention(32, 8, 64, 64, 0.1)
    assert table.faster(replace(plain, bias=True), DType.FLOAT32, "sm_90", problem)
    assert not table.faster(plain, DType.FLOAT32, "sm_90", problem)
    table.faster.cache_clear()


def test_a_processor_with_matrix_units_has_a_table_of_its_own() -> None:
    """Both sides' bfloat16 products use them, so another processor's figures mislead."""
    found = {isa: [m for m in table.measurements() if m.isa == isa] for isa in ("avx512_bf16", "avx512_bf16_amx")}
    assert all(any(m.dtype == "bfloat16" and m.regime == "prefill" for m in lines) for lines in found.values())


def test_the_table_that_ships_can_be_read() -> None:
    for line in table.measurements():
        assert line.regime in {"decode", "prefill"} and line.speedup > 0 and line.work > 0
