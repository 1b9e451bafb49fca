"""Does the rewritten module, with the original's own weights, answer as the original does?

Both are run on the recorded call and on variants of it: another length, no mask, other kinds of masks, a cache in two
steps, training mode. What names could not tell is settled here by trying; what cannot be reproduced is refused.
"""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.capture.quiet_export import unlogged
from rewriter.errors import UnsupportedModel
from rewriter.install.call_record import CallRecord, plain_attention, snapshot
from rewriter.install.dropout_roles import dropout_roles
from rewriter.install.mixer import RewrittenMixer
from rewriter.install.protocol import Protocol, mask_kind
from rewriter.install.token_cuts import Cutter
from rewriter.module_modes import evaluating

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference relative to the largest number of the original's answer."""

FIELDS = {"mask": "mask_true_keeps", "key_padding": "padding_true_keeps"}
"""Mask role -> the protocol's field that says which truth value keeps."""

HINT = "Leave this layer out with layers=..., or rewrite the model as a graph or an ONNX file."

Arguments = Mapping[str, Any]


def disagreement(ours: Any, theirs: Any, slack: float = 1.0) -> str | None:
    """None if two answers agree in structure and, within `slack` times the tolerance of their dtype, in value; else
    what differs."""
    if isinstance(theirs, Tensor):
        return _tensors(ours, theirs, slack)
    if type(theirs) in (tuple, list):
        if type(ours) is not type(theirs) or len(ours) != len(theirs):
            return "the results have different structures"
        found = (disagreement(o, t, slack) for o, t in zip(ours, theirs, strict=True))
        return next((d for d in found if d is not None), None)
    if theirs is None or isinstance(theirs, bool | int | float | str):
        return None if ours is theirs or ours == theirs else f"{ours!r} instead of {theirs!r}"
    return None if type(ours) is type(theirs) else f"{type(ours).__name__} instead of {type(theirs).__name__}"


