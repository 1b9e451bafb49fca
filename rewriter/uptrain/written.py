"""Training text that the teacher writes itself (``data="sampled"``), for when there is none like that which it is for.

The student sees what the teacher makes of all kinds of text that it was trained on, and gets used to no kind by itself
(data-free distillation, as LLM-QAT, arXiv 2305.17888). Text is written as training goes on and never seen twice; what
stands where is a function of the seed and the place, so that a run can be taken up anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from rewriter.calibration.sampled import sampled_text
from rewriter.uptrain.rows import Row, fingerprint_of

TOGETHER = 16
"""Sequences that are written at a time."""


@dataclass(frozen=True)
class WrittenRows:
    """`rewriter.uptrain.rows.Rows` of `window` tokens each.

    Attributes:
        teacher: who writes: a causal language model of transformers.
        validation: held-out examples; by default of a place that training never reaches.
    """

    teacher: nn.Module
    window: int
    seed: int
    validation: Sequence[Row]

    @property
    def tokens(self) -> float:
        return float(self.window)

    @property
    def fingerprint(self) -> str:
        """Of text that training never reaches, which changes with the teacher; the recipe tells the seed."""
        return fingerprint_of(self.validation)

    def since(self, position: int) -> Iterator[Row]:
        skip = position % TOGETHER
        for place in itertools.count(position // TOGETHER):
            yield from itertools.islice(written(self.teacher, self.window, self.seed, place + 1), skip, None)
            skip = 0


def written_rows(
    teacher: nn.Module, window: int, seed: int, held_out: int, validation: Sequence[Row] | None
) -> WrittenRows:
    """At most `TOGETHER` sequences are written to be held out; raises UnsupportedModel for what writes no text."""
    if validation is None:
        validation = list(written(teacher, window, seed, 0))[:held_out]
        window = len(validation[0]["input_ids"])  # shorter where the model has fewer positions
    return WrittenRows(teacher, window, seed, validation)


def written(teacher: nn.Module, window: int, seed: int, place: int) -> Iterator[Row]:
    """The sequences of one place."""
    drawn = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
    for ids in sampled_text(teacher, sequences=TOGETHER, length=window, seed=drawn).cpu().numpy():
        yield {"input_ids": ids}
