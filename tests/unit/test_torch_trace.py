"""What may be written in place when a run is traced: tensors that nothing else reads."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from passes.match.attention import find_attention
from rewriter.capture.torch_export import capture
from rewriter.capture.torch_trace import writes_through_views


def _filled_cast(x: Tensor) -> Tensor:
    return torch.zeros(3).to(torch.float64).fill_(2.0) + x


def _filled_slice_read_later(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:].fill_(0.0)
    return y


def _filled_view_of_an_input(x: Tensor) -> Tensor:
    return x[:, 1:].fill_(0.0)


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        pytest.param(_filled_cast, False, id="fresh-cast"),
        pytest.param(_filled_slice_read_later, True, id="slice-of-what-is-read"),
        pytest.param(_filled_view_of_an_input, True, id="slice-of-an-input"),
    ],
)
def test_writes_that_nothing_else_sees_are_no_obstacle(function: Callable[[Tensor], Tensor], seen: bool) -> None:
    graph = make_fx(function, tracing_mode="real", pre_dispatch=True)(torch.randn(2, 3))
    assert any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in graph.graph.nodes)
    assert writes_through_views(graph.graph) is seen


class _Branching(nn.Module):
    """Attention under a mask that is made by filling a cast, if any key is hidden at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (torch.unflatten(p(x), -1, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        if not keep.all():
            low = torch.zeros(()).to(scores.dtype, copy=False).fill_(-1e30)
            scores = torch.where(keep[:, None, None], scores, low)
        return torch.as_tensor(self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_an_attention_behind_a_branch_and_a_filled_cast_is_found() -> None:
    keep = torch.tensor([[True, True, True, False], [True, True, True, True]])
    inputs: dict[str, Any] = {"x": torch.randn(2, 4, 16), "keep": keep}
    captured = capture(_Branching().eval(), (), inputs)
    assert captured.program is None, "it was exported, so that nothing was traced"
    assert len(find_attention(captured.flow).sites) == 1


def test_a_capture_writes_no_stack_traces_and_leaves_the_setting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx import config

    if not hasattr(config, "do_not_emit_stack_traces"):
        pytest.skip("this torch has no such setting")
    module, args = torch.nn.Linear(3, 3), (torch.ones(2, 3),)

    def traces(program: torch.export.ExportedProgram | None) -> int:
        assert program is not None
        return sum(bool(node.stack_trace) for node in program.graph.nodes)

    monkeypatch.setattr(config, "do_not_emit_stack_traces", False)
    plain = torch.export.export(module, args, strict=False)
    assert traces(capture(module, args, {}).program) == 0 < traces(plain)
    for before in (True, False):
        monkeypatch.setattr(config, "do_not_emit_stack_traces", before)
        capture(module, args, {})
        assert config.do_not_emit_stack_traces is before


def test_a_capture_logs_nothing_and_others_go_on_logging() -> None:
    """torch logs tracebacks of exports that fail, by handlers of its own; what fails is tried otherwise."""
    said = io.StringIO()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    handler = logging.StreamHandler(said)

    class Talking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("a graph", file=sys.stderr)
            logger.error("a traceback")
            return x * 2

    module, args = Talking(), (torch.ones(2, 3),)
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(said):
            capture(module, args, {})
            assert not said.getvalue()
            module(*args)
    finally:
        logger.removeHandler(handler)
    assert said.getvalue() == "a graph\na traceback\n"
