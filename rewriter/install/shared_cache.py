"""A cache that holds each shared head once, for attentions that go on working with repeated heads.

The attention is handed a view of the cache: what it stores is thinned to the distinct heads, what it reads is repeated
again. Everything else (lengths, beam reordering, static buffers, `is_updated`) is the cache's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewriter.install.call_record import is_cache

HEAD_AXIS = 1
"""Caches hold [batch, heads, tokens, features]."""


class SharedHeads:
    """Forward hooks of one attention: caches among its arguments become views, views in its result caches again.

    Attributes:
        kv_heads: heads that the cache holds.
        heads: heads that the attention stores and reads; None until it has stored some.
    """

    def __init__(self, kv_heads: int, heads: int | None = None) -> None:
        self.kv_heads, self.heads = kv_heads, heads

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(self._seen, args)), {name: self._seen(value) for name, value in kwargs.items()}

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple) and any(type(o) is CacheView for o in output):
            return tuple(o.whole if type(o) is CacheView else o for o in output)
        return output

    def stored(self, tensor: Tensor) -> Tensor:
        """The first head of each group of equal ones."""
        heads = tensor.shape[HEAD_AXIS]
        if self.heads != heads:
            self.heads = heads
        return tensor[:, :: heads // self.kv_heads]

    def read(self, tensor: Tensor) -> Tensor:
        """Each head as often as the attention stored it."""
        repeats = (self.heads or tensor.shape[HEAD_AXIS]) // tensor.shape[HEAD_AXIS]
        return tensor.repeat_interleave(repeats, dim=HEAD_AXIS) if repeats > 1 else tensor

    def _seen(self, value: Any) -> Any:
        return CacheView(value, self) if is_cache(value) else value


class CacheView:
    """Looks like the cache it stands for, to `isinstance` too."""

    def __init__(self, whole: Any, shared: SharedHeads) -> None:
        self.whole, self._shared = whole, shared

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.whole)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the distinct heads; return all tokens so far, with as many heads as were given."""
        shared = self._shared
        kept = self.whole.update(shared.stored(keys), shared.stored(values), *args, **kwargs)
        return shared.read(kept[0]), shared.read(kept[1])

    @property
    def layers(self) -> list[Any]:
        return [_LayerView(layer, self._shared) for layer in self.whole.layers]

    def __getattr__(self, name: str) -> Any:
        if name in ("whole", "_shared"):  # asked before they are set, by what takes objects apart
            raise AttributeError(name)
        value = getattr(self.whole, name)
        return CacheView(value, self._shared) if is_cache(value) else value

    def __len__(self) -> int:
        return len(self.whole)

    def __bool__(self) -> bool:
        return bool(self.whole)


class _LayerView:
    """One layer of a cache whose keys and values are read directly."""

    def __init__(self, layer: Any, shared: SharedHeads) -> None:
        self._layer, self._shared = layer, shared

    def __getattr__(self, name: str) -> Any:
        if name in ("_layer", "_shared"):
            raise AttributeError(name)
        value = getattr(self._layer, name)
        return self._shared.read(value) if name in ("keys", "values") and isinstance(value, Tensor) else value


def share(module: nn.Module, kv_heads: int, heads: int | None = None) -> None:
    """Let `module` see caches through a view that holds `kv_heads` heads."""
    unshare(module)
    hooks = SharedHeads(kv_heads, heads)
    module.register_forward_pre_hook(hooks.before, with_kwargs=True)
    module.register_forward_hook(hooks.after)


def unshare(module: nn.Module) -> None:
    """Undo `share`."""
    for table in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in table.items() if isinstance(getattr(hook, "__self__", None), SharedHeads)]:
            del table[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def sharing(module: nn.Module) -> SharedHeads | None:
    """The hooks of a module that sees its caches through a view."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, SharedHeads)), None)


def sharers(model: nn.Module) -> dict[str, SharedHeads]:
    """All modules that see caches through a view, by dotted path."""
    return {name: hooks for name, module in model.named_modules() if (hooks := sharing(module)) is not None}
