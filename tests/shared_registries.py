"""The exporter's table of operators: torch.onnx makes it anew for every export, which takes a second each time.

It depends on the opset alone, so that exports to one opset get copies of one table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch.onnx._internal.exporter._registration import ONNXRegistry


@dataclass
class Registries:
    """Tables by opset; `make` is ``ONNXRegistry.from_torchlib``."""

    make: Callable[..., ONNXRegistry]
    known: dict[tuple[int, ...], ONNXRegistry] = field(default_factory=dict)

    def shared(self, *opset_version: int, **by_name: int) -> ONNXRegistry:
        """As `make`; what is registered with one copy is in no other."""
        key = (*opset_version, *by_name.values())
        if key not in self.known:
            self.known[key] = self.make(*key)
        found, copied = self.known[key], ONNXRegistry()
        copied.__dict__.update(found.__dict__)
        copied.functions = {target: list(metas) for target, metas in found.functions.items()}
        return copied
