"""Whisper tiny.en with fewer key/value heads in all its attentions: word errors and drift on speech of another speaker.

Calibration hears three short recordings at three speeds, the original's own transcripts beside them; measured is on the
opening of A Tale of Two Cities, read by somebody else: word error rate against the book, and mean KL divergence from
the original over the tokens that it hears.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import rewriter
from benchmarks.rows import Row, markdown_table
from benchmarks.whisper_tiny import features, recording, taught, transcribed, whisper, windows, word_errors
from benchmarks.zeroed import zeroed
from passes.dataflow import Array
from passes.targets import GroupedQuery
from rewriter.uptrain.divergence import kl_divergence

CALIBRATION, HELD_OUT = ("beckett", "endgame_nagg_nell", "clone-test"), "two_cities"
SPEEDS = ((10, 9), (1, 1), (9, 10))
"""Samples after and before: slower, as it is, faster."""
SAID = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness,
it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness,
it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing before us, we were
all going direct to Heaven, we were all going direct the other way - in short, the period was so far like the present
period, that some of its noisiest authorities insisted on its being received, for good or for evil, in the superlative
degree of comparison only."""
"""What is read in the held-out recording (Dickens, 1859)."""
GOAL = 10.0
"""How many times nearer than mean pooling, which comes first."""
MERGES = (("mean", False), ("aligned", False), ("joint", False), ("mean", True), ("joint", True))


def calibration_windows() -> list[Array]:
    """The recordings at each speed, in windows."""
    from scipy.signal import resample_poly

    samples = [recording(name) for name in CALIBRATION]
    turned = [np.asarray(resample_poly(s, *speed), dtype=np.float32) for speed in SPEEDS for s in samples]
    return [part for s in turned for part in windows(s)]


def divergence(teacher: nn.Module, student: nn.Module, given: dict[str, Tensor]) -> float:
    """Mean KL(teacher ‖ student) over the tokens that count, nats."""
    counts = given["decoder_attention_mask"].bool()
    with torch.no_grad():
        old, new = (m(**given, use_cache=False).logits[counts] for m in (teacher, student))
    return float(kl_divergence(old, new).double().mean())


def whisper_rows(quick: bool) -> Iterator[Row]:
    model, tokenizer = whisper()

    def errors_of(heard: list[list[int]]) -> float:
        return word_errors(SAID, " ".join(tokenizer.decode(ids) for ids in heard))

    spectra = features(windows(recording(HELD_OUT)))
    heard = transcribed(model, spectra)
    held = taught(spectra, heard)
    base = errors_of(heard)
    floor = divergence(model, zeroed(model, "attn.out_proj"), held)
    known = [features([part]) for part in calibration_windows()[: 4 if quick else None]]
    calibration = [taught(one, transcribed(model, one)) for one in known]
    for heads, ratio in ((3, "1/2"), (1, "MQA")):
        pooled = None
        for merge, calibrated in MERGES if not quick else (MERGES[0], MERGES[-1]):
            start = time.perf_counter()
            small = rewriter.optimize(
                model, GroupedQuery(heads, merge), verify=False, example_inputs=held,  # type: ignore[arg-type]
                calibration=calibration if calibrated else None,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            case = f"kv {ratio}, {merge}" + (f" + refit, {len(calibration)} windows" if calibrated else "")
            moved = divergence(model, small, held)
            pooled = pooled or moved
            goal = GOAL if (merge, calibrated) == MERGES[-1] and not quick else None
            yield Row(
                "whisper, KL from the original", case, moved, floor, "attention zeroed", "nats", floor / moved,
                goal, None if goal is None else pooled / moved >= goal,
                {
                    "seconds": round(seconds, 1), "nearer": pooled / moved,
                    "word_error_rate": errors_of(transcribed(small, spectra)), "original_word_error_rate": base,
                },
            )  # fmt: skip


def speech_table(rows: Sequence[Row]) -> str:
    """Markdown: drift beside word errors, and the original's."""
    header = ["what", "case", "measured", "attention zeroed", "times nearer than mean", "goal", "met"]
    header += ["word error rate", "original's", "s"]
    facts = ("word_error_rate", "original_word_error_rate", "seconds")
    lines = [[r.name, r.case, r.ours, r.peer, r.more["nearer"], r.goal, r.ok, *map(r.more.get, facts)] for r in rows]
    return markdown_table(header, lines)
