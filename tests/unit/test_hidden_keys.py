"""What tells which keys are hidden: found above biases that hide none, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from passes.dataflow import Flow, Node, Weight
from passes.hidden_keys import told_by
from passes.site import Modifier

BATCH, HEADS, TOKENS = 2, 3, 4
LEAST = -1e30


class Recorded:
    """A program on `mask` (bool [B, 1, 1, S], fed) that ends in scores' bias [B, H, S, S]."""

    def __init__(self, distances: float = 3.0, other: float = LEAST) -> None:
        mask = np.ones((BATCH, 1, 1, TOKENS), bool)
        mask[1, ..., 2:] = False
        rows = np.broadcast_to(mask, (BATCH, 1, TOKENS, TOKENS))
        bias = np.random.default_rng(0).normal(size=(1, HEADS, TOKENS, TOKENS)) * distances
        added = np.where(rows, 0.0, LEAST)
        self.values = {
            "mask": mask, "rows": rows, "bias": bias, "other": np.float64(other), "added": added,
            "sum": bias + added, "chosen": np.where(rows, bias, other), "shape": np.array(rows.shape),
        }  # fmt: skip

    def flow(self) -> Flow:
        steps = (
            ("Expand", ("mask", "shape"), "rows"), ("Where", ("rows", "zero", "least"), "added"),
            ("Add", ("bias", "added"), "sum"), ("Where", ("rows", "bias", "other"), "chosen"),
        )  # fmt: skip

        def unrun(given: object) -> Any:
            raise AssertionError("what was recorded is read")

        nodes = tuple(Node(i, op, "", {}, given, (made,), unrun) for i, (op, given, made) in enumerate(steps))
        known = self.values | {"zero": np.float64(0), "least": np.float64(LEAST)}
        constant = {n: Weight(n, known[n].shape, "float32", 1) for n in ("bias", "other", "zero", "least", "shape")}
        return Flow(nodes, ("mask",), ("sum", "chosen"), constant, known.__getitem__)


@pytest.mark.parametrize("value", ["sum", "chosen"])
def test_biases_that_hide_nothing_are_left_out(value: str) -> None:
    told = told_by(Recorded().flow(), Modifier("bias", value, 1.0))
    assert (told.kind, told.value) == ("mask", "mask")


def test_a_bias_that_hides_something_is_not_left_out() -> None:
    far = Recorded(distances=1e6).flow()
    assert told_by(far, Modifier("bias", "sum", 1.0)).value == "sum"
    assert told_by(far, Modifier("bias", "chosen", 1.0)).value == "chosen"
    assert told_by(Recorded(distances=1e3).flow(), Modifier("bias", "sum", 100.0)).value == "sum", "by its factor"


def test_a_condition_that_hides_nothing_tells_nothing() -> None:
    assert told_by(Recorded(other=-5.0).flow(), Modifier("bias", "chosen", 1.0)).value == "chosen"


def test_what_was_not_recorded_is_not_read() -> None:
    recorded = Recorded()
    unread = replace(recorded.flow(), read={"sum": recorded.values["sum"]}.__getitem__)
    assert told_by(unread, Modifier("bias", "sum", 1.0)).value == "sum"


def conditions(other: np.ndarray[Any, Any], kind: str) -> Modifier:
    """What tells of a mask that is joined with a condition made of lengths alone."""
    mask = np.ones((BATCH, 1, 1, TOKENS), bool)
    mask[1, ..., 2:] = False
    whole = mask & other
    values = {"mask": mask, "hidden": ~mask, "other": other if kind == "mask" else ~other}
    values["joined"] = whole if kind == "mask" else ~whole
    given = {"mask": ("mask",), "unmask": ("hidden",)}[kind]
    steps = [("Not", ("mask",), "hidden"), ("And" if kind == "mask" else "Or", ("other", *given), "joined")]

    def unrun(given: object) -> Any:
        raise AssertionError("what was recorded is read")

    nodes = tuple(Node(i, op, "", {}, read, (made,), unrun) for i, (op, read, made) in enumerate(steps))
    constant = {"other": Weight("other", other.shape, "bool", 1)}
    return told_by(Flow(nodes, ("mask",), ("joined",), constant, values.__getitem__), Modifier(kind, "joined", LEAST))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mask", "unmask"])
def test_conditions_that_hide_no_key_are_left_out(kind: str) -> None:
    every = np.ones((1, 1, TOKENS, 1), bool)
    assert conditions(every, kind) == Modifier("mask", "mask", LEAST)
    for hides in (np.tri(TOKENS, dtype=bool)[None, None], np.arange(TOKENS)[None, None, None] < 3):
        assert conditions(hides, kind).value == "joined"
    in_longer_ones = np.ones((1, 1, 1, TOKENS), bool)  # may be keys up to a limit
    assert conditions(in_longer_ones, kind).value == "joined"
