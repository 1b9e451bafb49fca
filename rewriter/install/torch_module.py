"""The door out for torch modules: one attention module of a model is replaced in place, after proof.

A mixer with the *original's* weights must first answer as the original does (reproduction.py). Only then the one with
the new weights takes the module's place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from codegen.spec import DecoupledAttention, GroupedQueryAttention, LinearAttention
from rewriter.errors import UnsupportedModel
from rewriter.install.call_record import CallRecord, snapshot
from rewriter.install.conditional_block import ConditionalBlock
from rewriter.install.expert_mixer import ExpertMixer
from rewriter.install.huggingface import guard_saving, keep_output_capture, move_dispatch_hook
from rewriter.install.linear_term import LinearTerm
from rewriter.install.mixer import MixerParameters, RewrittenMixer, stripped
from rewriter.install.protocol import Protocol, read_protocol
from rewriter.install.reproduction import HINT, disagreement, settle
from rewriter.install.tensors import owned_parameter, repeat_heads
from rewriter.install.token_mixer import Absorbed, TokenMixer
from rewriter.install.unit_block import UnitBlock
from rewriter.module_modes import evaluating

LAYER_INDEX = ("layer_idx", "layer_index", "layer_id", "layer_number")


def install(
    model: nn.Module,
    owner: str,
    spec_before: GroupedQueryAttention,
    spec_after: GroupedQueryAttention,
    before: MixerParameters,
    after: MixerParameters,
    record: CallRecord,
    *,
    out: str | None = None,
    q_norm: str | None = None,
    k_norm: str | None = None,
    linear: tuple[LinearAttention, Mapping[str, Tensor]] | None = None,
    decoupled: DecoupledAttention | None = None,
) -> RewrittenMixer:
    """Replace `model.<owner>` in place by a `RewrittenMixer` with `spec_after` and the parameters `after`.

    Args:
        owner: dotted path of the module that owns the attention.
        before: the original's canonical parameters; views of its weights are welcome, nothing is copied.
        after: the new ones. Parameters that are the original's own objects stay shared; other tensors become
            new parameters of the original's dtype and device, trainable as the original was.
        record: a recorded call of the owner, without a filled cache, of two tokens or more.
        out: path, from the owner, of the submodule that projects the merged heads; None if there is none or if
            `before.out_weight` holds it.
        q_norm, k_norm: paths, from the owner, of norms over each head's features.
        linear: what far keys weigh instead of a softmax, with its parameters.
        decoupled: keys and values differ in their number of heads; `spec_after` is as what that is computed.

    Raises:
        UnsupportedModel: if the original cannot be reproduced with its own weights; the model is then unchanged.
    """
    original = _owned(model, owner)
    after = _owned_parameters(after, before.k_weight, original)
    if isinstance(original, RewrittenMixer):
        others = (linear, original.linear_term, decoupled, original.apart)
        if any(other is not None for other in others):
            raise UnsupportedModel(f"{owner} is rewritten already", hint="Rewrite the original model.")
        mixer = _again(original, _seeing_no_more(original.spec, spec_after, owner), after)
        _check_grouping(copy.deepcopy(original), mixer, after, record, owner)
        place(model, owner, mixer)
        return mixer
    protocol = read_protocol(record, owner, heads=spec_before.heads, causal=spec_before.causal)
    build = _Builder(original, record, out, q_norm, k_norm, position=_needs_position(original, protocol, record))
    proof = build.mixer(spec_before, protocol, before)
    protocol = settle(original, proof, record, owner)
    mixer = build.mixer(spec_after, protocol, after)
    if decoupled is not None:
        mixer.separate(decoupled.key_heads, decoupled.value_heads)
    _check_grouping(proof, mixer, after, record, owner)
    if linear is not None:
        _make_linear(mixer, *linear, record)
    place(model, owner, mixer)
    return mixer


def _make_linear(
    mixer: RewrittenMixer, spec: LinearAttention, parameters: Mapping[str, Tensor], record: CallRecord
) -> None:
    """Give a mixer its feature maps, and let it answer the recorded call once."""
    like = mixer.k_proj.weight
    fresh = {name: owned_parameter(tensor, like, like.requires_grad) for name, tensor in parameters.items()}
    mixer.linear_term = LinearTerm(spec, fresh)
    try:
        with torch.no_grad(), evaluating(mixer):
            mixer(*map(snapshot, record.args), **_snapshots(record.kwargs))
    except TypeError as error:
        raise UnsupportedModel(str(error), hint="Load Hugging Face models with attention on sdpa.") from error


def place(
    model: nn.Module,
    owner: str,
    mixer: RewrittenMixer | TokenMixer | ExpertMixer | ConditionalBlock | UnitBlock | Absorbed,
) -> None:
    """Put `mixer` wherever `model.<owner>` stands, with its hooks, and keep surrounding code working."""
    original = _owned(model, owner)
    keep_output_capture(model, owner, mixer)
    guard_saving(model, owner)
    mixer.mimic(original)
    mixer.train(original.training)
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        getattr(mixer, name).update(getattr(original, name))
    move_dispatch_hook(original, mixer)
    for parent, name in list(_places(model, original)):
        setattr(parent, name, mixer)
    for module in model.modules():
        # torch's encoder turns padded batches into nested tensors, which only its own attention kernel takes
        if getattr(module, "use_nested_tensor", False) and any(child is mixer for child in module.modules()):
            setattr(module, "use_nested_tensor", False)  # noqa: B010


def mixers(model: nn.Module) -> dict[str, RewrittenMixer]:
    """The modules of a model that attend anew, by dotted path, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RewrittenMixer)}


