"""The module door for mixing: an attention module is replaced once it is proved to be the sublayer and nothing else.

Proof is by recorded values. What the module was called with must be the hidden states that the matched projections read
(perhaps before a norm of its own), and what it answered must be what the matched output projection gave. Where that
projection lies outside, the module's answer must be what it reads; the mix then stands at the module's place and
nothing at the projection's, so that both together are the mix.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codegen.ops.token_mixing import token_mixing
from codegen.spec import TokenMixing
from passes.dataflow import Array
from rewriter.errors import UnsupportedModel
from rewriter.install.call_record import CallRecord, snapshot
from rewriter.install.mixer import stripped
from rewriter.install.padding import shown_tokens
from rewriter.install.protocol import Protocol, read_protocol
from rewriter.install.reproduction import HINT, TOLERANCE, disagreement
from rewriter.install.tensors import owned_parameter
from rewriter.install.token_mixer import Absorbed, TokenMixer, norms, token_mixers
from rewriter.install.torch_module import place
from rewriter.module_modes import evaluating


@dataclass(frozen=True)
class Recorded:
    """What matching saw of a sublayer on the call that modules were recorded on.

    Attributes:
        hidden, output: its input and output, [B, S, E].
        merged: what the output projection reads, [B, S, F].
        shown: bool [B, S], tokens that are no padding, for mixes that heed it.
    """

    hidden: Array
    output: Array
    merged: Array
    shown: Array | None = None


def install_mixing(
    model: nn.Module,
    owner: str,
    spec: TokenMixing,
    tensors: Mapping[str, Array],
    records: Mapping[str, CallRecord],
    seen: Recorded,
    *,
    heads: int,
    out: str | None,
) -> None:
    """Replace `model.<owner>` in place, and the output projection too where it lies outside.

    Args:
        tensors: parameters of the spec's `shapes`.
        records: recorded calls by path, of the owner and of `out`.
        heads: query heads of the original, to tell attention weights among its results.
        out: path of the output projection's module, None where it is no module of its own.

    Raises:
        UnsupportedModel: if the owner is not proved to be the sublayer; the model is then unchanged.
    """
    record = _record(records, owner)
    outside = out is not None and not out.startswith(f"{owner}.")
    original = model.get_submodule(owner)
    protocol = read_protocol(record, owner, heads=heads, causal=False)
    with evaluating(original):
        protocol = _with_input(protocol, original, record, seen.hidden, owner)
        if not outside:
            protocol = _with_output(protocol, original, record, seen.output, owner)
    if outside:
        assert out is not None
        answer = record.output if protocol.bare else record.output[0]
        _require(_is(answer, seen.merged, protocol), owner, "its answer is not the attention's")
        _require_next(_record(records, out), answer, seen.output, protocol, out)
    mixer = _built(original, spec, protocol, tensors, record, owner)
    _require_same_padding(mixer, record, seen, owner)
    _check(mixer, record, seen, tensors, owner)
    place(model, owner, mixer)
    if outside:
        assert out is not None
        place(model, out, Absorbed())


def _record(records: Mapping[str, CallRecord], path: str) -> CallRecord:
    record = records.get(path)
    if record is None:
        raise UnsupportedModel(f"{path} was not called by the model's forward")
    if not record.alike:
        raise UnsupportedModel(f"{path} is called with different arguments in one forward")
    return record


def _require(holds: bool, owner: str, otherwise: str) -> None:
    if not holds:
        raise UnsupportedModel(f"{owner} does more than attend, or less: {otherwise}", hint=HINT)


def _with_input(protocol: Protocol, original: nn.Module, record: CallRecord, hidden: Array, owner: str) -> Protocol:
    """The protocol with the order of axes, and the norm between the module's argument and the projections, if any."""
    given = record.arguments.get(protocol.name("hidden") or "")
    if not isinstance(given, Tensor):
        raise UnsupportedModel(f"{owner} is not called with hidden states")
    for path, norm in _norms(original):
        for batch_first in (True, False):
            found = replace(protocol, batch_first=batch_first, input_norm=path)
            with contextlib.suppress(RuntimeError, TypeError, ValueError), torch.no_grad():  # a norm of something else
                if _is(norm(given), hidden, found):
                    return found
    raise UnsupportedModel(
        f"{owner} does more than attend: what its projections read is not what it is called with", hint=HINT
    )


def _with_output(protocol: Protocol, original: nn.Module, record: CallRecord, output: Array, owner: str) -> Protocol:
    """The protocol with what the module does behind the output projection: adds its input, normalises, or neither."""
    given = record.arguments[protocol.name("hidden") or ""]
    answer = record.output if protocol.bare else record.output[0]
    for adds in (False, True):
        for path, norm in _norms(original):
            found = replace(protocol, adds_input=adds, output_norm=path)
            with contextlib.suppress(RuntimeError, TypeError, ValueError), torch.no_grad():  # a norm of something else
                finished = norm(_laid(output, given, found) + given if adds else _laid(output, given, found))
                if _close(answer, finished):
                    return found
    raise UnsupportedModel(
        f"{owner} does more than attend: its answer is not what its output projection gives", hint=HINT
    )


def _norms(original: nn.Module) -> list[tuple[str | None, Callable[[Tensor], Any]]]:
    """Nothing, and then every norm of a module, by path."""
    named = [(n, m) for n, m in original.named_modules() if n and "norm" in type(m).__name__.lower()]
    return [(None, lambda x: x), *named]


