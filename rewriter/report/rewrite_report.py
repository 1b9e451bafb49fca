"""The report of one rewrite: each site's step and its error, what was refused, cost before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.report.choice import ChoiceReport, StoredChoice
from rewriter.report.printable import printable
from rewriter.verify.result import Fidelity

if TYPE_CHECKING:
    from passes.arithmetic import Arithmetic
    from passes.picture import Drawing


@dataclass(frozen=True)
class SiteRow:
    """One rewritten site, or one that the target keeps (`before` and `after` are then equal).

    Attributes:
        name: the site.
        before, after: short descriptions, e.g. ``"mha12"`` and ``"gqa4"``.
        exact: True if the step equals the original up to rounding.
        error: relative error of the site's output after the step; None if it was not measured.
        floor: the same error with the site's output zeroed, so that `error` means something; None if not measured.
        requantised: largest error that storing new weights as integers made, as a part of the largest weight; 0 where
            weights are stored as floats, None outside .onnx files.
        merge: how heads became one: "mean", "aligned" or "joint"; where tokens are mixed otherwise, how the result was
            fitted: "none", "initialised", "diagonal" or "matrices".
        notes: what was done otherwise than `merge` says, or is not saved, and why.
    """

    name: str
    before: str
    after: str
    exact: bool
    error: float | None = None
    floor: float | None = None
    requantised: float | None = None
    merge: str = "mean"
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the target leaves the site as it is."""
        return self.before == self.after

    @property
    def step(self) -> str:
        """ "exact", "lossy", or what a step is that moves the output as far as dropping it would."""
        if self.exact:
            return "exact"
        beaten = self.error is None or self.floor is None or self.error < self.floor
        return "lossy" if beaten else "structure only, needs uptraining"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "step": self.step,
            "from": self.before,
            "to": self.after,
            "exact": self.exact,
            "error": self.error,
            "floor": self.floor,
            "requantised": self.requantised,
            "merge": self.merge,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Refused:
    """A site that was left as it was, and why."""

    name: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "reason": self.reason}


@dataclass(frozen=True)
class Change:
    """One quantity before and after the rewrite."""

    before: int
    after: int

    def to_dict(self) -> dict[str, int]:
        return {"before": self.before, "after": self.after}


@dataclass(frozen=True)
class RewriteReport:
    """What `optimize` did.

    Attributes:
        target: as the user named it.
        sites: the rewritten ones, in execution order.
        refused: selected but left alone.
        parameters: number of weights.
        kv_bytes_per_token: bytes that a K/V cache holds per token over all layers.
        flops: of one forward pass on the example inputs; None if the model was not run.
        fidelity: end to end; None if verification was off.
        seconds: wall time by stage: capture, match, transform, install, verify.
        arithmetic: where cache and flops come from, and how they grow with length.
        drawings: the subgraphs that were rewritten or refused, one of each kind.
        choice: how the plan was chosen, for the target "auto".
    """

    target: str
    sites: tuple[SiteRow, ...]
    refused: tuple[Refused, ...]
    parameters: Change
    kv_bytes_per_token: Change
    flops: Change | None
    fidelity: Fidelity | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    arithmetic: Arithmetic | None = field(default=None, repr=False)
    drawings: tuple[Drawing, ...] = field(default=(), repr=False)
    choice: ChoiceReport | StoredChoice | None = None

    def save_html(self, path: str | Path) -> None:
        """Write the report as one .html file that loads nothing from elsewhere.

        Raises UsageError for another ending or a folder that does not exist.
        """
        from rewriter.report.html_page import save
        from rewriter.report.html_rewrite import rewrite_page

        save(rewrite_page(self), Path(path))

    def to_dict(self) -> dict[str, Any]:
        """JSON of ``rewriter rewrite`` without the paths."""
        return {
            "target": self.target,
            "sites": [row.to_dict() for row in self.sites],
            "refused": [row.to_dict() for row in self.refused],
            "parameters": self.parameters.to_dict(),
            "kv_bytes_per_token": self.kv_bytes_per_token.to_dict(),
            "flops": None if self.flops is None else self.flops.to_dict(),
            "fidelity": self.fidelity.to_dict() if self.fidelity is not None else None,
            "seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
            **({} if self.choice is None else {"auto": self.choice.to_dict()}),
        }

    def __str__(self) -> str:
        from rewriter.report.tables import plain, rewrite

        return plain(rewrite(self.to_dict()))


def note_lines(notes: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """ "site: note" for each note of (site name, notes); one that more than two sites have is told once."""
    by_note: dict[str, list[str]] = {}
    for name, found in notes:
        for note in found:
            by_note.setdefault(note, []).append(name)
    lines = []
    for note, names in by_note.items():
        told = [f"{names[0]} and {len(names) - 1} more"] if len(names) > 2 else names
        lines += [printable(f"{name}: {note}") for name in told]
    return lines


def requantised_line(errors: Sequence[float | None]) -> list[str]:
    """What storing new weights as integers cost; nothing to say where it cost nothing."""
    worst = max((error or 0.0 for error in errors), default=0.0)
    return [f"requantised weights are off by at most {worst:.2%} of the largest"] if worst else []


def number(value: float | None) -> str:
    """Three significant digits, or a dash for "not measured"."""
    return "-" if value is None else f"{value:.3g}"