def _needs_position(original: nn.Module, protocol: Protocol, record: CallRecord) -> bool:
    """True if the original computes its own score bias and has a method for it."""
    if not callable(getattr(original, "compute_bias", None)):
        return False
    if "bias" not in protocol.returns:  # it keeps the bias to itself, and computes one if it has a table
        return any(isinstance(child, nn.Embedding) for child in original.children())
    name = protocol.name("bias")
    return record.arguments.get(name or "") is None and bool(record.output[protocol.returns.index("bias")].any())


def _again(previous: RewrittenMixer, spec: GroupedQueryAttention, parameters: MixerParameters) -> RewrittenMixer:
    """The mixer of an attention that has been rewritten before; its call is settled already."""
    mixer = RewrittenMixer(
        spec,
        previous.protocol,
        parameters,
        out=previous.out_proj,
        q_norm=previous.q_norm,
        k_norm=previous.k_norm,
        position=previous.position,
        layer_index=previous.layer_index,
    )
    mixer.input_norm, mixer.output_norm = previous.input_norm, previous.output_norm
    mixer.taken_from = dict(previous.taken_from)
    return mixer


def _seeing_no_more(before: GroupedQueryAttention, after: GroupedQueryAttention, owner: str) -> GroupedQueryAttention:
    """`after`, with the pattern that an attention follows already. Raises UnsupportedModel if there are two."""
    if before.pattern and after.pattern:
        raise UnsupportedModel(f"{owner} follows a sparse pattern already", hint="Rewrite the original model.")
    return replace(after, pattern=before.pattern or after.pattern)


class _Builder:
    """Builds mixers out of one original and the submodules that are taken over from it."""

    def __init__(
        self,
        original: nn.Module,
        record: CallRecord,
        out: str | None,
        q_norm: str | None,
        k_norm: str | None,
        *,
        position: bool,
    ) -> None:
        self.layer_index = _layer_index(original, record)
        self.names = {"out": out, "q_norm": q_norm, "k_norm": k_norm}
        self.taken = {role: None if name is None else _owned(original, name) for role, name in self.names.items()}
        self.original = original
        self.position = stripped(original) if position else None

    def mixer(self, spec: GroupedQueryAttention, protocol: Protocol, parameters: MixerParameters) -> RewrittenMixer:
        mixer = RewrittenMixer(
            spec,
            protocol,
            parameters,
            out=self.taken["out"],
            q_norm=self.taken["q_norm"],
            k_norm=self.taken["k_norm"],
            position=self.position,
            layer_index=self.layer_index,
        )
        mixer.taken_from = dict(self.names)
        mixer.adopt(protocol, self.original)
        return mixer


def _layer_index(original: nn.Module, record: CallRecord) -> int | None:
    """The number under which the original keeps its keys in a cache: told in the call, or known to the module."""
    told = (record.arguments.get(name) for name in LAYER_INDEX)
    known = (getattr(module, name, None) for module in original.modules() for name in LAYER_INDEX)
    return next((value for value in (*told, *known) if isinstance(value, int) and value >= 0), None)


def _check_grouping(
    proof: RewrittenMixer, mixer: RewrittenMixer, after: MixerParameters, record: CallRecord, owner: str
) -> None:
    """The new mixer must equal the old form with the new queries and each new head repeated for its group."""
    proof.q_proj, proof.out_proj = mixer.q_proj, mixer.out_proj
    proof.follow(replace(proof.spec, pattern=mixer.spec.pattern))

    def wide(tensor: Tensor | None, heads: int) -> nn.Parameter | None:
        if tensor is None:
            return None
        repeated = repeat_heads(tensor.detach(), heads, proof.spec.kv_heads // heads)
        return nn.Parameter(repeated, requires_grad=False)

    for projection, weight, bias, heads in (
        (proof.k_proj, after.k_weight, after.k_bias, mixer.kv_heads[0]),
        (proof.v_proj, after.v_weight, after.v_bias, mixer.kv_heads[1]),
    ):
        projection.register_parameter("weight", wide(weight, heads))
        projection.register_parameter("bias", wide(bias, heads))
    with torch.no_grad(), evaluating(proof), evaluating(mixer):
        answers = [m(*map(snapshot, record.args), **_snapshots(record.kwargs)) for m in (mixer, proof)]
    if (reason := disagreement(*answers)) is not None:
        raise UnsupportedModel(f"{owner}: shared heads do not equal repeated ones ({reason})", hint=HINT)


def _owned_parameters(parameters: MixerParameters, like: Tensor, original: nn.Module) -> MixerParameters:
    """Parameters as they are; fresh ones, of `like`'s dtype and on its device, out of other tensors."""
    trainable = any(p.requires_grad for p in original.parameters())
    fresh: dict[str, Any] = {
        name: None if tensor is None else owned_parameter(tensor, like, trainable)
        for name, tensor in vars(parameters).items()
    }
    return replace(parameters, **fresh)


def _owned(model: nn.Module, path: str) -> nn.Module:
    if not path:
        raise UnsupportedModel(
            "the attention is the model itself, which cannot be replaced in place",
            hint="Put the module into another one, e.g. torch.nn.Sequential(module).",
        )
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModel(f"the model has no module {path!r}") from error


def _places(model: nn.Module, original: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is original:
                yield parent, name


def _snapshots(arguments: Any) -> dict[str, Any]:
    return {name: snapshot(value) for name, value in arguments.items()}
