"""Which versions of everything a measurement ran on."""

from __future__ import annotations

import platform
from importlib import metadata

import rewriter

_PACKAGES = {"onnx": ("numpy",), "torch": ("torch", "transformers", "numpy")}


def versions(kind: str) -> dict[str, str]:
    """Version by name, for models of a kind ("onnx" or "torch"); what is not installed is left out.

    Both wheels of onnxruntime share one folder, and the module's own version is that of the one in use.
    """
    found = {"rewriter": rewriter.__version__, "python": platform.python_version()}
    for name in _PACKAGES[kind]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if kind == "onnx":
        import onnxruntime

        found["onnxruntime"] = onnxruntime.__version__
    return found
