"""New parameters of a graph that is edited: a node at once, a key when it is known which old ones are gone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node as FxNode

from passes.dataflow import Array, Value
from passes.targets.replacement import Replacement
from rewriter.capture.torch_export import GraphView
from rewriter.install.fx_emit import Emitter
from rewriter.install.fx_plan import Reprojection
from rewriter.install.fx_store import Store

Key = tuple[Value, bytes, bytes]
"""The value whose place a parameter takes, which part of it, and its numbers: what is alike is stored once."""


@dataclass(frozen=True)
class _NewParameter:
    """A parameter that has a node but no key yet.

    Attributes:
        sources: keys of the stored weights that the old matrix was made from.
        whole: the old matrix fed this operand alone, laid out like the new one: its key may be kept.
    """

    node: FxNode
    tensor: Tensor
    role: str
    part: str
    site: str
    sources: tuple[str, ...]
    whole: bool


@dataclass
class NewParameters:
    """Makes nodes for new numbers, and gives them keys in `finish`.

    Attributes:
        view: the graph before, recorded.
        store: its copy, and where its parameters live.
    """

    view: GraphView
    store: Store
    emitter: Emitter
    _made: dict[Key, _NewParameter] = field(default_factory=dict)

    def in_place_of(self, site: str, value: Value, role: str, part: str, array: Array) -> FxNode:
        """For what takes a parameter's place, in its shape unless heads are fewer.

        Sites that read one old parameter read one new one.
        """
        recorded = self.view.tensors[value]
        tensor = self._like(array, value)
        tensor = tensor.view(recorded.shape) if tensor.numel() == recorded.numel() else tensor
        key, whole = (value, role.encode(), array.tobytes()), value in self.view.flow.weights
        return self._once(key, (site, role, part), tensor, self._stored(value), whole=whole)

    def of_operand(self, site: str, planned: Reprojection, part: str) -> FxNode | None:
        """For a new projection; sites that use one old weight alike use one new weight."""
        operand = planned.operand
        array = planned.weight if part == "weight" else planned.bias
        old = operand.projection.weight if part == "weight" else operand.projection.bias
        if array is None or old is None:
            return None
        by_head = array.reshape(planned.heads, operand.dim, *array.shape[1:])[:, list(operand.stem_features)]
        rows = np.ascontiguousarray(by_head).reshape(array.shape)
        whole = operand.columns.size == operand.projection.features and operand.projection.out_first
        key = (old, operand.columns.tobytes(), rows.tobytes())
        return self._once(key, (site, planned.role, part), self._like(rows, old), self._stored(old), whole=whole)

    def of_all_columns(self, site: str, old: Value, rows: Array, *, whole: bool) -> FxNode:
        """For `rows`, which take the place of all columns of the matrix or bias `old`."""
        key, part = (old, b"", np.ascontiguousarray(rows).tobytes()), "weight" if rows.ndim == 2 else "bias"
        return self._once(key, (site, "kv", part), self._like(rows, old), self._stored(old), whole=whole)

    def of_mix(self, replacement: Replacement, part: str) -> FxNode:
        """For a parameter of a mix."""
        array, out = replacement.tensors[part], replacement.site.out
        recorded = self.view.tensors[replacement.around.output]
        wide = recorded.dtype if recorded.dtype == torch.float64 else torch.float32
        tensor = torch.from_numpy(np.array(array)).to(dtype=wide, device=recorded.device)
        key = (out.weight if out is not None else "", part.encode(), array.tobytes())
        sources = self._stored(out.weight) if out is not None else ()
        return self._once(key, (replacement.site.name, "mix", part), tensor, sources)

    def of_block(self, site: str, value: Value, part: str, array: Array) -> FxNode:
        """For a parameter of what takes a feed-forward block's place; `value` is the block's output projection."""
        key = (value, part.encode(), array.tobytes())
        return self._once(key, (site, "routed", part), self._like(array, value), self._stored(value))

    def of_linear_attention(self, replacement: Replacement, part: str) -> FxNode:
        """In float32; sites that share their keys' weight share it."""
        array, value = replacement.tensors[part], replacement.site.k.projection.weight
        tensor = torch.from_numpy(np.array(array)).to(dtype=torch.float32, device=self.view.tensors[value].device)
        key = (value, part.encode(), array.tobytes())
        return self._once(key, (replacement.site.name, "linear", part), tensor, self._stored(value))

    def table(self, site: str, tensor: Tensor) -> FxNode:
        """For numbers that are no parameter."""
        return self._once(("", b"", tensor.cpu().numpy().tobytes()), (site, "kv", "index"), tensor, ())

    def finish(self, gone: set[str]) -> None:
        """Give all of them keys, those of parameters that are gone where one takes their place alone."""
        kept_keys = [p.sources[0] for p in self._made.values() if _may_keep(p, gone)]
        keyed: list[tuple[_NewParameter, str, bool]] = []
        for new in self._made.values():
            old = [t for name in new.sources if (t := self.store.get(name)) is not None]
            keep = _may_keep(new, gone) and kept_keys.count(new.sources[0]) == 1
            keyed.append((new, new.sources[0] if keep else _key(new), any(t.requires_grad for t in old)))
        for key in gone:
            self.store.remove(key)
        for new, wanted, trainable in keyed:
            learned = new.tensor.is_floating_point()
            tensor = nn.Parameter(new.tensor, requires_grad=trainable) if learned else new.tensor
            self.store.put(new.node, self._free(wanted), tensor)

    def _once(
        self, key: Key, name: tuple[str, str, str], tensor: Tensor, sources: tuple[str, ...], *, whole: bool = False
    ) -> FxNode:
        if key not in self._made:
            site, role, part = name
            node = self.store.read(re.sub(r"\W+", "_", "_".join(name)))
            self.emitter.stand_for(node, tensor)
            self._made[key] = _NewParameter(node, tensor, role, part, site, sources, whole)
        return self._made[key].node

    def _like(self, array: Array, old: Value) -> Tensor:
        """In the dtype of what it takes the place of, and where that is."""
        recorded = self.view.tensors[old]
        return torch.from_numpy(np.array(array, order="C")).to(dtype=recorded.dtype, device=recorded.device)

    def _stored(self, value: Value) -> tuple[str, ...]:
        """Keys of the stored weights that a value was made from."""
        flow, size = self.view.flow, self.view.tensors[value].numel()
        reads = [value, *(v for n in flow.ancestors(value) for v in n.inputs)]
        found = dict.fromkeys(w.name for v in reads if (w := flow.weights.get(v)) is not None and w.name)
        return tuple(name for name in found if (t := self.store.get(name)) is not None and t.numel() == size)

    def _free(self, wanted: str) -> str:
        key, number = wanted, 0
        while self.store.get(key) is not None:
            number += 1
            key = f"{wanted}_{number}"
        return key


def _may_keep(new: _NewParameter, gone: set[str]) -> bool:
    return new.whole and len(new.sources) == 1 and new.sources[0] in gone


def _key(new: _NewParameter) -> str:
    """Beside the old weight, with the operand's letter: "attn.c_attn.weight" gives "attn.c_attn.k_weight"."""
    path, _, leaf = new.sources[0].rpartition(".") if len(new.sources) == 1 else (new.site, "", new.part)
    path = ".".join(re.sub(r"\W+", "_", step) for step in path.split("."))
    leaf = new.part if new.role in ("mix", "linear", "routed") else leaf
    return f"{path}.{new.role}_{leaf}" if path else f"{new.role}_{leaf}"
