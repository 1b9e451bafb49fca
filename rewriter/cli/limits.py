"""Limits: no refused site, no more drift than this, no more memory than a model of this size needs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rewriter.capture.memory_limit import limited_memory
from rewriter.errors import RewriteError, UsageError, VerificationFailed


def memory_for(*models: Path, calibrated: bool = False) -> AbstractContextManager[None]:
    """What a command may take for these: what the machine has, or less if only files say what is computed.

    Folders are held to their weights where these are built, and calibration data are as large as the user chose.
    """
    if any(model.is_dir() for model in models):
        return nullcontext()
    return limited_memory(() if calibrated else models)


def refuse_if_strict(strict: bool, refused: Sequence[Mapping[str, Any]]) -> None:
    if strict and refused:
        first = refused[0]
        raise RewriteError(
            f"{len(refused)} sites were refused, the first: {first['name']}: {first['reason']}",
            hint="drop --strict to rewrite the others, or select sites with --layers",
        )


def require_limits(max_kl: float | None, min_cosine: float | None) -> None:
    if max_kl is not None and not max_kl >= 0:
        raise UsageError(f"--max-kl {max_kl:g} is no divergence", hint="give 0 or more, e.g. 0.1")
    if min_cosine is not None and not -1 <= min_cosine <= 1:
        raise UsageError(f"--min-cosine {min_cosine:g} is no cosine", hint="give one of at most 1, e.g. 0.99")


def refuse_drift(drift: Mapping[str, Any] | None, max_kl: float | None, min_cosine: float | None) -> None:
    for check in _limit_checks(drift, max_kl, min_cosine):
        if not check["ok"]:
            raise VerificationFailed(
                f"too far from the original: {check['detail']}; nothing was written",
                hint="choose more K/V heads, or rewrite fewer layers with --layers",
            )


def _limit_checks(
    drift: Mapping[str, Any] | None, max_kl: float | None, min_cosine: float | None
) -> Iterator[dict[str, Any]]:
    """Checks of the limits that the user set; a quantity that was not measured is within no limit."""
    for name, limit, key, within in (
        ("max-kl", max_kl, "kl", operator.le),
        ("min-cosine", min_cosine, "cosine", operator.ge),
    ):
        if limit is None:
            continue
        value = drift.get(key) if drift else None
        shown = "was not measured (the output holds no logits)" if value is None else f"is {value:.6g}"
        ok = value is not None and within(value, limit)
        yield {"name": name, "ok": ok, "detail": f"{key} {shown}, the limit is {limit:g}"}


def with_limits(found: dict[str, Any], max_kl: float | None, min_cosine: float | None) -> dict[str, Any]:
    checks = [*found["checks"], *_limit_checks(found["fidelity"], max_kl, min_cosine)]
    return {**found, "checks": checks, "ok": all(check["ok"] for check in checks)}
