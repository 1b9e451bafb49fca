"""What a run of uptraining reports: the loss curve, how far the student was from the teacher before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.uptrain.recipe import Recipe

if TYPE_CHECKING:
    from passes.picture import Picture
    from rewriter.report.rewrite_report import RewriteReport


@dataclass(frozen=True)
class Drift:
    """The student beside the teacher on held-out data.

    Attributes:
        kl: mean over tokens of KL(teacher ‖ student) in nats; None without logits.
        cosine: of the output vectors, mean over tokens.
        pooled_cosine: of the mean output vector of each sequence; None with logits.
        perplexity, teacher_perplexity: exp of the mean negative log-likelihood; None unless a causal language model.
    """

    kl: float | None
    cosine: float
    pooled_cosine: float | None
    perplexity: float | None
    teacher_perplexity: float | None

    def to_dict(self) -> dict[str, float | None]:
        return dict(vars(self))


@dataclass(frozen=True)
class Point:
    """One step on the loss curve: its number from 0, its phase, its loss and the terms of that, unweighted."""

    step: int
    phase: str
    loss: float
    terms: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "phase": self.phase, "loss": self.loss, "terms": dict(self.terms)}

    @staticmethod
    def of(stored: Mapping[str, Any]) -> Point:
        return Point(stored["step"], stored["phase"], stored["loss"], stored["terms"])


@dataclass(frozen=True)
class Uptrained:
    """What `rewriter.uptrain` returns.

    Attributes:
        model: the trained student, in its old dtype, on its old device.
        recipe: what was done; steps of the whole run; tokens that were trained on.
        curve: the loss, step by step (every few steps in long runs).
        drift: on held-out data by number of steps done: 0, those asked for, and the last.
        compared: paths of the modules whose outputs were compared in the first phase.
        trained: number of parameters that were trained.
        device, processes, precision, seconds: what it ran on, and for how long; over all parts of a resumed run.
        resumed_from: step at which this call took the run up; None if it began it.
        student_from: folder that the student was read from; its tokenizer and other small files go along on saving.
    """

    model: Any
    recipe: Recipe
    steps: int
    tokens: int
    curve: tuple[Point, ...]
    drift: Mapping[int, Drift]
    compared: tuple[str, ...]
    trained: int
    device: str
    processes: int
    precision: str
    seconds: float
    resumed_from: int | None = None
    student_from: Path | None = None
    state: Mapping[str, Any] | None = field(default=None, repr=False)
    """Weights gathered from several devices, where the model itself holds only parts."""

    @property
    def before(self) -> Drift:
        return self.drift[min(self.drift)]

    @property
    def after(self) -> Drift:
        return self.drift[max(self.drift)]

    def save(self, path: str | Path) -> None:
        """Write the student: an ordinary checkpoint where the architecture can say it; see `rewriter.save`.

        Of several processes the first one writes; an ONNX model becomes a file.
        """
        from rewriter.uptrain.saving import save

        save(self, Path(path))

    def save_html(self, path: str | Path, pictures: Sequence[Picture] = ()) -> None:
        """Write loss, drift and, where it is known, how the student was made, as one .html file.

        Args:
            pictures: of the teacher's sites, as in `Inspection.pictures`, to be shown as well.

        Raises UsageError for another ending or a folder that does not exist.
        """
        from rewriter.report.html_page import save
        from rewriter.report.html_uptrain import uptrain_page

        save(uptrain_page(self, rewrite_of(self.model), pictures), Path(path))

    def __str__(self) -> str:
        from rewriter.report.tables import plain, uptrained

        return plain(uptrained(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """JSON of ``rewriter uptrain`` without the paths."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "drift": {str(step): drift.to_dict() for step, drift in sorted(self.drift.items())},
            "curve": [point.to_dict() for point in self.curve],
            "compared": list(self.compared),
            "trained_parameters": self.trained,
            "recipe": self.recipe.to_dict(),
            "device": self.device,
            "processes": self.processes,
            "precision": self.precision,
            "resumed_from": self.resumed_from,
            "seconds": round(self.seconds, 3),
        }


def rewrite_of(student: Any) -> RewriteReport | None:
    """How a student was made: its own report, or what an .onnx file says in its metadata."""
    from rewriter.report import stored
    from rewriter.report.rewrite_report import RewriteReport

    report = getattr(student, "rewrite_report", None)
    if isinstance(report, RewriteReport):
        return report
    metadata = getattr(student, "metadata_props", None)
    return stored.from_text(metadata.get(stored.PROPERTY)) if isinstance(metadata, Mapping) else None
