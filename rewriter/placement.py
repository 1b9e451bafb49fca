"""Where a module's weights lie: a model on a graphics card is rewritten on the processor, and goes back to its card."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree

from rewriter.errors import UnsupportedModel

PROCESSOR = torch.device("cpu")


def device_of(module: torch.nn.Module) -> torch.device:
    """The device of all weights; the processor for a module without.

    Raises UnsupportedModel if they lie on several.
    """
    found = {t.device for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"}
    if len(found) > 1:
        raise UnsupportedModel(
            f"the model's weights are spread over {', '.join(sorted(map(str, found)))}",
            hint='load it on one device: without device_map, or with model.to("cpu")',
        )
    return found.pop() if found else PROCESSOR


def without_numbers(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor's numbers from being read ("on the meta device"); None if they are there."""
    if is_fake(tensor):
        return "a fake tensor and has no numbers"
    if tensor.device.type == "meta":
        return "on the meta device and has no numbers"
    return None if tensor.layout == torch.strided else f"stored as {str(tensor.layout).removeprefix('torch.')}"


def moved(values: Any, device: torch.device) -> Any:
    """The same nest of values with every tensor on `device`."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), values)


@contextlib.contextmanager
def on_processor(module: torch.nn.Module) -> Iterator[None]:
    """Inside, `module` lies on the processor, where everything that is read off it is worked out.

    Raises UnsupportedModel as `device_of` does.
    """
    home = device_of(module)
    if home == PROCESSOR:
        yield
        return
    module.to(PROCESSOR)
    try:
        yield
    finally:
        module.to(home)
