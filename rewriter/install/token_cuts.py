"""Cutting a recorded call along its tokens: every argument that has a token axis is cut consistently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.install.protocol import WITHOUT_EFFECT, Protocol

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Cutter:
    """Makes shorter calls out of a recorded one; arguments that were one object stay one object."""

    arguments: Mapping[str, Any]
    protocol: Protocol

    def sizes(self) -> tuple[int, int, int]:
        """Batch, queries, keys."""
        hidden, context = self._role("hidden"), self._role("context")
        batch, token = (0, 1) if self.protocol.batch_first else (1, 0)
        if hidden.dim() == 2:
            return 1, hidden.shape[0], (hidden if context is None else context).shape[0]
        return hidden.shape[batch], hidden.shape[token], (hidden if context is None else context).shape[token]

    def shorter(self) -> Arguments | None:
        """The call with one token less and random hidden states; None for a single token."""
        _, s, t = self.sizes()
        if s < 2:
            return None
        columns = slice(0, t) if self._cross() else slice(0, t - 1)
        cut = self._cut(slice(0, s - 1), columns)
        name = self.protocol.name("hidden")
        assert name is not None
        hidden: Tensor = cut[name]
        generator = torch.Generator(hidden.device).manual_seed(0)
        noise = torch.randn(hidden.shape, generator=generator, device=hidden.device, dtype=hidden.dtype) * hidden.std()
        return {key: noise if value is hidden else value for key, value in cut.items()}

    def two_steps(self) -> tuple[Arguments, Arguments] | None:
        """All tokens but the last, then the last; None for a single token."""
        _, s, t = self.sizes()
        if s < 2 or (not self._cross() and s != t):
            return None
        whole = slice(0, t)
        return self._cut(slice(0, s - 1), whole if self._cross() else slice(0, s - 1)), self._cut(
            slice(s - 1, s), whole
        )

    def _cut(self, rows: slice, columns: slice) -> Arguments:
        done: dict[int, Any] = {}
        result: Arguments = {}
        for name, value in self.arguments.items():
            role = self.protocol.roles.get(name, "position" if name in WITHOUT_EFFECT else "")
            if id(value) not in done:
                done[id(value)] = self._cut_value(role, value, rows, columns)
            result[name] = done[id(value)]
        return result

    def _cut_value(self, role: str, value: Any, rows: slice, columns: slice) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._cut_value(role, v, rows, columns) for v in value)
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        _, s, t = self.sizes()
        if role in ("hidden", "context", "value", "residual"):
            axis = 0 if value.dim() == 2 or not self.protocol.batch_first else 1
            return _along(value, axis, rows if role in ("hidden", "residual") else columns)
        if role in ("mask", "cross_mask", "bias", "key_padding"):
            value = _along(value, -1, columns) if value.shape[-1] == t else value
            of_queries = role != "key_padding" and (value.dim() > 2 or self.protocol.flat_mask == "queries")
            return _along(value, -2, rows) if of_queries and value.shape[-2] == s else value
        if role in ("rotary", "cos", "sin") and value.dim() > 1:
            return _along(value, -2, rows) if value.shape[-2] == s else value
        if role in ("position", "cache_position"):
            return _along(value, -1, rows) if value.shape[-1] == s else value
        return value

    def _role(self, role: str) -> Any:
        name = self.protocol.name(role)
        return None if name is None else self.arguments.get(name)

    def _cross(self) -> bool:
        context = self._role("context")
        return context is not None and context is not self._role("hidden")


def _along(tensor: Tensor, axis: int, part: slice) -> Tensor:
    return tensor.narrow(axis, part.start, part.stop - part.start)
