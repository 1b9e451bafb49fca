"""What kind of model a person handed in, told without importing libraries that are not loaded yet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def is_torch(model: Any) -> bool:
    """A torch module (a GraphModule too) or an exported program."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    export = sys.modules.get("torch.export")
    return isinstance(model, torch.nn.Module) or (export is not None and isinstance(model, export.ExportedProgram))


def is_onnx(model: Any) -> bool:
    """An onnx.ModelProto or an onnx_ir.Model."""
    onnx, onnx_ir = sys.modules.get("onnx"), sys.modules.get("onnx_ir")
    return (onnx is not None and isinstance(model, onnx.ModelProto)) or (
        onnx_ir is not None and isinstance(model, onnx_ir.Model)
    )


def larger_than_memory(folder: Path) -> bool:
    """True if a checkpoint's safetensors take more than half of the memory that is free: a rewrite holds some twice."""
    import psutil  # type: ignore[import-untyped]

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return bool(2 * size > psutil.virtual_memory().available)
