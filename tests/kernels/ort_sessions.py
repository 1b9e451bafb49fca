"""Sessions of onnxruntime with or without the library of operators, and which operators they ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort


def profiled_session(model: bytes, library: Path | None, folder: Path) -> Any:
    """On two threads, its profile below `folder`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def operators_run(session: Any) -> set[str]:
    """By name; ends the session's profile."""
    events = json.loads(Path(session.end_profiling()).read_text())
    return {e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")}
