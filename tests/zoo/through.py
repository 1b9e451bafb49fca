"""Which exporters each model goes through in every run: an export takes seconds, what follows tenths of a second.

Every model goes through torch and the quick exporter; what is new in a model (fused, grouped, rotated or normalised
heads, biases, masks, windows, several stacks) through one that builds on torch.export; encoders, decoders, grouped
heads, caches and plain torch through all of them. The rest of the matrix is marked `exhaustive` (``make exhaustive``);
`benchmarks.coverage` has all of it, with peers beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from tests.zoo.case import ZooCase
from tests.zoo.exports import EXPORTERS
from tests.zoo.models import EXTRA, MAIN, WIDE

QUICK = "torchscript17"

DYNAMO: Mapping[str, tuple[str, ...]] = {
    "bert-sdpa": ("dynamo18", "dynamo23"),
    "bert-eager": ("dynamo24",),
    "vit-sdpa": ("dynamo18",),
    "gpt2-sdpa": ("dynamo23",),
    "gpt2-eager": ("dynamo18",),
    "llama-sdpa": ("dynamo18",),
    "llama-gqa-sdpa": ("dynamo18", "dynamo23", "dynamo24"),
    "qwen3-sdpa": ("dynamo24",),
    "nanogpt-softmax": ("dynamo18",),
    "nanogpt-sdpa": ("dynamo24",),
    "mha-batch-first": ("dynamo18",),
    "mha-sequence-first": ("dynamo23",),
    "torch-encoder-padded": ("dynamo18",),
    "router": ("dynamo18",),
    "deberta-eager": ("dynamo18",),
    # What only the other lists have, once each: see what stands behind the names in the lists themselves.
    **dict.fromkeys(
        (
            "gpt-neox-sdpa",
            "phi3-sdpa",
            "gemma2-eager",
            "falcon-sdpa",
            "bloom-eager",
            "bart-sdpa",
            "modernbert-sdpa",
            "gptj-eager",
            "cohere-sdpa",
            "hunyuan-sdpa",
            "packed-permute-norm",
            "softmax-in-parts",
            "queries-by-group",
            "windows",
        ),
        ("dynamo18",),
    ),
}
"""Model to exporters that build on torch.export."""

DYNAMO_WITH_PAST: Mapping[str, tuple[str, ...]] = {
    "gpt2-eager": ("dynamo18",),
    "gpt2-sdpa": ("dynamo23",),
    "llama-gqa-sdpa": ("dynamo18",),
    "qwen3-sdpa": ("dynamo24",),
}
"""The same for decoders with their cache as inputs and outputs."""


def exporters(case: ZooCase, *, past: bool = False) -> tuple[str, ...]:
    """The exporters that `case` goes through in every run, the quick one last."""
    return (*(DYNAMO_WITH_PAST if past else DYNAMO).get(case.name, ()), QUICK)


def through(cases: Iterable[ZooCase], *, past: bool = False) -> list[tuple[ZooCase, str]]:
    """(case, exporter) of every run."""
    return [(case, exporter) for case in cases for exporter in exporters(case, past=past)]


def matrix(
    cases: Iterable[ZooCase], by: Iterable[str] = tuple(EXPORTERS), *, past: bool = False, told: bool = False
) -> list[Any]:
    """Parameters (case, exporter), or (case, exporter, past) where `told`; what is not of every run is so marked."""
    made = []
    for case in cases:
        for exporter in by:
            values = (case, exporter, past) if told else (case, exporter)
            marks = [] if exporter in exporters(case, past=past) else [pytest.mark.exhaustive]
            made.append(pytest.param(*values, id=f"{case.name}{'-past' * (past and told)}-{exporter}", marks=marks))
    return made


def one_of_each_family(cases: Iterable[ZooCase], *values: object) -> list[Any]:
    """Parameters (case, *values); other implementations of attention than a family's first are marked exhaustive."""
    made, seen = [], set[str]()
    for case in cases:
        family = family_of(case)
        marks = [pytest.mark.exhaustive] if family in seen else []
        made.append(pytest.param(case, *values, id="-".join(map(str, (case.name, *values))), marks=marks))
        seen.add(family)
    return made


def family_of(case: ZooCase) -> str:
    """The name without the attention implementation."""
    return case.name.removesuffix("-sdpa").removesuffix("-eager")


def known() -> Mapping[str, ZooCase]:
    """Every model that a table here may name."""
    return {**MAIN, **EXTRA, **WIDE}
