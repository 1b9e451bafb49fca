"""Which attentions and feed-forward blocks of a torch model call generated kernels: replaced modules, and Hugging Face
models' own attentions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from codegen.errors import NotLegal
from codegen.spec import FourierMixing, MixedChunkAttention
from rewriter.errors import UsageError
from rewriter.install.attention_interface import attach, detach
from rewriter.install.conditional_block import conditional_blocks
from rewriter.install.expert_mixer import expert_mixers
from rewriter.install.token_mixer import token_mixers
from rewriter.install.torch_module import mixers
from rewriter.install.unit_block import unit_blocks


def choose_kernels(
    model: nn.Module, kernels: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, everywhere: bool
) -> None:
    """Tell a model's attentions which kernels to call, in place.

    Args:
        kernels: "auto", "off", "cpp", "triton" or "cuda".
        args, kwargs: a call of the model, by which Hugging Face models prove that they go on answering the same.
        everywhere: also at attentions of a Hugging Face model that were not rewritten.

    Raises UsageError if kernels are asked for by name that nothing in the model can call, or that are not to be had.
    """
    kinds = (FourierMixing,) if kernels == "cuda" else (FourierMixing, MixedChunkAttention)
    units = [*token_mixers(model).values(), *unit_blocks(model).values()]
    mixes = [m for m in units if isinstance(m.spec, kinds)]  # others have no kernels
    found: list[Any] = [*mixers(model).values(), *mixes]
    for mixer in found:
        mixer.kernels = kernels
    blocks: list[Any] = [*expert_mixers(model).values(), *conditional_blocks(model).values()]
    for block in blocks:
        reached = kernels != "cuda"  # blocks that route tokens have no kernels in that language
        block.kernels = kernels if reached else "auto"
        found += [block] * reached
    sparse = [mixer for mixer in mixers(model).values() if mixer.spec.pattern]
    if kernels not in ("auto", "off", "cpp", "triton") and sparse:
        raise UsageError(
            f"{len(sparse)} attentions are sparse, and there is no {kernels} kernel of sparse attention",
            hint='use kernels="auto" or "off"',
        )
    linear = [mixer for mixer in mixers(model).values() if mixer.linear_term is not None]
    if kernels not in ("auto", "off", "cpp", "triton") and linear:
        raise UsageError(
            f"{len(linear)} attentions are linear, and there is no {kernels} kernel of linear attention",
            hint='use kernels="auto" or "off"',
        )
    detach(model)
    try:
        attached = kernels != "off" and attach(model, kernels, args, kwargs, everywhere=everywhere)
    except NotLegal as error:
        raise UsageError(f"kernels={kernels!r}: {error}", hint=error.hint) from error
    if kernels not in ("auto", "off") and not found and not attached:
        raise UsageError(
            f"the model goes on with its own attention code, which kernels={kernels!r} cannot reach",
            hint="attention modules that were replaced call kernels, and Hugging Face models that run on sdpa",
        )
