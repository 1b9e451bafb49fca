"""``torch.compile(model, backend="rewriter")``: exact on tied twins at any size, parameters watched, no silence."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.compile_backend import TARGET_VARIABLE, NotRewritten, backend
from rewriter.install import fx_graph
from tests.targets.lossless_twin import distance, legal_pool, tied
from tests.zoo.case import ZooCase
from tests.zoo.models import ZOO

SIZES = [(2, 7, 0), (3, 9, 1)]
EXACT, MOVED = 1e-4, 1e-2
NAMES = ["nanogpt-sdpa", "bert-sdpa", "llama-gqa-sdpa", "mha-batch-first", "t5-sdpa"]
ALIKE = ("bert-sdpa", "t5-sdpa")
"""Whose graphs of another size, which take half a minute, prove no more than those of the others."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites each rewrite installed."""
    counts: list[int] = []
    real = fx_graph.rewrite_exported_program

    def counting(*args: Any, **kwargs: Any) -> Any:
        done = real(*args, **kwargs)
        counts.append(len(done.replacements))
        return done

    monkeypatch.setattr("rewriter.compile_backend.rewrite_exported_program", counting)
    return counts


def compiled(module: nn.Module, heads: int, **more: Any) -> Any:
    made: Any = torch.compile(module, backend="rewriter", options={"target": f"gqa{heads}", "backend": "eager", **more})
    return made


def call(case: ZooCase, function: Any, module: nn.Module, size: tuple[int, int, int]) -> Tensor:
    constants: dict[str, Any] = {"use_cache": False} if getattr(getattr(module, "config", None), "use_cache", 0) else {}
    return case.run(function, {**case.inputs(*size), **constants})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(pytest.param(n, SIZES, id=n, marks=[pytest.mark.exhaustive] if n in ALIKE else []) for n in NAMES),
        *(pytest.param(n, SIZES[:1], id=f"{n}-one size") for n in ALIKE),
    ],
)
def test_a_tied_twin_is_equal_at_every_size_and_a_perturbed_one_is_not(
    name: str, sizes: list[tuple[int, int, int]], rewritten: list[int]
) -> None:
    case = ZOO[name]
    module = tied(case)
    fast = compiled(module, legal_pool(case))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotRewritten)
        for size in sizes:
            assert distance(call(case, fast, module, size), call(case, module, module, size)) < EXACT
        done = len(rewritten)
        assert rewritten == [case.sites] * done and 1 <= done <= len(sizes), "two graphs: one static, one dynamic"
        case.perturb(module)  # in place: the same parameters, with other numbers
        assert distance(call(case, fast, module, sizes[-1]), call(case, module, module, sizes[-1])) > MOVED
        assert len(rewritten) == done + 1, "merged anew"


def test_merged_weights_follow_the_model_and_are_not_merged_twice(rewritten: list[int]) -> None:
    case = ZOO["nanogpt-sdpa"]
    module = tied(case)
    fast = compiled(module, legal_pool(case))
    for _ in range(3):
        call(case, fast, module, SIZES[0])
    assert len(rewritten) == 1
    other = tied(case)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    module.load_state_dict(other.state_dict())
    assert distance(call(case, fast, module, SIZES[0]), case.run(other, case.inputs(*SIZES[0]))) < EXACT
    assert len(rewritten) == 2


def test_one_layer_can_be_selected(rewritten: list[int]) -> None:
    case = ZOO["bert-sdpa"]
    module = tied(case)
    fast = compiled(module, legal_pool(case), layers="1")
    assert distance(call(case, fast, module, SIZES[0]), call(case, module, module, SIZES[0])) < EXACT
    assert rewritten == [1]


@pytest.mark.slow
def test_inductor_compiles_what_was_rewritten(rewritten: list[int]) -> None:
    case = ZOO["nanogpt-sdpa"]
    module = tied(case)
    fast: Any = torch.compile(module, backend="rewriter", options={"target": "gqa2", "backend": "inductor"})
    assert distance(call(case, fast, module, SIZES[0]), call(case, module, module, SIZES[0])) < EXACT
    assert rewritten == [2]
    case.perturb(module)
    assert distance(call(case, fast, module, SIZES[0]), call(case, module, module, SIZES[0])) > MOVED


# ------------------------------------------------------------------ what is left as it is


def unchanged(case: ZooCase, module: nn.Module, heads: int, reason: str) -> None:
    with pytest.warns(NotRewritten, match=reason):
        result = case.run(compiled(module, heads), case.inputs(*SIZES[0]))
    assert distance(result, case.run(module, case.inputs(*SIZES[0]))) < EXACT


def test_attention_that_is_refused_runs_unchanged_and_says_why() -> None:
    case = ZOO["deberta-eager"]
    unchanged(case, case.build(), 2, "computed from hidden states")


def test_a_cache_that_leaves_the_graph_keeps_its_shape() -> None:
    case = ZOO["llama-sdpa"]
    unchanged(case, case.build(), 2, "use_cache=False")


def test_the_fused_encoder_layer_says_how_to_switch_it_off(rewritten: list[int]) -> None:
    case = ZOO["torch-encoder"]
    module = tied(case)
    unchanged(case, module, 2, "set_fastpath_enabled")
    torch.compiler.reset()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        fast = compiled(module, 2)
        assert distance(call(case, fast, module, SIZES[0]), call(case, module, module, SIZES[0])) < EXACT
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert rewritten == [2]


def test_training_runs_unchanged() -> None:
    case = ZOO["nanogpt-sdpa"]
    module = case.build()
    with pytest.warns(NotRewritten, match="gradients are recorded"):
        result = compiled(module, 2)(**case.inputs(*SIZES[0]))
    result.square().mean().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert distance(result.detach(), case.run(module, case.inputs(*SIZES[0]))) < EXACT


def test_a_graph_without_attention_is_handed_on_in_silence() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", NotRewritten)
        assert torch.equal(compiled(module, 2)(torch.ones(2, 4)), module(torch.ones(2, 4)))


# ------------------------------------------------------------------ options


def test_torch_lists_the_backend() -> None:
    assert "rewriter" in torch.compiler.list_backends()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no target: pass options"),
        ({"target": "gqa2", "speed": 3}, "unknown options: speed"),
        ({"target": "nonsense"}, "unknown target"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], message: str) -> None:
    model: Any = torch.compile(nn.Softmax(-1), backend="rewriter", options=options)
    with pytest.raises(Exception, match=message):
        model(torch.ones(2, 4))


def test_an_illegal_head_count_is_an_error() -> None:
    case = ZOO["bert-sdpa"]
    module = case.build()
    with pytest.raises(Exception, match="gqa3 does not fit"):
        case.run(compiled(module, 3), case.inputs(*SIZES[0]))


def test_the_target_may_come_from_the_environment_or_a_partial(
    monkeypatch: pytest.MonkeyPatch, rewritten: list[int]
) -> None:
    case = ZOO["bert-sdpa"]
    module = tied(case)
    bound = functools.partial(backend, options={"target": "gqa2", "backend": "eager"})
    first: Any = torch.compile(module, backend=bound)
    case.run(first, case.inputs(*SIZES[0]))
    torch.compiler.reset()
    monkeypatch.setenv(TARGET_VARIABLE, "gqa2")
    plain: Any = torch.compile(module, backend="rewriter", options={"backend": "eager"})
    case.run(plain, case.inputs(*SIZES[0]))
    assert rewritten == [2, 2]
