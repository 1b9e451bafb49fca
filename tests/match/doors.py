"""The zoo through both doors: one Flow and its matches, whatever the model was written in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from passes.dataflow import Flow
from passes.match.attention import Matches, find_attention
from rewriter.capture import onnx_file, onnx_load, torch_export
from rewriter.capture.example_inputs import prepare
from rewriter.onnx_rewrite import match_capture
from tests.zoo.case import ZooCase


@dataclass(frozen=True)
class Seen:
    """A captured program and what was found in it."""

    flow: Flow
    matches: Matches


def through_torch(case: ZooCase, batch: int = 2, length: int = 7) -> Seen:
    module = case.build()
    flow = torch_export.capture(module, *prepare(module, case.inputs(batch, length, 0))).flow
    return Seen(flow, find_attention(flow))


def through_onnx(path: Path) -> Seen:
    captured = onnx_file.capture(onnx_load.load(path))
    return Seen(captured.flow, match_capture(captured))
