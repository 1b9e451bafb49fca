"""How "auto" came to its plan: what each site does alone, the frontier, the plan's predicted and measured drift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from passes.choose import Chosen, Mix

FRONTIER = ("K/V bytes left", "flops, times fewer", "predicted drift", "plan")


@dataclass(frozen=True)
class ChoiceReport:
    """A `Chosen` as a report shows it."""

    chosen: Chosen

    def to_dict(self) -> dict[str, Any]:
        """JSON of the key ``auto``; the frontier's points are in the order of what they save."""
        chosen = self.chosen
        return {
            "budget": chosen.budget.limits,
            "drift_is": {"kl": "KL divergence, nats per token", "cosine": "1 - cosine"}[chosen.kind],
            "plan": {**self._mix(chosen.plan), "measured_drift": chosen.measured},
            "frontier": [self._mix(mix) for mix in chosen.frontier],
            "sensitivity": [
                {
                    "sites": list(e.sites),
                    "target": e.target.name,
                    "drift": e.drift,
                    "local_error": e.local,
                    "kv_numbers_saved": e.kv,
                    "flops_saved": e.flops,
                    "parameters_saved": e.parameters,
                }
                for e in chosen.effects
            ],
            "batches": {"all": chosen.batches, "measured": chosen.held or chosen.batches},
            "held_out": chosen.held > 0,
        }

    def _mix(self, mix: Mix) -> dict[str, Any]:
        pairs = zip(self.chosen.units, mix.targets, strict=True)
        return {
            "predicted_drift": mix.drift,
            "kv": mix.kv,
            "speed": mix.speed,
            "targets": {name: target for unit, target in pairs for name in unit},
        }


@dataclass(frozen=True)
class StoredChoice:
    """What `ChoiceReport.to_dict` gave, as it was read from a model."""

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.content)


def frontier_cells(auto: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows under `FRONTIER`, from the JSON."""
    return [
        (f"{m['kv']:.3f}", f"{m['speed']:.3f}", f"{m['predicted_drift']:.3g}", _summary(m["targets"]))
        for m in auto["frontier"]
    ]


def choice_line(auto: Mapping[str, Any]) -> str:
    """What the chosen plan does, predicted beside measured."""
    plan, count = auto["plan"], auto["batches"]
    limits = ",".join(f"{name}={value:g}" for name, value in auto["budget"].items())
    where = f"{count['measured']} of {count['all']} batches" + ("" if auto["held_out"] else ", on which it was fitted")
    return (
        f"plan for {limits}: {_summary(plan['targets'])} · K/V {plan['kv']:.3f} · drift ({auto['drift_is']}) "
        f"{plan['predicted_drift']:.3g} predicted, {plan['measured_drift']:.3g} measured on {where}"
    )


def _summary(targets: Mapping[str, str]) -> str:
    """ "3 keep, 2 gqa4, 1 mqa"."""
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(targets.values()).items(), reverse=True))
