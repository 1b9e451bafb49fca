"""Which of a module's dropouts act on attention weights, which on the output: found by setting each and looking.

Only fields and submodules whose name or type says dropout are touched, on the original, and put back afterwards.
Kernels are written out meanwhile: fused ones divide by 1 - p, and draw in orders of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rewriter.install.call_record import CallRecord, snapshot
from rewriter.install.mixer import RewrittenMixer
from rewriter.install.protocol import Protocol
from rewriter.module_modes import training

Disagreement = Callable[[Any, Any], str | None]


ROLES = ("attention_dropout", "output_dropout")


def dropout_roles(
    original: nn.Module, mixer: RewrittenMixer, record: CallRecord, disagreement: Disagreement
) -> Protocol:
    """The mixer's protocol with its dropout probabilities and `trains` filled in.

    `trains` is False where training mode differs from eval mode by more than the dropouts found.
    """
    settled = mixer.protocol
    handles = _handles(original)
    probe = _Probe(original, mixer, record, disagreement)
    found: dict[str, Any] = {}
    with torch.no_grad(), _restored(handles), training(original), training(mixer), sdpa_kernel(SDPBackend.MATH):
        for handle in handles:
            handle.set(0.0)
        if not probe.equal():
            return replace(settled, trains=False)
        for handle in handles:
            role = probe.role(handle) if handle.value > 0.0 else None
            if role == "unknown" or (role is not None and role in found):
                return replace(settled, trains=False)
            if role is not None:
                found[role] = float(handle.value)
    return replace(settled, **found)


@dataclass(frozen=True)
class _Handle:
    """One dropout probability of a module."""

    module: nn.Module
    name: str
    value: float

    def set(self, value: float) -> None:
        setattr(self.module, self.name, value)


@dataclass(frozen=True)
class _Probe:
    original: nn.Module
    mixer: RewrittenMixer
    record: CallRecord
    disagreement: Disagreement

    def role(self, handle: _Handle) -> str | None:
        """The mixer's dropout that does what this one does; None if none is needed, "unknown" if neither does.

        At one half both must drop the same elements, given the same seed. Where the two draw in another order, the
        roles are told apart at one, where everything is dropped.
        """
        settled = self.mixer.protocol
        try:
            for value in (0.5, 1.0):
                handle.set(value)
                if self.equal():
                    return None  # without effect on this path, or in a submodule that the mixer shares
                fitting = [role for role in ROLES if self._fits(role, value, settled)]
                if len(fitting) == 1:
                    return fitting[0]
            return "unknown"
        finally:
            handle.set(0.0)
            self.mixer.protocol = settled

    def _fits(self, role: str, value: float, settled: Protocol) -> bool:
        changed: dict[str, Any] = {role: value}
        self.mixer.protocol = replace(settled, **changed)
        try:
            return self.equal()
        finally:
            self.mixer.protocol = settled

    def equal(self) -> bool:
        """Do both, from the same seed, give the same first result?"""
        return self.disagreement(self._run(self.mixer), self._run(self.original)) is None

    def _run(self, module: nn.Module) -> Tensor:
        devices = {p.device for p in self.original.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=[d.index for d in devices if d.index is not None]):
            torch.manual_seed(0)
            kwargs = {name: snapshot(value) for name, value in self.record.kwargs.items()}
            output = module(*map(snapshot, self.record.args), **kwargs)
        result = output if isinstance(output, Tensor) else output[0]
        assert isinstance(result, Tensor)
        return result


def _handles(module: nn.Module) -> list[_Handle]:
    handles = []
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            handles.append(_Handle(child, "p", child.p))
            continue
        for name, value in vars(child).items():
            if "drop" in name and isinstance(value, float) and 0.0 <= value < 1.0:
                handles.append(_Handle(child, name, value))
    return handles


@contextmanager
def _restored(handles: list[_Handle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.set(handle.value)
