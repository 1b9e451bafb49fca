"""What a trial run changed on a module is put back: attributes, buffers and parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewriter.module_modes import unchanged


class Changes(nn.Module):
    """Exchanges a part of itself, counts its calls and caches a table."""

    def __init__(self) -> None:
        super().__init__()
        self.part: nn.Module = nn.Linear(3, 3)
        self.calls = 0
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.part, self.calls, self.last = nn.Identity(), self.calls + 1, x
        self.table = torch.ones(2)
        return x


def test_a_trial_run_leaves_nothing_behind() -> None:
    module = Changes()
    part = module.part
    with unchanged(module):
        module(torch.zeros(1, 3))
        assert module.part is not part
    assert module.part is part and module.calls == 0 and not hasattr(module, "last")
    assert not module.table.any()
