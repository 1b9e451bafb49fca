"""The key/value cache of a graph: which output is next step's value of which input, and an empty one to start with."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.capture.input_roles import InputRole, input_roles

Array = NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class CachePorts:
    """Which output of a graph is next step's value of which past input.

    Attributes:
        roles: of the graph's past inputs, by name.
        present: output name by past input; without inputs that no output answers, such as a cross-attention's cache,
            which is the same in every step.
    """

    roles: Mapping[str, InputRole]
    present: Mapping[str, str]

    @property
    def open(self) -> bool:
        """True if the cache may be empty and grows: then steps can be chained."""
        return bool(self.present) and all(self._growing_axis(self.roles[name]) is not None for name in self.present)

    def _growing_axis(self, role: InputRole) -> int | None:
        axis = next((i for i, name in enumerate(role.axes) if name in {"past", "encoder"}), None)
        return axis if axis is not None and not isinstance(role.shape[axis], int) else None

    def neutral(self, feeds: Feeds, only: Collection[str] | None = None) -> Feeds:
        """`feeds` with zeros for all caches, or `only` these, in this graph's own number of heads.

        Zeros mean the same to any number of heads.
        """
        zeroed = self.roles if only is None else {n: r for n, r in self.roles.items() if n in only}
        return {**feeds, **{name: self._zeros(role, feeds) for name, role in zeroed.items()}}

    def _zeros(self, role: InputRole, feeds: Feeds) -> Array:
        template = feeds[role.name].shape
        shape = [own if isinstance(own, int) else size for own, size in zip(role.shape, template, strict=True)]
        return np.zeros(shape, dtype=role.dtype.numpy())

    def shape_at(self, name: str, feeds: Feeds, tokens: int) -> tuple[int, ...]:
        """What a cache's shape is with `tokens` tokens in it; `feeds` tell the other sizes."""
        axis = self._growing_axis(self.roles[name]) if name in self.present else None
        return tuple(tokens if i == axis else size for i, size in enumerate(feeds[name].shape))

    def bytes_at(self, feeds: Feeds, tokens: int) -> int:
        """Of all caches with `tokens` tokens in those that grow."""
        return sum(math.prod(self.shape_at(n, feeds, tokens)) * feeds[n].itemsize for n in self.roles if n in feeds)

    def next(self, outputs: Mapping[str, Array], feeds: Feeds) -> Feeds:
        """The cache that a step left; where it left nothing (a cross-attention's), the one it was given."""
        return {
            name: outputs[present] if outputs[present].size or not feeds[name].size else feeds[name]
            for name, present in self.present.items()
        }

    def length(self, cache: Feeds) -> int:
        """How many tokens of the model's own sequence the cache holds."""
        for name, role in self.roles.items():
            if "past" in role.axes and name in cache:
                return int(cache[name].shape[role.axes.index("past")])
        return 0


def cache_ports(model: ir.Model) -> CachePorts:
    """The key/value cache of a graph, read off its inputs' roles and its outputs' names or order."""
    roles = {role.name: role for role in input_roles(model) if role.kind == "past"}
    outputs = [value.name or "" for value in model.graph.outputs]
    return CachePorts(roles, _paired(list(roles), outputs))


def _paired(pasts: list[str], outputs: list[str]) -> dict[str, str]:
    keys = {_key(name): name for name in outputs}
    named = {past: keys[_key(past)] for past in pasts if _key(past) in keys}
    if named:
        return named
    # unnamed caches: as many trailing outputs as past inputs, in the same order
    return dict(zip(pasts, outputs[-len(pasts) :], strict=True)) if 0 < len(pasts) < len(outputs) else {}


def _key(name: str) -> str:
    """``past_key_values.0.key`` and ``present.0.key`` name the same thing."""
    return re.sub(r"past_key_values|present_key_values|past|present|new|out(put)?|in(put)?|_|\W", "", name.lower())