def _laid(tokens: Array, like: Tensor, protocol: Protocol) -> Tensor:
    """[B, S, E] in the order of axes of the protocol, or without a batch, as `like` is."""
    tensor = torch.from_numpy(np.array(tokens)).to(dtype=like.dtype, device=like.device)
    if like.dim() == 2:
        return tensor[0]
    return tensor if protocol.batch_first else tensor.transpose(0, 1)


def _close(ours: Any, theirs: Tensor) -> bool:
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
        return False
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    usable = b.isfinite()
    limit = TOLERANCE.get(ours.dtype, TOLERANCE[torch.float32])
    return bool(usable.any()) and bool((a - b)[usable].abs().max() <= limit * b[usable].abs().max().clamp_min(1e-30))


def _is(value: Any, expected: Array, protocol: Protocol) -> bool:
    """Whether a recorded tensor holds [B, S, E], in the protocol's order of axes or without a batch."""
    return isinstance(value, Tensor) and _close(value, _laid(expected, value, protocol))


def _require_next(record: CallRecord, answer: Tensor, output: Array, protocol: Protocol, out: str) -> None:
    """The projection outside must read the module's answer and give the sublayer's output."""
    given = next((v for v in record.arguments.values() if isinstance(v, Tensor)), None)
    unchanged = given is not None and given.shape == answer.shape and disagreement(given, answer) is None
    _require(unchanged, out, "it does not read the attention's answer alone")
    _require(_is(record.output, output, protocol), out, "it gives more than the output projection")
    _require(output.shape[-1] == answer.shape[-1], out, "it changes the number of features")


def _built(
    original: nn.Module,
    spec: TokenMixing,
    protocol: Protocol,
    tensors: Mapping[str, Array],
    record: CallRecord,
    owner: str,
) -> TokenMixer:
    trainable = any(p.requires_grad for p in original.parameters())
    like = next(original.parameters())
    parameters = {n: owned_parameter(torch.from_numpy(np.array(a)), like, trainable) for n, a in tensors.items()}
    position = _position(original, protocol, record, owner)
    mixer = TokenMixer(spec, protocol, parameters, position=position, **norms(protocol, original))
    mixer.mimic(original)  # a cache is asked by the layer's number
    return mixer


def _position(original: nn.Module, protocol: Protocol, record: CallRecord, owner: str) -> nn.Module | None:
    """What computes the score bias that the original hands on, for layers that keep their attention."""
    if "bias" not in protocol.returns:
        return None
    name = protocol.name("bias")
    if name is not None and record.arguments.get(name) is not None:
        return None
    given = record.output[protocol.returns.index("bias")]
    if not callable(getattr(original, "compute_bias", None)):
        if bool(given.any()):
            raise UnsupportedModel(f"{owner} hands on a score bias that it computes in a way not understood", hint=HINT)
        return None
    return stripped(original)


def drop_unread_positions(model: nn.Module) -> None:
    """Mixes hand on a score bias, which is as large as all scores, only where an attention of their stack is left."""
    mixes = token_mixers(model)
    mixed = tuple(f"{path}." for path in mixes)
    attending = [
        path
        for path, module in model.named_modules()
        if callable(getattr(module, "compute_bias", None)) and not path.startswith(mixed)
    ]
    for path, mixer in mixes.items():
        stack = re.split(r"\.\d+\.", path, maxsplit=1)[0]
        if mixer.position is not None and not any(p.startswith(f"{stack}.") for p in attending):
            mixer.position = None


def _require_same_padding(mixer: TokenMixer, record: CallRecord, seen: Recorded, owner: str) -> None:
    """What the new module takes for padding must be what the matched attention hid."""
    if seen.shown is None:
        return
    try:
        read = shown_tokens(mixer.protocol, mixer.protocol.read(record.args, record.kwargs), *seen.shown.shape)
    except TypeError as error:
        raise UnsupportedModel(f"{owner}: {error}", hint=HINT) from error
    theirs = torch.ones(seen.shown.shape, dtype=torch.bool) if read is None else read.cpu()
    _require(bool((theirs.numpy() == seen.shown).all()), owner, "its masks are read otherwise than it reads them")


def _check(mixer: TokenMixer, record: CallRecord, seen: Recorded, tensors: Mapping[str, Array], owner: str) -> None:
    """On the recorded call the new module must answer in the original's structure with what the oracle gives."""
    try:
        with torch.no_grad(), evaluating(mixer):
            ours = mixer(*map(snapshot, record.args), **{n: snapshot(v) for n, v in record.kwargs.items()})
    except TypeError as error:
        raise UnsupportedModel(f"{owner}: {error}", hint=HINT) from error
    answer, theirs = (x if mixer.protocol.bare else x[0] for x in (ours, record.output))
    _require(answer.dtype == theirs.dtype, owner, f"it answers in {theirs.dtype}")
    stored = {n: p.detach().double().cpu().numpy() for n in tensors if (p := getattr(mixer, n)) is not None}
    given = record.arguments[mixer.protocol.name("hidden") or ""]
    with torch.no_grad(), evaluating(mixer):
        expected = _laid(token_mixing(mixer.spec, seen.hidden, seen.shown, **stored), given, mixer.protocol)
        expected = expected + given if mixer.protocol.adds_input else expected
        expected = expected if mixer.output_norm is None else mixer.output_norm(expected)
    overflown = not bool(expected.isfinite().all())  # of half precision, by the sum over a whole sequence
    _require(overflown or _close(answer, expected), owner, "the mix is not what it should be")
    if not mixer.protocol.bare and "bias" in mixer.protocol.returns and mixer.position is not None:
        at = mixer.protocol.returns.index("bias")
        _require(disagreement(ours[at], record.output[at]) is None, owner, "it hands on a bias that is not understood")
