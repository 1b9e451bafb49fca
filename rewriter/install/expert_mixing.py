"""The module door for blocks: a feed-forward block's module is replaced once it is proved to be the block.

Proof is by recorded values, before anything is replaced. A module that reads the block's input and answers its output
is the block. Where the block is two modules, one that answers the hidden layer and one that projects it (as in BERT),
experts, or a light and a heavy branch, stand in the place of the first and nothing in that of the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codegen.conditional import ConditionalFeedForward
from codegen.spec import GatedAttention, MixedChunkAttention
from passes.dataflow import Array, Flow, Value
from passes.feed_forward_site import FeedForwardSite
from passes.targets.block import BlockReplacement
from rewriter.errors import UnsupportedModel
from rewriter.install.call_record import CallRecord, record_calls
from rewriter.install.conditional_block import ConditionalBlock
from rewriter.install.expert_mixer import ExpertMixer, parameters_like
from rewriter.install.reproduction import TOLERANCE
from rewriter.install.token_mixer import Absorbed
from rewriter.install.torch_module import place
from rewriter.install.unit_block import UnitBlock

NO_MODULE = "no module of its own computes it"


@dataclass(frozen=True)
class Proved:
    """Where what replaces one block goes.

    Attributes:
        path: of the module whose place it takes.
        projection: path of the output projection's module where that lies outside, else None.
        behind: path of the attention's module before a causal unit, "" elsewhere.
    """

    replacement: BlockReplacement
    path: str
    projection: str | None
    behind: str = ""


def prove_blocks(
    model: nn.Module,
    flow: Flow,
    replacements: Sequence[BlockReplacement],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[list[Proved], dict[str, str]]:
    """Modules that are proved to be the blocks, and the reason by site name for the others. Nothing is changed."""
    sites = [r.site for r in replacements]
    wanted = candidates(model, flow, sites)
    found = block_modules(model, flow, sites, record_calls(model, wanted, args, kwargs) if wanted else {})
    proved = [Proved(r, *found[r.site.name]) for r in replacements if r.site.name in found]
    why = f"{NO_MODULE}; in an .onnx file of the model it may be possible"
    return proved, {r.site.name: why for r in replacements if r.site.name not in found}


def candidates(model: nn.Module, flow: Flow, sites: Sequence[FeedForwardSite]) -> list[str]:
    """Paths of the modules whose calls `block_modules` asks for."""
    return sorted({p for site in sites for p in _paths(model, flow, site) if p is not None})


def block_modules(
    model: nn.Module, flow: Flow, sites: Sequence[FeedForwardSite], records: Mapping[str, CallRecord]
) -> dict[str, tuple[str, str | None]]:
    """By site name, the path of the module that is proved to be the block, and None; or of the one that computes its
    hidden layer, and of the one that projects that. Blocks that no module of their own computes are left out."""
    found: dict[str, tuple[str, str | None]] = {}
    for site in sites:
        whole, first, last = _paths(model, flow, site)
        if whole is not None and _is_block(flow, records.get(whole), site.up.projection.input, site.output):
            found[site.name] = (whole, None)
        elif _is_pair(flow, records, first, last, site):
            found[site.name] = (first or "", last)
    return found


def install_blocks(model: nn.Module, proved: Sequence[Proved]) -> None:
    """Put every new module where it was proved to belong."""
    for one in proved:
        original = model.get_submodule(one.path)
        like = next(original.parameters(), None)
        if like is None:
            raise UnsupportedModel(f"{one.path} holds no parameters of its own")
        place(model, one.path, _module(one, parameters_like(one.replacement.tensors, like)))
        if one.projection is not None:
            place(model, one.projection, Absorbed())


def _module(one: Proved, parameters: Mapping[str, nn.Parameter]) -> ExpertMixer | ConditionalBlock | UnitBlock:
    spec, batch_first = one.replacement.spec, one.replacement.batch_first
    if isinstance(spec, (GatedAttention, MixedChunkAttention)):
        return UnitBlock(spec, parameters, batch_first=batch_first, behind=one.behind)
    if isinstance(spec, ConditionalFeedForward):
        return ConditionalBlock(spec, parameters, batch_first=batch_first)
    return ExpertMixer(spec, parameters)


def _paths(model: nn.Module, flow: Flow, site: FeedForwardSite) -> tuple[str | None, str | None, str | None]:
    """Paths of what may be the block, of what may compute its hidden layer, and of what may project that."""
    up, down = (_module_of(flow, v) for v in (site.up.projection.weight, site.down.weight))
    if up is None or down is None:
        return None, None, None
    common: list[str] = []
    for a, b in zip(up.split("."), down.split("."), strict=False):
        if a != b:
            break
        common.append(a)
    whole = ".".join(common)
    known = {name for name, _ in model.named_modules() if name}
    first = ".".join(up.split(".")[: len(common) + 1])
    return tuple(p if p in known else None for p in (whole, first, down))  # type: ignore[return-value]


def _module_of(flow: Flow, value: Value) -> str | None:
    weight = flow.weights.get(value)
    return weight.name.rpartition(".")[0] if weight is not None and "." in weight.name else None


def _is_block(flow: Flow, record: CallRecord | None, given: Value, answered: Value) -> bool:
    """Whether a module was called with this value alone, once, and answered that one."""
    if record is None or record.calls != 1 or not isinstance(record.output, Tensor):
        return False
    tensors = [v for v in record.arguments.values() if isinstance(v, Tensor)]
    others = [v for v in record.arguments.values() if not isinstance(v, Tensor) and v is not None]
    if len(tensors) != 1 or others:
        return False
    return _holds(tensors[0], flow.value(given)) and _holds(record.output, flow.value(answered))


def _is_pair(
    flow: Flow,
    records: Mapping[str, CallRecord],
    first: str | None,
    last: str | None,
    site: FeedForwardSite,
) -> bool:
    if first is None or last is None or last.startswith(f"{first}."):
        return False
    hidden = site.down.input
    return _is_block(flow, records.get(first), site.up.projection.input, hidden) and _is_block(
        flow, records.get(last), hidden, site.output
    )


def _holds(tensor: Tensor, array: Array) -> bool:
    """Whether a recorded tensor holds these numbers, in this order."""
    if tensor.numel() != array.size or tensor.shape[-1] != array.shape[-1]:
        return False
    mine = tensor.detach().double().cpu().numpy().reshape(array.shape)
    limit = TOLERANCE.get(tensor.dtype, TOLERANCE[torch.float32])
    return bool(np.abs(mine - array).max() <= limit * max(float(np.abs(array).max()), 1e-30))
