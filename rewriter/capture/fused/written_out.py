"""One fused operator that is written out, and what stood in its place."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from rewriter.capture.cache_sizes import CACHE_SLOTS, CacheSize, cache_size
from rewriter.capture.fused.reads import sliding

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class WrittenOut:
    """One fused operator that is written out.

    Attributes:
        node: the operator, taken out of the graph.
        inputs: what it read; None where an optional input is left out.
        outputs: names of what it gave, now given by standard operators; "" where nothing read it.
        constants: initializers that writing it out added.
    """

    node: ir.Node
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[str, ...]
    constants: frozenset[str]

    @property
    def native(self) -> bool:
        """Whether the operator takes fewer key/value heads than query heads, so that a rewritten site keeps it."""
        return self.node.op_type == "GroupQueryAttention" or self.node.domain != DOMAIN

    @property
    def flat(self) -> bool:
        """Whether it takes heads side by side, [B, S, heads * D], and is told how many there are."""
        return "kv_num_heads" in self.node.attributes

    @property
    def pasts(self) -> list[ir.Value]:
        """Its caches, [B, N, P, D]."""
        positions = (3, 4) if self.node.op_type == "GroupQueryAttention" else (4, 5)
        return [v for i in positions if i < len(self.inputs) and (v := self.inputs[i]) is not None]

    @property
    def cache_sizes(self) -> dict[str, CacheSize]:
        """How large its caches are that are inputs of the model, by name."""
        slots = (i for i in CACHE_SLOTS[self.node.op_type] if i < len(self.inputs))
        read = ((i, v) for i in slots if (v := self.inputs[i]) is not None)
        return {v.name: cache_size(self.node, self.inputs, i) for i, v in read if v.is_graph_input() and v.name}

    def operand(self, role: str) -> ir.Value | None:
        """What it reads as "q", "k" or "v"; None if that lies packed with another operand."""
        packed = any(v is None for v in self.inputs[1:3])
        return None if packed else self.inputs["qkv".index(role)]

    @property
    def equal_lengths(self) -> bool:
        """Whether what stands for it is the same only where no sequence of the batch is padded."""
        return self.node.op_type == "GroupQueryAttention"

    def runs_at(self, batch: int, length: int, past: int) -> bool:
        """Whether the operator takes inputs of these sizes, and what stands for it does the same with them."""
        if (window := sliding(self.node)) and past != window:  # a buffer that is not full holds no tokens at its end
            return False
        return self.node.op_type != "GroupQueryAttention" or batch == 1 or length == 1 or past == 0
