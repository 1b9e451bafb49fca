"""New nodes in a flat aten graph: calls, and layouts that name heads and features but no batch or length."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph
from torch.fx import Node as FxNode

from rewriter.errors import UnsupportedModel

aten = torch.ops.aten

LETTERS = "bhsd"
HINT = "rewrite the module the graph was made from instead of the graph"


def require_known(axes: Sequence[str], *, splittable: bool, apart: bool = False) -> None:
    """Raises UnsupportedModel for a layout that cannot be written, or, if `splittable`, not taken apart either.

    `apart`: heads may lie along two axes, groups and next to them the heads of a group.
    """
    if apart and "hg" in "".join(axes):
        axes = [a for a in axes if a != "g"]
    mixed = any(len(set(a) - {"h", "d"}) > 1 for a in axes)
    if sorted("".join(axes)) != sorted(LETTERS) or (splittable and mixed):
        raise UnsupportedModel(f"heads laid out as {tuple(axes)} cannot be rewritten in a graph", hint=HINT)


class Emitter:
    """Adds nodes at the graph's insertion point, with fake values where the graph carries them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        values = (n.meta.get("val") for n in graph.nodes)
        self.fake = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
        self.device = torch.device("cpu")  # where the graph does not say of a value

    def call(self, like: FxNode, target: Any, *arguments: Any, **keywords: Any) -> FxNode:
        """A call that belongs to the module that `like` belongs to."""
        node = self.graph.call_function(target, arguments, keywords)
        for key in ("nn_module_stack", "stack_trace"):
            if key in like.meta:
                node.meta[key] = copy.copy(like.meta[key])
        self.measure(node)
        return node

    def stand_for(self, node: FxNode, tensor: Tensor) -> None:
        """Note what a new weight's node holds."""
        if self.fake is not None:
            node.meta["val"] = self.fake.from_tensor(tensor, static_shapes=True)

    def measure(self, node: FxNode) -> None:
        """Work out a node's fake value anew; where that is not possible a stale one goes."""
        node.meta.pop("tensor_meta", None)
        node.meta.pop("val", None)
        if self.fake is None or any("val" not in n.meta for n in node.all_input_nodes):
            return
        arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        try:
            with self.fake, torch.no_grad(), enable_python_dispatcher():  # as torch.export does it, for open sizes
                if self.fake.shape_env is None:
                    node.meta["val"] = node.target(*arguments, **keywords)
                else:
                    with self.fake.shape_env.suppress_guards():  # the original program shares this environment
                        node.meta["val"] = node.target(*arguments, **keywords)
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModel(f"{node.name} does not take the new number of heads: {error}", hint=HINT) from error

    def arranged(self, like: FxNode, value: FxNode, have: str, axes: Sequence[str], group: int = 1) -> FxNode:
        """Four axes in the order `have`, as axes that hold one or several of them (or none, of size 1).

        An axis "g" behind "h" has the heads of each group, of which there are `group`.
        """
        order = [have.index(letter) for letter in "".join(axes) if letter != "g"]
        if order != sorted(order):
            value = self.call(like, aten.permute.default, value, order)
        for position, letters in enumerate(axes):
            if not letters:
                value = self.call(like, aten.unsqueeze.default, value, position)
            elif letters == "g":
                value = self.call(like, aten.unflatten.int, value, position - 1, [-1, group])
            elif len(letters) > 1:
                value = self.call(like, aten.flatten.using_ints, value, position, position + len(letters) - 1)
        return value

    def canonical(self, like: FxNode, value: FxNode, axes: Sequence[str], heads: int, dim: int) -> FxNode:
        """A value with these axes as [B, heads, tokens, dim]."""
        known = {"h": heads, "d": dim}
        for position in range(len(axes) - 1, -1, -1):
            letters = axes[position]
            if not letters:
                value = self.call(like, aten.squeeze.dim, value, position)
            elif len(letters) > 1:
                sizes = [known.get(letter, -1) for letter in letters]
                value = self.call(like, aten.unflatten.int, value, position, sizes)
        have = "".join(axes)
        order = [have.index(letter) for letter in ("bhgsd" if "g" in have else LETTERS)]
        if order != sorted(order):
            value = self.call(like, aten.permute.default, value, order)
        return self.call(like, aten.flatten.using_ints, value, 1, 2) if "g" in have else value
