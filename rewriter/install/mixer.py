"""The one module that replaces an attention module: grouped-query attention behind the original's own call.

Shape legend: B batch, S queries, T keys, H query heads, KV key/value heads, D head_dim, E model width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from codegen.launch.torch_op import attention
from codegen.ops.decoupled_attention.torch_body import together
from codegen.ops.grouped_query_attention.sparse_body import shown
from codegen.ops.grouped_query_attention.torch_body import grouped_query_attention_with_weights
from codegen.sight import from_json
from codegen.spec import DecoupledAttention, GroupedQueryAttention
from rewriter.errors import UnsupportedModel
from rewriter.install.call_masks import at_the_end, causal_over_cache, checked, combined, of_four_axes, with_order
from rewriter.install.linear_term import LinearTerm
from rewriter.install.mimicry import mimic_attributes
from rewriter.install.protocol import Protocol
from rewriter.install.rotary import given_tables, rotate

Call = Mapping[str, Any]
"""The arguments of one call by role."""

HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
GROUP_SIZES = ("num_key_value_groups", "n_rep", "num_queries_per_kv")


@dataclass(frozen=True)
class MixerParameters:
    """Canonical parameters, rows head-major; H*Dv columns of `out_weight` likewise.

    Attributes:
        q_weight: [H*D, in]; k_weight: [KV*D, in_kv]; v_weight: [KV*Dv, in_kv]; biases [rows] or None.
        out_weight: [E, H*Dv], only where the output projection is no submodule of its own.
    """

    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_weight: Tensor | None = None
    out_bias: Tensor | None = None


class RewrittenMixer(nn.Module):
    """Grouped-query attention that is called and answers like the module it replaces.

    `forward` takes the original's arguments, by position or name, and returns the original's structure.
    """

    def __init__(
        self,
        spec: GroupedQueryAttention,
        protocol: Protocol,
        parameters: MixerParameters,
        *,
        out: nn.Module | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        position: nn.Module | None = None,
        layer_index: int | None = None,
    ) -> None:
        """`out` projects the merged heads [B, S, H*Dv]; `q_norm` and `k_norm` normalise each head's features;
        `position` computes a score bias with ``compute_bias(S, T, device=..., past_seen_tokens=...)``."""
        super().__init__()
        self.follow(spec)
        self.protocol = protocol
        self.layer_index = layer_index
        self.q_proj = linear(parameters.q_weight, parameters.q_bias)
        self.k_proj = linear(parameters.k_weight, parameters.k_bias)
        self.v_proj = linear(parameters.v_weight, parameters.v_bias)
        if parameters.out_weight is not None:
            out = linear(parameters.out_weight, parameters.out_bias)
        self.out_proj = out
        self.q_norm, self.k_norm, self.position = q_norm, k_norm, position
        self.linear_term: LinearTerm | None = None  # with it, a softmax for near keys only
        self.apart: tuple[int, int] | None = None  # heads of keys and of values, where they are not the spec's
        self.input_norm: nn.Module | None = None
        self.output_norm: nn.Module | None = None
        self.taken_from: dict[str, str | None] = {}
        self.kernels = "auto"  # what `optimize` was told; see codegen.launch.torch_op

    def follow(self, spec: GroupedQueryAttention) -> None:
        """Compute this from now on; heads and their sizes must stay as they are."""
        self.spec = spec
        self._specs = {
            (causal, bias): replace(spec, causal=causal, bias=bias)
            for causal in (False, True)
            for bias in (False, True)
        }

    @property
    def kv_heads(self) -> tuple[int, int]:
        """Heads of keys and of values, as they are projected and cached."""
        return self.apart or (self.spec.kv_heads, self.spec.kv_heads)

    def specs(self) -> list[GroupedQueryAttention]:
        """The computations that calls can come to: with and without a causal order, with and without a mask."""
        causal = (False,) if self.protocol.causal == "never" else (False, True)
        return [self._specs[c, b] for c in causal for b in (False, True)]

    @property
    def __signature__(self) -> inspect.Signature:
        return self.protocol.signature()

    def separate(self, key_heads: int, value_heads: int) -> None:
        """Project and cache so many heads; raises ValueError if the spec's are not the least that both divide."""
        DecoupledAttention(self.spec, key_heads, value_heads)
        self.apart = (key_heads, value_heads)

    def adopt(self, protocol: Protocol, original: nn.Module) -> None:
        """Follow `protocol`, with the norms that it takes over from `original`."""
        self.protocol = protocol
        for role in ("input_norm", "output_norm"):
            path = getattr(protocol, role)
            setattr(self, role, None if path is None else original.get_submodule(path))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the replaced module took and returned.

        Raises:
            TypeError: for arguments that were not in use when the module was rewritten.
            UnsupportedModel: in training mode, if that mode of the original is not understood.
        """
        if self.training and not self.protocol.trains:
            raise UnsupportedModel(
                "how this attention behaves in training mode is not known",
                hint="Call .eval() on it, or set every dropout of the original to 0 before rewriting.",
            )
        call = self.protocol.read(args, kwargs)
        hidden, context, value = self._sources(call)
        past = self._past_length(call)
        q = self._rotated(self._heads(self.q_proj(hidden), self.spec.heads, self.q_norm), call)
        k, v = self._keys_and_values(call, context, value)
        if self.apart is not None:
            k, v = together(k, v, self.spec.kv_heads)
        places = self._places(call)
        causal, mask = self._visible(call, q, places)
        if self.linear_term is not None and places is None and not at_the_end(past, q, k):
            raise TypeError("linear attention needs a cache that only grows, as transformers' DynamicCache")
        if causal and mask is None and call.get("cache") is not None:
            causal, k, v = causal_over_cache(q, k, v)
        bias = self._bias(call, q, k, past)
        if bias is not None:
            causal, mask = False, combined(with_order(mask, causal, q, k), bias, q.dtype)
        if self.linear_term is not None:
            output, weights = self._linear(self.linear_term, call, q, k, v, mask, causal)
        elif self.spec.pattern and not at_the_end(past, q, k):
            shown = self._shown(past, q, k, places)
            mask, causal = combined(with_order(mask, causal, q, k), shown, q.dtype), False
            output, weights = self._attend(call, q, k, v, mask, causal, masked=True)
        else:
            output, weights = self._attend(call, q, k, v, mask, causal)
        output = self._finish(call, output)
        return self._answer(call, output, weights, bias)

    # ------------------------------------------------------------------ operands

    def _sources(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states for q, k and v, each [B, tokens, width]."""
        hidden = self._batched(call["hidden"])
        if self.input_norm is not None:
            hidden = self.input_norm(hidden)
        context = self._batched(call["context"]) if _is_cross(call) else hidden
        value: Any = call.get("value")
        same = value is None or value is call["hidden"] or value is call.get("context")
        return hidden, context, context if same else self._batched(value)

    def _batched(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None]
        if x.dim() != 3:
            raise TypeError(f"hidden states of {x.dim()} dimensions are not understood")
        return x if self.protocol.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
        """[B, tokens, heads * dim] -> [B, heads, tokens, dim]."""
        x = x.view(*x.shape[:-1], heads, -1)
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _rotated(self, x: Tensor, call: Call) -> Tensor:
        tables = None if self.protocol.rotary == "none" else given_tables(call, self.protocol.rotary_order)
        return x if tables is None else rotate(x, *tables, self.protocol.rotary, self.protocol.rotary_tables)

    def _keys_and_values(self, call: Call, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens so far; the cache is brought up to date."""
        cross = _is_cross(call)
        cache: Any = call.get("cache")
        store = cache
        paired = cache is not None and hasattr(cache, "is_updated")  # one cache for self-, one for cross-attention
        if paired:
            store = cache.cross_attention_cache if cross else cache.self_attention_cache
            if cross and cache.is_updated.get(self.layer_index):
                layer = store.layers[self.layer_index]
                return layer.keys, layer.values
        k = self._rotated(self._heads(self.k_proj(context), self.kv_heads[0], self.k_norm), call)
        v = self._heads(self.v_proj(value), self.kv_heads[1], None)
        if store is None:
            return k, v
        if self.linear_term is not None and not cross:
            self.linear_term.claim(store, self.layer_index)
        position = call.get("cache_position")
        extra = () if position is None else ({"cache_position": position},)
        k, v = store.update(k, v, self.layer_index, *extra)
        if paired and cross:
            cache.is_updated[self.layer_index] = True
        return k, v

    def _places(self, call: Call) -> Tensor | None:
        """Positions [T] of the keys that a cache which drops some of them gave back; None for any other."""
        found: Tensor | None = getattr(self._cache_layer(call), "key_positions", None)
        return found

    def _cache_layer(self, call: Call) -> Any:
        """The part of the cache that is this attention's own, if it may have dropped keys."""
        cache: Any = call.get("cache") if self.spec.pattern or self.linear_term is not None else None
        if hasattr(cache, "is_updated"):
            cache = cache.self_attention_cache
        layers, index = getattr(cache, "layers", ()), self.layer_index
        return layers[index] if index is not None and index < len(layers) else None

    def _past_length(self, call: Call) -> Any:
        """Tokens in the cache before this call; only asked for where positions have to be known."""
        cache = call.get("cache")
        if cache is None or (self.position is None and not self.spec.pattern and self.linear_term is None):
            return 0
        past = cache.get_seq_length(self.layer_index)
        return past.clone() if isinstance(past, Tensor) else past  # static caches count in place

    # ------------------------------------------------------------------ masks

    def _visible(self, call: Call, q: Tensor, places: Tensor | None = None) -> tuple[bool, Tensor | None]:
        """(causal, mask): the mask is boolean (True keeps) or additive, and broadcasts to [B, H, S, T].

        With `places`, masks are for the whole sequence, and keys stand at these positions of it.
        """
        cross = _is_cross(call)
        given = call.get("cross_mask" if cross and self.protocol.has("cross_mask") else "mask")
        causal = not cross and self._causal(call)
        mask = None if given is None else of_four_axes(self.protocol, given, q, self.spec.heads)
        if mask is not None and mask.shape[-2] != 1 and self.protocol.causal != "always":
            causal = False  # a mask over queries and keys holds the order too
        if mask is not None and places is not None and mask.shape[-1] > len(places):
            mask = mask.index_select(-1, places)
        padding = call.get("key_padding")
        if padding is not None:
            padding = checked(self.protocol, padding, self.protocol.padding_true_keeps)
            mask = combined(mask, padding.reshape(-1, 1, 1, padding.shape[-1]), q.dtype)
        return causal, mask

    def _causal(self, call: Call) -> bool:
        asked = call.get("is_causal") if self.protocol.heeds_is_causal else None
        return self.protocol.causal != "never" if asked is None else bool(asked)

    def _bias(self, call: Call, q: Tensor, k: Tensor, past: Any) -> Tensor | None:
        """The additive score bias [1 or B, H, S, T], given by the caller or computed here."""
        t = k.shape[2]
        bias: Tensor | None = call.get("bias")
        if bias is not None:
            if bias.dim() == 4:
                return bias[..., :t]
            # a table [H or B*H, S or 1, T] may be longer than the call; it then ends at the last token
            return bias.view(-1, self.spec.heads, *bias.shape[1:])[..., -q.shape[2] :, -t:]
        if self.position is not None:
            compute: Any = self.position.compute_bias
            computed: Tensor = compute(q.shape[2], t, device=q.device, past_seen_tokens=past)
            return computed
        if "bias" in self.protocol.returns:
            return q.new_zeros(1, self.spec.heads, q.shape[2], t)
        return None

    def _shown(self, past: Any, q: Tensor, k: Tensor, places: Tensor | None) -> Tensor:
        """What the pattern shows where keys are not just those of all tokens so far: [1, 1 or H, S, T].

        A preallocated cache has room behind them, a sliding one has dropped the first, a bounded one tells the places.
        """
        s, t = q.shape[2], k.shape[2]
        if places is not None:
            return shown(self.spec.pattern, self.spec.heads, torch.arange(s, device=q.device) + past, places)
        if isinstance(past, Tensor):  # such caches count in place, and drop nothing
            dropped: Any = 0
        else:
            dropped = max(past + s - t, 0)
        queries = torch.arange(s, device=q.device) + past
        return shown(self.spec.pattern, self.spec.heads, queries, torch.arange(t, device=q.device) + dropped)

    # ------------------------------------------------------------------ result

    def _attend(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, *, masked: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`masked`: the mask says already what the pattern shows."""
        spec = self._specs[causal, mask is not None]
        spec = replace(spec, pattern=()) if masked else spec
        dropout = self.protocol.attention_dropout if self.training else 0.0
        asked = "asked" in self.protocol.returns and bool(call.get("wants_weights"))
        if "refused" in self.protocol.returns and call.get("wants_weights"):
            raise TypeError("attention weights were not available from the original in this setting, nor are they here")
        if asked or "weights" in self.protocol.returns:
            return grouped_query_attention_with_weights(spec, q, k, v, mask, dropout=dropout)
        return attention(spec, q, k, v, mask, dropout=dropout, kernels=self.kernels), None

    def _linear(
        self, term: LinearTerm, call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, None]:
        """Without attention weights, and so without their dropout."""
        if "weights" in self.protocol.returns or (call.get("wants_weights") and "none" not in self.protocol.returns):
            raise TypeError("linear attention has no attention weights to return; ask for none (use sdpa)")
        return term(q, k, v, mask, causal, self._cache_layer(call), self.kernels), None

    def _finish(self, call: Call, output: Tensor) -> Tensor:
        """[B, H, S, Dv] -> [B, S, E], with what the original does to its result."""
        output = output.transpose(1, 2).flatten(2)
        if self.out_proj is not None:
            output = self.out_proj(output)
        output = functional.dropout(output, p=self.protocol.output_dropout, training=self.training)
        if call.get("residual") is not None:
            output = output + self._batched(call["residual"])
        if self.protocol.adds_input:
            output = output + self._batched(call["hidden"])
        return output if self.output_norm is None else self.output_norm(output)

    def _answer(self, call: Call, output: Tensor, weights: Tensor | None, bias: Tensor | None) -> Any:
        single = call["hidden"].dim() == 2
        if weights is not None and call.get("average"):
            weights = weights.mean(dim=1)
        if single:
            output, weights = output[0], None if weights is None else weights[0]
        elif not self.protocol.batch_first:
            output = output.transpose(0, 1)
        if self.protocol.bare:
            return output
        known = {"output": output, "weights": weights, "asked": weights, "bias": bias, "none": None, "refused": None}
        elements = [known[e] if e in known else call.get(self._role(e)) for e in self.protocol.returns]
        return elements if self.protocol.listed else tuple(elements)

    def _role(self, element: str) -> str:
        name = element.removeprefix("argument:")
        return self.protocol.roles.get(name, name)

    # ------------------------------------------------------------------ outside readers

    def mimic(self, original: nn.Module) -> None:
        """Take over the plain attributes that surrounding code may read off the original."""
        mimic_attributes(self, original)
        for name in HEAD_COUNTS:
            if hasattr(original, name):
                setattr(self, name, self.spec.kv_heads)
        for name in GROUP_SIZES:
            if hasattr(original, name):
                setattr(self, name, self.spec.group)

    # ------------------------------------------------------------------ persistence

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON; `rebuild` reads it."""
        own = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj}
        if isinstance(self.out_proj, nn.Linear) and self.taken_from.get("out") is None:
            own["out"] = self.out_proj
        return {
            "spec": asdict(self.spec),
            "protocol": self.protocol.to_json(),
            "taken": dict(self.taken_from),
            "shapes": {name: [*layer.weight.shape, layer.bias is not None] for name, layer in own.items()},
            "layer_index": self.layer_index,
            "position": self.position is not None,
            "linear": None if self.linear_term is None else self.linear_term.describe(),
            "apart": None if self.apart is None else list(self.apart),
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self.spec).items())


