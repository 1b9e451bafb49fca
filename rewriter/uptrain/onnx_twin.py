"""ONNX students: trained as the torch model that they were exported from, whose weights are then put into the file."""

from __future__ import annotations

from typing import Any

from rewriter.errors import UnsupportedModel
from rewriter.uptrain.result import Uptrained


def uptrain_onnx(student: Any, twin: Any, *args: Any, **kwargs: Any) -> Uptrained:
    raise UnsupportedModel(
        "an ONNX model cannot be trained as it is",
        hint="rewrite and uptrain the torch model, then export it",
    )
