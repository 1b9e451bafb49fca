"""How an attention module is called and what it answers with: argument roles, return elements, conventions.

Roles are read from argument names (the table below) and from one recorded call. What names cannot tell (which truth
value of a mask hides a key, whether a missing mask means causal, ...) is settled by experiment in reproduction.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import UnsupportedModel
from rewriter.install.call_record import CallRecord, is_cache, positional_order

Scalar = bool | int | float | str | None

NAMES: dict[str, tuple[str, ...]] = {
    "hidden": (
        "hidden_states",
        "x",
        "query",
        "query_tensor",
        "from_tensor",
        "hidden",
        "inputs",
        "input",
        "src",
        "tgt",
        "embeddings",
        "q",
        "queries",
    ),
    "context": (
        "encoder_hidden_states",
        "key_value_states",
        "context",
        "memory",
        "encoder_output",
        "encoder_outputs",
        "enc_output",
        "key",
        "key_tensor",
        "to_tensor",
        "kv",
        "k",
        "keys",
    ),
    "value": ("value", "value_tensor", "v", "values"),
    "mask": ("attention_mask", "attn_mask", "mask", "src_mask", "causal_mask"),
    "cross_mask": ("encoder_attention_mask", "context_mask", "memory_mask", "cross_attention_mask"),
    "key_padding": ("key_padding_mask", "src_key_padding_mask", "padding_mask", "padding"),
    "bias": ("position_bias", "attn_bias", "attention_bias", "relative_position_bias", "rel_pos_bias", "alibi"),
    "residual": ("residual",),
    "cache": ("cache", "past_key_values", "past_key_value", "layer_past", "kv_cache"),
    "rotary": ("position_embeddings", "rotary_pos_emb", "freqs_cis", "rope"),
    "cos": ("cos", "freqs_cos", "rotary_cos"),
    "sin": ("sin", "freqs_sin", "rotary_sin"),
    "is_causal": ("is_causal", "causal"),
    "wants_weights": ("need_weights", "output_attentions", "return_attention", "return_weights"),
    "average": ("average_attn_weights",),
    "cache_position": ("cache_position",),
}
"""Role -> argument names in use for it, the more telling ones first."""

BY_KEYWORD_ONLY = ("cache", "bias", "is_causal", "wants_weights", "cache_position")
"""Roles that may also arrive under a name which the signature does not have (old names, **kwargs)."""

WITHOUT_EFFECT = frozenset(
    {"use_cache", "position_ids", "output_hidden_states", "return_dict", "output_router_logits", "num_items_in_batch"}
)
"""Arguments that pass through attention modules and do not change the result."""


@dataclass(frozen=True)
class Protocol:
    """The call of one attention module.

    Attributes:
        order: names of the arguments that can be given by position.
        defaults: defaults of the signature, where they are plain scalars.
        roles: argument name -> role; only arguments of the signature.
        pinned: arguments without a known role that were given at recording: no other value is accepted.
        returns: per element of the result: "output", "weights", "asked" (weights if the call asks, else None),
            "refused" (None, and an error if the call asks for weights), "bias" (the score bias), "none", or
            "argument:NAME" (passed through).
        bare: the result is the output itself, not a tuple of elements.
        listed: the elements come in a list instead of a tuple; callers join it to others.
        batch_first: hidden states are [B, S, E]; else [S, B, E].
        mask_true_keeps, padding_true_keeps: which truth value of a mask leaves a key visible.
        causal: when a query does not see later keys: "never", "unmasked" (a mask, if given, holds the order), "always".
        heeds_is_causal: an argument that says whether the order is causal counts; False if the original ignores it.
        flat_mask: what the rows of a two-dimensional mask are: "batch" (it hides keys) or "queries".
        masks_refused: dtype kinds ("bool", "float", "int") of masks that the original was seen to read differently.
        rotary: pairing of the features that position embeddings rotate, "half" or "interleaved"; "none" where they are
            given and not used, as in layers without positions.
        rotary_order: a pair of position embeddings is "cos first" or "sin first".
        rotary_tables: "full" has one cos/sin per feature, "pairs" one per pair of features, "first" one per feature
            of which only the first half counts.
        input_norm, output_norm: paths, from the original, of norms over the hidden states before the projections
            and over the result; None for none.
        adds_input: the hidden states are added to the result (before `output_norm`).
        attention_dropout, output_dropout: probabilities in training.
        trains: the training mode of the original is understood.
    """

    order: tuple[str, ...]
    defaults: Mapping[str, Scalar]
    roles: Mapping[str, str]
    pinned: Mapping[str, Scalar] = field(default_factory=dict)
    returns: tuple[str, ...] = ("output",)
    bare: bool = True
    listed: bool = False
    batch_first: bool = True
    mask_true_keeps: bool = True
    padding_true_keeps: bool = False
    causal: str = "never"
    heeds_is_causal: bool = True
    flat_mask: str = "batch"
    masks_refused: tuple[str, ...] = ()
    rotary: str = "half"
    rotary_order: str = "cos first"
    rotary_tables: str = "full"
    input_norm: str | None = None
    output_norm: str | None = None
    adds_input: bool = False
    attention_dropout: float = 0.0
    output_dropout: float = 0.0
    trains: bool = True

    def signature(self) -> inspect.Signature:
        """What a caller may give: the original's positional arguments, and others by keyword."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        named = [inspect.Parameter(n, kind, default=self.defaults.get(n)) for n in self.order]
        named[:1] = [inspect.Parameter(n, kind) for n in self.order[:1]]
        return inspect.Signature([*named, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])

    def has(self, role: str) -> bool:
        return role in self.roles.values()

    def name(self, role: str) -> str | None:
        """The signature's argument for a role, None if it has none."""
        return next((name for name, r in self.roles.items() if r == role), None)

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by role (those without a role under their own name).

        Raises:
            TypeError: for an argument that the rewritten module does not understand.
        """
        if len(args) > len(self.order):
            raise TypeError(f"takes {len(self.order)} positional arguments, but {len(args)} were given")
        given = {**self.defaults, **dict(zip(self.order, args, strict=False)), **kwargs}
        for name in self.pinned:
            if name not in given:
                raise TypeError(f"argument {name!r} was in use when this attention was rewritten and is missing")
        call: dict[str, Any] = {}
        for name, value in given.items():
            role = self.roles.get(name) or _keyword_role(name)
            if role is not None:
                if value is not None or role not in call:
                    call[role] = value
            else:
                self._accept(name, value)
                call[name] = value
        if call.get("hidden") is None:
            raise TypeError(f"argument {self.name('hidden')!r} is missing")
        return call

    def _accept(self, name: str, value: Any) -> None:
        if value is None or name in WITHOUT_EFFECT:
            return
        expected = self.pinned.get(name, self.defaults.get(name))
        if isinstance(value, Tensor) or value != expected:
            raise TypeError(f"argument {name!r} was not in use when this attention was rewritten; it is not understood")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Protocol:
        """Inverse of `to_json` after a trip through JSON.

        Raises:
            TypeError: for unknown or missing fields, and for what no protocol holds.
        """
        tuples = {name: tuple(_words(data[name])) for name in ("order", "returns", "masks_refused") if name in data}
        made = cls(**{**data, **tuples})
        for name, fit in _FIT.items():
            if not fit(getattr(made, name)):
                raise TypeError(f"{name} of a call is {getattr(made, name)!r}")
        return made


def _words(value: Any) -> list[str]:
    if not (isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)):
        raise TypeError(f"{value!r} is no list of names")
    return list(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _by_name(value: Any, kinds: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, kinds) for k, v in value.items())


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


_FLAGS = (
    "bare", "listed", "batch_first", "mask_true_keeps", "padding_true_keeps", "heeds_is_causal", "adds_input", "trains",
)  # fmt: skip
_FIT: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_FLAGS, _is_flag),
    **dict.fromkeys(("input_norm", "output_norm"), _is_path),
    **dict.fromkeys(("attention_dropout", "output_dropout"), _is_probability),
    **dict.fromkeys(("defaults", "pinned"), lambda value: _by_name(value, Scalar)),
    "roles": lambda value: _by_name(value, str),
    "causal": _one_of("never", "unmasked", "always"),
    "flat_mask": _one_of("batch", "queries"),
    "rotary": _one_of("half", "interleaved", "none"),
    "rotary_order": _one_of("cos first", "sin first"),
    "rotary_tables": _one_of("full", "pairs", "first"),
}
"""What each field of a protocol that was read from a file may hold."""


def read_protocol(record: CallRecord, owner: str, *, heads: int, causal: bool) -> Protocol:
    """What names and one recorded call tell about an attention with `heads` query heads.

    Raises:
        UnsupportedModel: if an argument or a part of the result has no known role.
    """
    roles = _roles(record.signature)
    pinned = _pinned(record, roles, owner)
    by_role = _by_role(record, roles)
    returns, bare = _returns(record, by_role, roles, owner, heads=heads)
    return Protocol(
        order=positional_order(record.signature),
        defaults=_defaults(record.signature),
        roles=roles,
        pinned=pinned,
        returns=returns,
        bare=bare,
        listed=isinstance(record.output, list),
        # the two conventions in use come with these two kinds of signature
        mask_true_keeps="key_padding" not in roles.values(),
        flat_mask="queries" if "key_padding" in roles.values() else "batch",
        causal="unmasked" if causal else "never",
    )


def _roles(signature: inspect.Signature) -> dict[str, str]:
    order = positional_order(signature)
    names = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    roles: dict[str, str] = {}
    for role, known in NAMES.items():
        found = next((name for name in known if name in names and name not in roles), None)
        if found is not None:
            roles[found] = role
    if "hidden" not in roles.values() and order and order[0] not in roles:
        roles[order[0]] = "hidden"
    return roles


def _keyword_role(name: str) -> str | None:
    return next((role for role in BY_KEYWORD_ONLY if name in NAMES[role]), None)


def _defaults(signature: inspect.Signature) -> dict[str, Scalar]:
    return {
        name: p.default
        for name, p in signature.parameters.items()
        if p.default is not p.empty and isinstance(p.default, bool | int | float | str)
    }


def _by_role(record: CallRecord, roles: Mapping[str, str]) -> dict[str, Any]:
    named = {roles.get(name) or _keyword_role(name) or name: value for name, value in record.arguments.items()}
    for name, value in _defaults(record.signature).items():
        named.setdefault(roles.get(name, name), value)
    return named


def _pinned(record: CallRecord, roles: Mapping[str, str], owner: str) -> dict[str, Scalar]:
    defaults = _defaults(record.signature)
    pinned: dict[str, Scalar] = {}
    for name, value in record.arguments.items():
        if value is None or name in roles or _keyword_role(name) or name in WITHOUT_EFFECT:
            continue
        if not isinstance(value, bool | int | float | str):
            raise UnsupportedModel(
                f"{owner} takes an argument {name!r} ({type(value).__name__}) of no known role",
                hint="Leave this layer out with layers=..., or rewrite the model as a graph or an ONNX file.",
            )
        if value != defaults.get(name):
            pinned[name] = value
    return pinned


def _returns(
    record: CallRecord, call: Mapping[str, Any], roles: Mapping[str, str], owner: str, *, heads: int
) -> tuple[tuple[str, ...], bool]:
    output = record.output
    if isinstance(output, Tensor):
        return ("output",), True
    if type(output) not in (tuple, list) or not output or not isinstance(output[0], Tensor):
        raise UnsupportedModel(f"{owner} returns a {type(output).__name__}, not a tensor or a tuple of them")
    asked = bool(call.get("wants_weights"))
    weights = [_is_weights(value, heads) for value in output]
    # a None stands for weights that were not asked for only if nothing else can
    vacant = "none" if asked or any(weights[1:]) or sum(v is None for v in output) > 1 else "asked"
    elements = ["output"]
    for position, value in enumerate(output[1:], 1):
        if value is None:
            elements.append(vacant)
        elif weights[position] and value is not call.get("bias"):
            elements.append("asked" if asked else "weights")
        else:
            elements.append(_passed_through(value, position, record, call, roles, owner))
    return tuple(elements), False


def _passed_through(
    value: Any, position: int, record: CallRecord, call: Mapping[str, Any], roles: Mapping[str, str], owner: str
) -> str:
    if "bias" in roles.values() and isinstance(value, Tensor) and (value is call.get("bias") or value.dim() == 4):
        return "bias"
    for name, argument in record.arguments.items():
        if value is argument or (is_cache(value) and type(value) is type(argument)):
            return f"argument:{name}"
    raise UnsupportedModel(f"{owner} returns a {type(value).__name__} at position {position} of unknown meaning")


def _is_weights(value: Any, heads: int) -> bool:
    """Attention weights per head [B, H, S, T], or averaged over heads [B, S, T]: rows that sum to one."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (2, 3, 4):
        return False
    if value.dim() == 4 and value.shape[1] != heads:
        return False
    sums = value.detach().float().sum(-1)
    return bool((value >= 0).all() and ((sums - 1).abs() < 1e-2).logical_or(sums == 0).all() and (sums > 0).any())


def mask_kind(mask: Tensor) -> str:
    """ "bool", "float" or "int"."""
    if mask.dtype == torch.bool:
        return "bool"
    return "float" if mask.is_floating_point() else "int"
