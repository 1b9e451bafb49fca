"""Captures what a call launches on a graphics card as a CUDA graph, so that replaying it costs one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewriter.errors import UnsupportedModel, first_line

_WARM_UP = 3
"""Calls before the capture: libraries choose their kernels and take their workspaces in the first ones."""


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Replays of `work`, whose operands stay where they are.

    Raises UnsupportedModel if it cannot be captured: it waits for the card, or decides by values what to launch.
    """
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        raise UnsupportedModel(
            f"the call cannot be captured as a CUDA graph: {first_line(error)}", hint="leave the CUDA graph out"
        ) from error
    replay: Callable[[], object] = graph.replay
    return replay
