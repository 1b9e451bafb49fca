"""What a rewrite may cost in fidelity or must save, and the mix of choices that does it best.

Every unit (sites that must be rewritten alike) gets exactly one of its choices. Drift and savings of units are taken to
add up, so that the best mix is a multiple-choice knapsack: a linear program in zeros and ones, which SciPy's `milp`
(HiGHS) solves to optimality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.dataflow import Array


class BudgetError(ValueError):
    """A budget that says nothing, or that no choice meets; `hint` says what would."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class NoSolver(ImportError):
    """SciPy is not installed."""


_FORM = "write kv=0.5 (at most half of the K/V bytes), speed=1.3 (1.3 times fewer flops) or drift=0.02, or several"


@dataclass(frozen=True)
class Budget:
    """Limits for a whole model.

    Attributes:
        kv: largest part of the K/V bytes per token that may remain, 0 to 1.
        speed: by what factor the flops of one forward pass on the recorded inputs must fall, at least 1. It is counted
            arithmetic and not measured time.
        drift: largest drift of the model's answer on calibration batches that no weight was fitted on: KL divergence
            in nats per token where the answer holds logits, else 1 - cosine, both averaged over tokens.
    """

    kv: float | None = None
    speed: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise BudgetError("the budget sets no limit", _FORM)
        for name, low, high in (("kv", 0.0, 1.0), ("speed", 1.0, np.inf), ("drift", 0.0, np.inf)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BudgetError(f"{name}={value:g} is no budget", f"{name} lies between {low:g} and {high:g}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {n: v for n in ("kv", "speed", "drift") if (v := getattr(self, n)) is not None}

    def __str__(self) -> str:
        return ",".join(f"{name}={value:g}" for name, value in self.limits.items())

    @staticmethod
    def parse(text: str) -> Budget:
        """Read "kv=0.5" or "speed=1.2,drift=0.01". Raises BudgetError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (p.strip() for p in part.partition("="))
            if name not in {"kv", "speed", "drift"} or name in limits:
                raise BudgetError(f"cannot read the budget {text!r}", _FORM)
            try:
                limits[name] = float(value)
            except ValueError as error:
                raise BudgetError(f"cannot read the budget {text!r}", _FORM) from error
        return Budget(**limits)


@dataclass(frozen=True)
class Choice:
    """What one unit may become.

    Attributes:
        drift: what the model's answer moves if this unit alone is rewritten so.
        kv, flops: what is saved, in numbers of the cache per token and in flops.
    """

    drift: float = 0.0
    kv: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Totals:
    """The model before: numbers in the cache per token, flops of a forward pass."""

    kv: float
    flops: float

    def kv_left(self, saved: float) -> float:
        return (self.kv - saved) / self.kv if self.kv else 1.0

    def speed(self, saved: float) -> float:
        return self.flops / max(self.flops - saved, 1e-9)


def best_mix(units: Sequence[Sequence[Choice]], budget: Budget, totals: Totals) -> tuple[int, ...]:
    """The index of each unit's choice: least drift within `budget.kv` and `budget.speed`, or, where only drift is
    limited, the least K/V bytes left (then flops). Without units there is one mix, the empty one.

    Raises BudgetError if nothing meets the limits, saying how far one can get; NoSolver without SciPy.
    """
    if not units:
        return ()
    drift, kv, flops = (np.array([getattr(c, n) for u in units for c in u]) for n in ("drift", "kv", "flops"))
    rows, low, high = _one_each(units)
    if budget.kv is not None:
        rows, low, high = [*rows, kv], [*low, (1 - budget.kv) * totals.kv * (1 - 1e-9)], [*high, np.inf]
    if budget.speed is not None:
        need = (1 - 1 / budget.speed) * totals.flops
        rows, low, high = [*rows, flops], [*low, need * (1 - 1e-9)], [*high, np.inf]
    if budget.drift is not None:
        rows, low, high = [*rows, drift], [*low, -np.inf], [*high, budget.drift]
    gain = kv / max(totals.kv, 1.0) + 1e-3 * flops / max(totals.flops, 1.0)
    size = max(float(np.abs(drift).max(initial=0.0)), 1e-30)
    wanted = -gain if set(budget.limits) == {"drift"} else drift / size - 1e-6 * gain
    found = _solve(wanted, rows, low, high)
    if found is None:
        raise BudgetError(f"no plan meets the budget {budget}", _reach(units, totals))
    ends = np.cumsum([len(u) for u in units])
    return tuple(int(np.argmax(found[e - len(u) : e])) for e, u in zip(ends, units, strict=True))


def frontier(units: Sequence[Sequence[Choice]], totals: Totals, points: int = 24) -> list[tuple[int, ...]]:
    """The best mixes for K/V budgets from none to all, each once, most saved last. Where no choice saves K/V bytes
    the budgets are of flops."""
    most = [max(getattr(c, n) for c in u) for u in units for n in ("kv", "flops")]
    kv, flops = sum(most[::2]), sum(most[1::2])
    by_kv = kv > 0
    shares = np.linspace(0, 1, points) * (kv / totals.kv if by_kv else flops / totals.flops)
    budgets = [
        Budget(kv=max(1 - s, 0.0)) if by_kv else Budget(speed=1 / (1 - s)) for s in shares.tolist() if s < 1 or by_kv
    ]
    return list(dict.fromkeys(best_mix(units, b, totals) for b in budgets))


def added(units: Sequence[Sequence[Choice]], mix: Sequence[int]) -> Choice:
    """Drift and savings of a mix, added up."""
    chosen = [u[i] for u, i in zip(units, mix, strict=True)]
    return Choice(*(sum(getattr(c, n) for c in chosen) for n in ("drift", "kv", "flops")))


def _one_each(units: Sequence[Sequence[Choice]]) -> tuple[list[Array], list[float], list[float]]:
    owner = np.repeat(np.arange(len(units)), [len(u) for u in units])
    return [np.asarray(owner == i, dtype=float) for i in range(len(units))], [1.0] * len(units), [1.0] * len(units)


def _solve(wanted: Array, rows: Sequence[Array], low: Sequence[float], high: Sequence[float]) -> Array | None:
    """Zeros and ones that make `wanted` least; None if there are none. Rows are scaled, as the solver's tolerances
    are absolute."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise NoSolver("the budget's plan is found by scipy, which is not installed") from error
    sizes = np.array([max(float(np.abs(r).max(initial=0.0)), 1e-30) for r in rows])
    limits = LinearConstraint(np.stack(rows) / sizes[:, None], np.array(low) / sizes, np.array(high) / sizes)
    done = milp(wanted, constraints=limits, bounds=Bounds(0, 1), integrality=np.ones(len(wanted)),
                options={"mip_rel_gap": 0.0})  # fmt: skip
    return None if done.x is None else np.asarray(done.x)


def _reach(units: Sequence[Sequence[Choice]], totals: Totals) -> str:
    kv = totals.kv_left(sum(max(c.kv for c in u) for u in units))
    speed = totals.speed(sum(max(c.flops for c in u) for u in units))
    return f"the candidates reach kv={kv:.3g} and speed={speed:.4g} at most; allow more, or name more candidates"
