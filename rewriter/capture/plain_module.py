"""What a module must be for its weights to be rewritten: numbers that are there, and code that is Python."""

from __future__ import annotations

import itertools

import torch

from rewriter.errors import UnsupportedModel
from rewriter.placement import without_numbers

_PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Where modules come from whose weights are no tensors in the module."""


def require_plain(module: torch.nn.Module) -> None:
    """Weights must be there as numbers, and code as Python: what hides either is refused."""
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModel("the module is compiled to TorchScript", hint="give the module that it was made from")
    if hasattr(module, "_orig_mod") and hasattr(module, "dynamo_ctx"):
        raise UnsupportedModel(
            "the module is compiled by torch.compile", hint="give model._orig_mod, and compile what comes out"
        )
    missing = next((n for n, p in module.named_parameters() if p.device.type == "meta"), None)
    if missing is not None:
        raise UnsupportedModel(
            f"{missing} is on the meta device and has no numbers",
            hint="load the weights first; a checkpoint larger than memory: rewriter rewrite --streamed",
        )
    dense = ((n, b) for n, b in module.named_buffers() if not b.is_sparse)  # what is sparse marks places (heads, say)
    for name, tensor in itertools.chain(module.named_parameters(), dense):
        if (hidden := without_numbers(tensor)) is not None:
            raise UnsupportedModel(f"{name} is {hidden}", hint="give a module whose weights are ordinary dense tensors")
    if hasattr(module, "merge_and_unload") or hasattr(module, "peft_config"):
        raise UnsupportedModel("the model carries unmerged adapters", hint="call model.merge_and_unload() first")
    packed = next((n for n, m in module.named_modules() if type(m).__module__.startswith(_PACKED)), None)
    if packed is not None:
        raise UnsupportedModel(
            f"{packed} is quantised by torch and holds its weights packed",
            hint="rewrite the float model, and quantise what comes out",
        )
    if getattr(module, "hf_quantizer", None) is not None or getattr(module, "is_quantized", False):
        raise UnsupportedModel("the model's weights are quantised by a library", hint="load it in float or bfloat16")
