"""What profiling yields: times, memory and operators of two models under the same conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rewriter.profile.workload import Workload

if TYPE_CHECKING:
    from passes.picture import Picture
    from rewriter.report.rewrite_report import RewriteReport


@dataclass(frozen=True)
class Milliseconds:
    """Times of one call."""

    min: float
    median: float
    max: float

    @staticmethod
    def of(samples: Sequence[float]) -> Milliseconds:
        return Milliseconds(min(samples), median(samples), max(samples))

    def to_dict(self) -> dict[str, float]:
        return {"min": self.min, "median": self.median, "max": self.max}


@dataclass(frozen=True)
class Measured:
    """One model's figures.

    Attributes:
        ms: of one call, or of one new token in mode "decode".
        peak_bytes: memory that opening and running the model takes at most; None where it cannot be measured.
        ops: milliseconds of the same by operator type, from separate, instrumented runs.
        cpu_ms: time of all processors that this process used meanwhile, which tells work from waiting.
        kv_bytes: of the key/value cache at the end of the call; None for a model without.
    """

    ms: Milliseconds
    peak_bytes: int | None
    ops: Mapping[str, float]
    cpu_ms: Milliseconds | None = None
    kv_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "ms": self.ms.to_dict(),
            "cpu_ms": None if self.cpu_ms is None else self.cpu_ms.to_dict(),
            "peak_bytes": self.peak_bytes,
            "kv_bytes": self.kv_bytes,
            "ops": dict(self.ops),
        }


@dataclass(frozen=True)
class Profile:
    """Two models side by side.

    Attributes:
        onnxruntime: its version; None for PyTorch models.
        shapes: of the inputs that both were fed.
        rewrite: how the second model was made, where it says so itself.
        workload: what one call is.
        versions: of everything that took part, by name.
        cuda_graph: whether times are of replays of a CUDA graph.
    """

    provider: str
    device: str
    threads: int
    runs: int
    onnxruntime: str | None
    before: Measured
    after: Measured
    shapes: Mapping[str, tuple[int, ...]]
    rewrite: RewriteReport | None = field(default=None, repr=False)
    workload: Workload = field(default_factory=Workload)
    versions: Mapping[str, str] = field(default_factory=dict)
    cuda_graph: bool = False

    @property
    def speedup(self) -> dict[str, float]:
        """How many times as fast the second model is, by minimum and by median."""
        return {
            "min": self.before.ms.min / self.after.ms.min,
            "median": self.before.ms.median / self.after.ms.median,
        }

    def save_html(self, path: str | Path, pictures: Sequence[Picture] = ()) -> None:
        """Write everything as one .html file that loads nothing from elsewhere.

        Args:
            pictures: of the first model's sites, as in `Inspection.pictures`, to be shown as well.

        Raises UsageError for another ending or a folder that does not exist.
        """
        from rewriter.report.html_page import save
        from rewriter.report.html_profile import profile_page

        save(profile_page(self, pictures), Path(path))

    def __str__(self) -> str:
        from rewriter.report.tables import plain, profile

        return plain(profile(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """JSON of ``rewriter profile``."""
        return {
            "provider": self.provider,
            "device": self.device,
            "threads": self.threads,
            "runs": self.runs,
            "onnxruntime": self.onnxruntime,
            "versions": dict(self.versions),
            "workload": self.workload.to_dict(),
            "cuda_graph": self.cuda_graph,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "speedup": self.speedup,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }
