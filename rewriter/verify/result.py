"""What a verification found: how far outputs moved, and which checks held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Fidelity:
    """How far the main output moved.

    Attributes:
        max_abs: largest absolute difference of any element.
        cosine: cosine of the output vectors, averaged over tokens; 1 where both are zero.
        kl: mean over tokens of KL(before ‖ after) in nats; None if the output holds no logits.
    """

    max_abs: float
    cosine: float
    kl: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {"max_abs": self.max_abs, "cosine": self.cosine, "kl": self.kl}


@dataclass(frozen=True)
class Check:
    """One thing that was tested, whether it held, and what was seen."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """The outcome of comparing a rewritten model with its original.

    Attributes:
        fidelity: drift of the main output; None if the two could not be run side by side.
        checks: in the order they ran.
    """

    fidelity: Fidelity | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True when every check held; lossy drift is no check."""
        return all(check.ok for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.ok)

    def __str__(self) -> str:
        from rewriter.report.tables import plain, verification

        return plain(verification(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """JSON of ``rewriter verify``; fidelity is null when nothing could be compared."""
        return {
            "fidelity": self.fidelity.to_dict() if self.fidelity is not None else None,
            "checks": [asdict(check) for check in self.checks],
            "ok": self.ok,
        }

    @staticmethod
    def of(fidelity: Fidelity | None, checks: Iterable[Check]) -> Verification:
        return Verification(fidelity, tuple(checks))
