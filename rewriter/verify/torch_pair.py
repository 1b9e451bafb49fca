"""Verification of a rewritten torch model against its original's recorded output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rewriter.capture.own_containers import own
from rewriter.capture.torch_export import to_numpy
from rewriter.module_modes import evaluating
from rewriter.verify.drift import Drift
from rewriter.verify.result import Check, Verification

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference, relative to the largest output, up to which an exact rewrite counts as equal."""


def run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One forward call in eval mode without gradients; modes are restored.

    A model that draws random numbers draws the same in every call. torch's own layers compute padded tokens as others:
    their fast path leaves those out, and puts zeros in their place.
    """
    with (
        evaluating(module),
        torch.no_grad(),
        torch.random.fork_rng(range(torch.cuda.device_count())),
        _without_fast_path(),
    ):
        torch.manual_seed(0)
        return module(*own(args), **own(dict(kwargs)))


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def verify_torch(before: Any, after: Any, kwargs: Mapping[str, Any], *, exact: bool) -> Verification:
    """Compare what two models returned for the same call.

    Checks: ``runs`` (both returned a tensor of one shape), ``finite`` and, if `exact`, ``exact`` (largest difference
    within the tolerance of the dtype). Cosine and KL leave out tokens that an ``attention_mask`` [B, S] hides.
    """
    old, new = main_tensor(before), main_tensor(after)
    if old is None or new is None or old.shape != new.shape:
        shapes = f"{None if old is None else tuple(old.shape)} and {None if new is None else tuple(new.shape)}"
        return Verification(None, (Check("runs", False, f"outputs of shapes {shapes}"),))
    keep = kwargs.get("attention_mask")
    counted = None
    if isinstance(keep, torch.Tensor) and keep.shape == old.shape[:-1]:
        counted = keep.bool().cpu().numpy()
    drift = Drift(logits=_has_logits(before) and old.shape[-1] >= 16)
    drift.add(to_numpy(old), to_numpy(new), counted)
    finite = bool(torch.isfinite(new).all()) or not bool(torch.isfinite(old).all())
    checks = [
        Check("runs", True, f"both return {tuple(new.shape)}"),
        Check("finite", finite, "all outputs are finite" if finite else "outputs hold NaN or infinity"),
    ]
    if exact:
        limit = TOLERANCES.get(old.dtype, 1e-4)
        within = drift.relative <= limit
        checks.append(Check("exact", within, f"relative difference {drift.relative:.2e}, limit {limit:.0e}"))
    return Verification(drift.fidelity(), tuple(checks))


def untouched(before: torch.nn.Module, after: torch.nn.Module) -> Check:
    """Weights of the same name and shape must be equal bit for bit; the rest was replaced."""
    old, new = before.state_dict(), after.state_dict()
    common = [n for n in old if n in new and old[n].shape == new[n].shape]
    moved = [n for n in common if not torch.equal(old[n], new[n])]
    if moved:
        return Check("untouched", False, f"{len(moved)} weights of unchanged shape differ, the first: {moved[0]}")
    return Check("untouched", True, f"{len(common)} of {len(old)} weights are identical, the others were replaced")


def main_tensor(output: Any) -> torch.Tensor | None:
    """Logits, else the last hidden state, else the first tensor found."""
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    leaves = torch.utils._pytree.tree_leaves(output)
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)


def _has_logits(output: Any) -> bool:
    return isinstance(getattr(output, "logits", None), torch.Tensor)
