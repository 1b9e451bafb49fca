"""Budgets as text, and the best mix of choices beside trying every mix."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.budget import Budget, BudgetError, Choice, NoSolver, Totals, added, best_mix, frontier

UNITS = (
    (Choice(), Choice(0.1, 4, 10), Choice(0.5, 6, 15)),
    (Choice(), Choice(0.3, 4, 10), Choice(0.4, 6, 15)),
    (Choice(), Choice(0.01, 0, 30)),
)
TOTALS = Totals(kv=16, flops=200)


def test_a_budget_reads_what_it_prints() -> None:
    for text in ("kv=0.5", "speed=1.3", "drift=0.02", "kv=0.25,drift=0.1"):
        assert str(Budget.parse(text)) == text
    assert Budget.parse(" drift = 0.02 ") == Budget(drift=0.02)


@pytest.mark.parametrize(
    "text", ["", "kv", "kv=", "kv=x", "kv=2", "kv=-1", "speed=0.5", "drift=-0.1", "cost=1", "kv=0.5,kv=0.4", "kv=nan"]
)
def test_what_is_no_budget_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert caught.value.hint


def brute(units: tuple[tuple[Choice, ...], ...], budget: Budget, totals: Totals) -> float | None:
    """The least drift within the budget, or the most K/V saved under a drift, by trying every mix."""
    best: float | None = None
    for mix in itertools.product(*(range(len(u)) for u in units)):
        total = added(units, mix)
        if budget.kv is not None and totals.kv_left(total.kv) > budget.kv + 1e-9:
            continue
        if budget.speed is not None and totals.speed(total.flops) < budget.speed - 1e-9:
            continue
        if budget.drift is not None and total.drift > budget.drift + 1e-12:
            continue
        value = -total.kv if set(budget.limits) == {"drift"} else total.drift
        best = value if best is None else min(best, value)
    return best


choices = st.builds(Choice, st.integers(0, 40).map(lambda n: n / 40), st.integers(0, 6), st.integers(0, 9))
problems = st.lists(st.lists(choices, min_size=0, max_size=3).map(lambda c: (Choice(), *c)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(problems, st.sampled_from(["kv=0.7", "kv=0.4", "speed=1.1", "drift=0.6", "kv=0.8,drift=0.9", "kv=0,drift=0"]))
def test_the_mix_is_the_best_of_all(units: list[tuple[Choice, ...]], text: str) -> None:
    budget, totals = Budget.parse(text), Totals(kv=30, flops=60)
    wanted = brute(tuple(units), budget, totals)
    if wanted is None:
        with pytest.raises(BudgetError, match="no plan meets"):
            best_mix(units, budget, totals)
        return
    total = added(units, best_mix(units, budget, totals))
    found = -total.kv if set(budget.limits) == {"drift"} else total.drift
    assert found == pytest.approx(wanted, abs=1e-4), (budget, total)


def test_the_budget_decides() -> None:
    """Control: other limits give other mixes, and each limit is kept."""
    mixes = {text: best_mix(UNITS, Budget.parse(text), TOTALS) for text in ("kv=0.75", "kv=0.25", "speed=1.1")}
    assert mixes == {"kv=0.75": (1, 0, 0), "kv=0.25": (2, 2, 0), "speed=1.1": (0, 0, 1)}
    assert best_mix(UNITS, Budget(drift=0.12), TOTALS) == (1, 0, 1)


def test_the_frontier_rises() -> None:
    totals = [added(UNITS, mix) for mix in frontier(UNITS, TOTALS)]
    assert len(totals) > 3 and totals[0].kv == 0 and totals[-1].kv == 12
    assert [t.kv for t in totals] == sorted(t.kv for t in totals)
    assert [t.drift for t in totals] == sorted(t.drift for t in totals)
    flops_only = frontier([(*u[:1], Choice(0.1, 0, 9)) for u in UNITS], TOTALS)
    assert [sum(mix) for mix in flops_only] == [0, 1, 2, 3]


def test_without_a_solver_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(NoSolver, match="scipy"):
        best_mix(UNITS, Budget(kv=0.5), TOTALS)