def _tensors(ours: Any, theirs: Tensor, slack: float) -> str | None:
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
        return f"{_what(ours)} instead of {_what(theirs)}"
    if ours.dtype != theirs.dtype:
        return f"{ours.dtype} instead of {theirs.dtype}"
    if not theirs.is_floating_point():
        return None if torch.equal(ours, theirs) else "different integers"
    a, b = ours.double(), theirs.double()
    usable = b.isfinite()  # rows without a visible key: NaN, or whatever the kernel in use leaves there
    if not usable.all():
        a, b = a[usable], b[usable]
    if not b.numel():
        return "nothing to compare: the original gives no finite number"
    error = (a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
    limit = TOLERANCE.get(theirs.dtype, TOLERANCE[torch.float32]) * slack
    return None if bool(error <= limit) else f"a relative error of {float(error):.1e} (limit {limit:.0e})"


def _what(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def settle(original: nn.Module, mixer: RewrittenMixer, record: CallRecord, owner: str) -> Protocol:
    """The protocol with which `mixer` answers as `original`, settled by experiment; `mixer` is left with it.

    `mixer` holds the original's weights. Nothing of the original is changed.

    Raises:
        UnsupportedModel: with the difference that remains, if there is no such protocol.
    """
    trial = _Trial(original, mixer, record, owner)
    with torch.no_grad(), evaluating(original), evaluating(mixer), plain_attention(), _quiet():
        trial.recorded()
        trial.another_length()
        trial.without_mask()
        trial.kinds_of_masks()
        trial.weights_asked()
        trial.cache_in_two_steps()
        mixer.protocol = dropout_roles(original, mixer, record, disagreement)
    return mixer.protocol


@contextmanager
def _quiet() -> Iterator[None]:
    """Trying unusual calls makes libraries warn about things that the user never asked for."""
    with unlogged(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _silent(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, why it failed): a variant that the original does not take is no test."""
    try:
        return function(), None
    except Exception as error:  # whatever foreign code raises
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass
class _Trial:
    original: nn.Module
    mixer: RewrittenMixer
    record: CallRecord
    owner: str
    facts: list[tuple[Arguments, Any]] = field(default_factory=list)
    """Calls and the original's answers that the protocol in force reproduces, and any later one must."""

    # ------------------------------------------------------------------ the recorded call

    def recorded(self) -> None:
        """Find the conventions under which the recorded call is reproduced."""
        again = self.original(*map(snapshot, self.record.args), **self._snapshots(self.record.kwargs))
        if (change := disagreement(again, self.record.output)) is not None:
            raise self._refusal(f"the original does not repeat itself ({change})")
        reasons: list[str] = []
        for candidate in self._candidates():
            self.mixer.adopt(candidate, self.original)
            ours, failure = _silent(
                lambda: self.mixer(*map(snapshot, self.record.args), **self._snapshots(self.record.kwargs))
            )
            reason = failure or disagreement(ours, self.record.output)
            if reason is None:
                self.facts.append((self.record.arguments, self.record.output))
                return
            reasons.append(reason)
        raise self._refusal(reasons[0])

    def _candidates(self) -> Iterator[Protocol]:
        """Every combination of conventions that the recorded call leaves open, the simplest first."""
        start = self.mixer.protocol
        choices = self._conventions()
        for wrapping in self._wrappings():
            for values in itertools.product(*choices.values()):
                yield replace(start, **wrapping, **dict(zip(choices, values, strict=True)))

    def _conventions(self) -> dict[str, Sequence[Any]]:
        start = self.mixer.protocol
        masks = [m for role in ("mask", "cross_mask") if isinstance(m := self._given(role), Tensor)]
        padding = self._given("key_padding")
        choices: dict[str, Sequence[Any]] = {"batch_first": (True, False)}
        if getattr(self.original, "batch_first", None) is False:
            choices["batch_first"] = (False, True)
        choices["causal"] = ("unmasked", "always", "never") if start.causal != "never" else ("never", "unmasked")
        if any(mask_kind(m) != "float" for m in masks):
            choices["mask_true_keeps"] = (start.mask_true_keeps, not start.mask_true_keeps)
        if any(m.dim() == 2 for m in masks):
            choices["flat_mask"] = ("batch", "queries")
        if isinstance(padding, Tensor) and mask_kind(padding) != "float":
            choices["padding_true_keeps"] = (False, True)
        if self._given("rotary") is not None or self._given("cos") is not None:
            choices["rotary"] = ("half", "interleaved", "none")
            choices["rotary_tables"] = ("full", "pairs", "first")
            if isinstance(self._given("rotary"), (tuple, list)):
                choices["rotary_order"] = ("cos first", "sin first")
        return choices

    def _wrappings(self) -> list[dict[str, Any]]:
        """What else the original may do besides attention: a norm before, a residual, a norm after."""
        width = self._given("hidden").shape[-1]
        taken = {id(m) for m in self.mixer.modules()}
        norms = [
            name
            for name, module in self.original.named_modules()
            if "norm" in type(module).__name__.lower()
            and id(module) not in taken
            and any(p.shape == (width,) for p in module.parameters(recurse=False))
        ]
        options = itertools.product((None, *norms), (False, True), (None, *norms))
        wrappings = [dict(zip(("input_norm", "adds_input", "output_norm"), option, strict=True)) for option in options]
        return sorted(wrappings, key=lambda wrapping: sum(bool(value) for value in wrapping.values()))

    # ------------------------------------------------------------------ variants

    def another_length(self) -> None:
        """Random hidden states of one token less."""
        arguments = self._cutter().shorter()
        if arguments is not None:
            self._require(arguments, "at another length")

    def without_mask(self) -> None:
        """Does a missing mask mean that queries see all keys, or the earlier ones?"""
        names = [n for n, role in self.mixer.protocol.roles.items() if role in ("mask", "cross_mask")]
        given = [n for n in names if self.record.arguments.get(n) is not None]
        settled = self.mixer.protocol.causal == "unmasked" and getattr(self.original, "is_causal", None) is True
        if not given or settled:  # the attribute tells kernels what a missing mask means; which kernel may change
            return
        arguments = {**self.record.arguments, **dict.fromkeys(given)}
        orders: list[dict[str, Any]] = [{"causal": order} for order in ("unmasked", "never", "always")]
        orders += [{**order, "heeds_is_causal": False} for order in orders]
        theirs, failure = _silent(lambda: self.original(**self._snapshots(arguments)))
        if failure is None and not self._first(orders, arguments, theirs):
            self._require(arguments, "without its mask")

    def kinds_of_masks(self) -> None:
        """Masks of the kinds that were not recorded: settle what they mean or refuse them at call time."""
        for role in FIELDS:
            name = self.mixer.protocol.name(role)
            if name is None or (role == "mask" and self._is_cross() and self.mixer.protocol.has("cross_mask")):
                continue
            recorded = self.record.arguments.get(name)
            for kind in ("bool", "float"):
                if isinstance(recorded, Tensor) and mask_kind(recorded) == kind and self._telling(recorded):
                    continue
                self._probe_mask(name, role, kind)

    def _probe_mask(self, name: str, role: str, kind: str) -> None:
        mask = self._synthetic(role, kind, self.record.arguments.get(name))
        arguments = {**self.record.arguments, name: mask}
        theirs, failure = _silent(lambda: self.original(**self._snapshots(arguments)))
        if failure is not None or self._first(self._mask_readings(role, kind), arguments, theirs):
            return
        if kind == "bool":  # arithmetic on booleans in the original is an accident nobody relies on
            plain, failure = _silent(lambda: self.original(**self._snapshots({**arguments, name: mask.float()})))
            if failure is None and disagreement(plain, theirs) is None:
                return
        recorded = self.record.arguments.get(name)
        if isinstance(recorded, Tensor) and mask_kind(recorded) == kind:
            raise self._refusal(f"its {kind} mask hides keys in a way that is not understood")
        refused = {*self.mixer.protocol.masks_refused, kind}
        self.mixer.protocol = replace(self.mixer.protocol, masks_refused=tuple(sorted(refused)))

    def _mask_readings(self, role: str, kind: str) -> list[dict[str, Any]]:
        """What a mask of a kind that was not recorded may mean, the present reading first."""
        protocol = self.mixer.protocol
        keeps = getattr(protocol, FIELDS[role])
        polarities = (keeps,) if kind == "float" else (keeps, not keeps)
        orders = ("unmasked", "always") if protocol.causal == "unmasked" else (protocol.causal,)
        return [{"causal": order, FIELDS[role]: keep} for order in orders for keep in polarities]

    def weights_asked(self) -> None:
        """The other value of the flag that asks for attention weights, where the signature has one."""
        protocol = self.mixer.protocol
        name = protocol.name("wants_weights")
        if name is None or "asked" not in protocol.returns:
            return
        flag = bool(self.record.arguments.get(name, protocol.defaults.get(name)))
        arguments = {**self.record.arguments, name: not flag}
        theirs, failure = _silent(lambda: self.original(**self._snapshots(arguments)))
        if failure is not None:
            return
        if not flag and type(theirs) is tuple and theirs[protocol.returns.index("asked")] is None:
            return  # the original ignores the flag; answering it does no harm
        if not self._first([{}], arguments, theirs):
            refused = tuple("refused" if element == "asked" else element for element in protocol.returns)
            self.mixer.protocol = replace(protocol, returns=refused)

    def cache_in_two_steps(self) -> None:
        """All tokens but the last into a fresh cache, then the last one."""
        name = self.mixer.protocol.name("cache")
        library = sys.modules.get("transformers")
        if name is None or library is None or self.mixer.layer_index is None or self._given("cache") is not None:
            return
        steps = self._cutter().two_steps()
        for paired in (True,) if self._is_cross() else (False, True):
            if steps is not None:
                self._compare_steps(steps, name, library, paired)

    def _compare_steps(self, steps: Sequence[Arguments], name: str, library: Any, paired: bool) -> None:
        def run(module: nn.Module) -> list[Any]:
            cache = library.DynamicCache()
            if paired:
                cache = library.EncoderDecoderCache(cache, library.DynamicCache())
            return [module(**{**step, name: cache}) for step in steps]

        theirs, failure = _silent(lambda: run(self.original))
        if failure is not None:
            return
        ours, failure = _silent(lambda: run(self.mixer))
        if (reason := failure or disagreement(ours, theirs)) is not None:
            raise self._refusal(f"{reason} with a cache")

    # ------------------------------------------------------------------ comparing

    def _require(self, arguments: Arguments, when: str) -> None:
        theirs, failure = _silent(lambda: self.original(**self._snapshots(arguments)))
        if failure is not None:
            return
        if (reason := self._difference(arguments, theirs)) is not None:
            raise self._refusal(f"{reason} {when}")
        self.facts.append((arguments, theirs))

    def _first(self, changes: Sequence[Mapping[str, Any]], arguments: Arguments, theirs: Any) -> bool:
        """Adopt the first change of the protocol that reproduces `theirs` and all facts so far.

        False leaves the protocol as it was.
        """
        start = self.mixer.protocol
        facts = [(arguments, theirs), *self.facts]
        for change in changes:
            self.mixer.protocol = replace(start, **change)
            if all(self._difference(*fact) is None for fact in facts):
                self.facts = facts
                return True
        self.mixer.protocol = start
        return False

    def _difference(self, arguments: Arguments, theirs: Any) -> str | None:
        ours, failure = _silent(lambda: self.mixer(**self._snapshots(arguments)))
        return failure or disagreement(ours, theirs)

    # ------------------------------------------------------------------ arguments

    def _cutter(self) -> Cutter:
        return Cutter(self.record.arguments, self.mixer.protocol)

    def _given(self, role: str) -> Any:
        name = self.mixer.protocol.name(role)
        return None if name is None else self.record.arguments.get(name)

    def _is_cross(self) -> bool:
        return self._given("context") is not None and self._given("context") is not self._given("hidden")

    def _synthetic(self, role: str, kind: str, recorded: Any) -> Tensor:
        """A mask that hides some keys and leaves each query at least the first."""
        hidden: Tensor = self._given("hidden")
        if isinstance(recorded, Tensor):
            shape = tuple(recorded.shape)
        else:
            b, s, t = self._cutter().sizes()
            flat = self.mixer.protocol.flat_mask == "queries"
            shape = (b, t) if role == "key_padding" else (s, t) if flat else (b, 1, s, t)
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
        keep[..., 0] = True
        keep = keep.to(hidden.device)
        if kind == "bool":
            return keep if getattr(self.mixer.protocol, FIELDS[role]) else ~keep
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros(shape, device=hidden.device, dtype=hidden.dtype).masked_fill(~keep, lowest)

    def _telling(self, mask: Tensor) -> bool:
        """True if the recorded mask hid something, so that its meaning has been tested."""
        return bool((mask != mask.flatten()[0]).any())

    def _snapshots(self, arguments: Arguments) -> dict[str, Any]:
        return {name: snapshot(value) for name, value in arguments.items()}

    def _refusal(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.owner} could not be reproduced with its own weights: {reason}", hint=HINT)
