"""The sections of a page about uptraining: summary, the loss, drift on held-out data; then what was rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from passes.picture import Picture
from rewriter.report.charts import course
from rewriter.report.html_page import Page
from rewriter.report.html_rewrite import Card, rewrite_page, with_drawings
from rewriter.report.rewrite_report import RewriteReport, number

if TYPE_CHECKING:
    from rewriter.uptrain.result import Uptrained

_MEASURES = {
    "kl": "KL divergence, nats",
    "cosine": "cosine of outputs",
    "pooled_cosine": "cosine of pooled outputs",
    "perplexity": "perplexity",
    "teacher_perplexity": "the teacher's perplexity",
}


def uptrain_page(done: Uptrained, rewrite: RewriteReport | None = None, pictures: Sequence[Picture] = ()) -> Page:
    """`rewrite` is how the student was made, if it is known; `pictures` are of the teacher's sites."""
    measures = [key for key in _MEASURES if getattr(done.before, key) is not None]
    steps = sorted(done.drift)
    values: dict[str, Any] = {
        "cards": tuple(_card(key, getattr(done.before, key), getattr(done.after, key)) for key in measures),
        "loss": course("Loss", [p.step for p in done.curve], [p.loss for p in done.curve], _split(done)),
        "steps": steps,
        "measures": tuple(
            (_MEASURES[key], tuple(number(getattr(done.drift[step], key)) for step in steps)) for key in measures
        ),
        "facts": _facts(done),
    }
    page = Page("Uptraining", _lead(done), ("summary", "training", "machine"), values)
    return page if rewrite is None else page.joined(rewrite_page(with_drawings(rewrite, pictures)))


def _split(done: Uptrained) -> int | None:
    """The first step of the second phase."""
    first = done.curve[0].phase if done.curve else ""
    return next((point.step for point in done.curve if point.phase != first), None)


def _lead(done: Uptrained) -> str:
    return f"{done.steps:,} steps over {done.tokens:,} tokens in {done.seconds:,.0f} seconds on {done.device}."


def _card(key: str, before: float, after: float | None) -> Card:
    return Card(_MEASURES[key], number(after), f"{number(before)} before")


def _facts(done: Uptrained) -> tuple[tuple[str, str], ...]:
    facts = {
        "device": done.device,
        "processes": done.processes,
        "precision": done.precision,
        "parameters trained": f"{done.trained:,}",
        "modules compared": len(done.compared),
        **{key.replace("_", " "): value for key, value in done.recipe.to_dict().items() if value is not None},
    }
    return tuple((key, str(value)) for key, value in facts.items())
