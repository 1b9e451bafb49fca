"""KL divergence of two sets of logits with its gradient worked out in the same pass, in slices of tokens.

Autograd would keep several float32 copies of [tokens, vocabulary]; this keeps one, of the logits' own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLICE = 1 << 23
"""Logits that are widened to float32 at a time."""


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / t) ‖ softmax(student / t)) * t² of each row in nats, [N, V] and [N, V] to [N], float32.

    Times t² (Hinton et al., arXiv 1503.02531), so that gradients keep their size as the temperature changes.
    Differentiable once, by `student`.
    """
    found: Tensor = _Divergence.apply(student, teacher.detach(), temperature)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        rows = max(1, SLICE // student.shape[-1])
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wanted else student.new_empty(0)
        values = torch.empty(len(student), dtype=torch.float32, device=student.device)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            new = torch.log_softmax(student[part].float() / temperature, -1)
            old = torch.log_softmax(teacher[part].float() / temperature, -1)
            weights = old.exp()
            values[part] = (weights * (old - new)).sum(-1) * temperature**2
            if wanted:
                gradient[part] = (new.exp_() - weights) * temperature
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None