def rebuild(description: Call, original: nn.Module) -> RewrittenMixer:
    """The mixer that `describe` described, with empty weights, in place of a freshly built `original`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if the description is broken or fits another module.
    """
    like = next(original.parameters())
    tensors: dict[str, Any] = {}
    for name, (rows, columns, bias) in description["shapes"].items():
        tensors[f"{name}_weight"] = like.new_empty(int(rows), int(columns), requires_grad=like.requires_grad)
        if bias:
            tensors[f"{name}_bias"] = like.new_empty(int(rows), requires_grad=like.requires_grad)
    taken = {
        role: None if path is None else original.get_submodule(path) for role, path in description["taken"].items()
    }
    spec = {**description["spec"], "pattern": from_json(description["spec"].get("pattern", ()))}
    for name in ("heads", "kv_heads", "head_dim", "value_dim"):
        if type(spec.get(name)) is not int or spec[name] < 1:  # True is 1 to Python
            raise ValueError(f"{name} is no number of anything")
    mixer = RewrittenMixer(
        GroupedQueryAttention(**spec),
        Protocol.from_json(description["protocol"]),
        MixerParameters(**tensors),
        position=stripped(original) if description["position"] else None,
        layer_index=description["layer_index"],
        **taken,
    )
    mixer.taken_from = dict(description["taken"])
    if description.get("linear") is not None:
        mixer.linear_term = LinearTerm.from_json(description["linear"], like)
    if description.get("apart") is not None:
        mixer.separate(*map(int, description["apart"]))
    mixer.adopt(mixer.protocol, original)
    return mixer


def stripped(original: nn.Module) -> nn.Module:
    """A shallow twin of the original that keeps what computes its score bias: tables, not projections."""
    twin = copy.copy(original)
    twin._modules = {n: m for n, m in original._modules.items() if isinstance(m, nn.Embedding)}
    twin._parameters = {}
    return twin


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear over the given tensors; Parameters stay the objects they are."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = _parameter(weight)
    if bias is not None:
        module.bias = _parameter(bias)
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.requires_grad)


def _is_cross(call: Call) -> bool:
    context = call.get("context")
    return context is not None and context is not call["hidden"]
