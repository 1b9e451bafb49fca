"""Writing a trained student: a checkpoint folder, or an .onnx file, by one of the processes."""

from __future__ import annotations

import os
from pathlib import Path

from rewriter.model_kinds import is_onnx
from rewriter.uptrain.result import Uptrained


def save(done: Uptrained, path: Path) -> None:
    """See `Uptrained.save`."""
    if int(os.environ.get("RANK", "0")):
        return
    if is_onnx(done.model):
        from rewriter.install.onnx_write import save as write_onnx

        write_onnx(done.model, path)
        return
    from rewriter.install.checkpoint_saving import save as write

    source = done.student_from if done.student_from is not None and done.student_from.is_dir() else None
    write(done.model, path, state_dict=done.state, source=source)
