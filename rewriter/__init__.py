"""rewriter: cheaper token mixing for trained transformers, with the weights transformed.

Everything public is imported on first use, so that ``import rewriter`` needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rewriter.errors import (
    InvalidModelFile,
    NothingToRewrite,
    RewriteError,
    UnknownTarget,
    UnsupportedModel,
    UsageError,
    VerificationFailed,
)

if TYPE_CHECKING:
    from passes.budget import Budget
    from rewriter.inspection import Inspection, inspect, targets
    from rewriter.install.bounded_cache import bounded_cache
    from rewriter.optimize import Rewritten, load, optimize, save, use_kernels, verify
    from rewriter.profile.compare import profile
    from rewriter.uptrain.recipe import Recipe
    from rewriter.uptrain.result import Uptrained
    from rewriter.uptrain.run import uptrain

__version__ = "0.1.0"

_LAZY = {
    "Budget": "passes.budget",
    "Inspection": "rewriter.inspection",
    "Recipe": "rewriter.uptrain.recipe",
    "Rewritten": "rewriter.optimize",
    "Uptrained": "rewriter.uptrain.result",
    "bounded_cache": "rewriter.install.bounded_cache",
    "inspect": "rewriter.inspection",
    "load": "rewriter.optimize",
    "optimize": "rewriter.optimize",
    "profile": "rewriter.profile.compare",
    "save": "rewriter.optimize",
    "targets": "rewriter.inspection",
    "uptrain": "rewriter.uptrain.run",
    "use_kernels": "rewriter.optimize",
    "verify": "rewriter.optimize",
}

__all__ = [
    "Budget",
    "Inspection",
    "InvalidModelFile",
    "NothingToRewrite",
    "Recipe",
    "RewriteError",
    "Rewritten",
    "UnknownTarget",
    "UnsupportedModel",
    "Uptrained",
    "UsageError",
    "VerificationFailed",
    "__version__",
    "bounded_cache",
    "inspect",
    "load",
    "optimize",
    "profile",
    "save",
    "targets",
    "uptrain",
    "use_kernels",
    "verify",
]


class _Package(ModuleType):
    """Importing a submodule sets it as an attribute of its package; it must not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'rewriter' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value
