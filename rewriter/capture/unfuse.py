"""Fused attention operators, written out in standard operators so that matching can read them.

com.microsoft's Attention, MultiHeadAttention and GroupQueryAttention and the standard Attention with a cache of its own
are written out where their semantics are covered; others stay, and are refused with a reason. Only operators whose site
is going to be rewritten are written out in the model that is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.capture.cache_sizes import CACHE_SLOTS, CacheSize, cache_size, count
from rewriter.onnx_nodes import NodeWriter, input_at

DOMAIN = "com.microsoft"
_GROUP_QUERY_LIMITS = {
    12: "its cache is quantised",
    13: "its cache is quantised",
    14: "it normalises queries and keys itself",
    15: "it normalises queries and keys itself",
}
"""What inputs that are not covered mean."""
_UPSTREAM = 64
"""Values that are looked at for an operator's type."""

# shapes: B batch, S queries, P cached tokens, T keys, H heads, N key/value heads, D features


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
        if (window := _sliding(self.node)) and past != window:  # a buffer that is not full holds no tokens at its end
            return False
        return self.node.op_type != "GroupQueryAttention" or batch == 1 or length == 1 or past == 0


def fused_nodes(model: ir.Model) -> list[ir.Node]:
    """Fused attention operators that `unfuse` can write out."""
    return [n for n in model.graph if _kind(n) and obstacle(n) is None]


def unfuse(model: ir.Model, only: Collection[str] | None = None) -> dict[str, WrittenOut]:
    """Write fused operators out in place, all or those of these scopes; what was written out, by scope.

    Unnamed operators are named first. The written-out softmax is called ``<name>/Softmax``; its scope is `scope(name)`.
    """
    _name_nodes(model)
    done: dict[str, WrittenOut] = {}
    for node in fused_nodes(model):
        assert node.name is not None
        if only is None or scope(node.name) in only:
            done[scope(node.name)] = _WRITERS[_kind(node)](model, node).write()
    return done


def scope(name: str) -> str:
    """A node's name as matching names what it was written out into."""
    return name.strip("/").replace("/", ".")


def obstacle(node: ir.Node) -> str | None:
    """Why a fused operator is not written out; None if it is."""
    kind = _kind(node)
    found = (_uncounted(node, kind) or _OBSTACLES[kind](node)) if kind else None
    return None if found is None else f"the operator {node.domain or 'ai.onnx'}::{node.op_type} is not read: {found}"


# ------------------------------------------------------------------ what is covered


def _kind(node: ir.Node) -> str:
    """The operator if it may be written out, else ""."""
    if node.domain == DOMAIN and node.op_type in {"Attention", "MultiHeadAttention", "GroupQueryAttention"}:
        return node.op_type
    if node.domain in {"", "ai.onnx"} and node.op_type == "Attention" and _keeps_cache(node):
        return "StandardAttention"
    return ""


_COUNTS = {
    "Attention": ("num_heads",),
    "MultiHeadAttention": ("num_heads",),
    "GroupQueryAttention": ("num_heads", "kv_num_heads"),
}


def _uncounted(node: ir.Node, kind: str) -> str | None:
    """Which number of heads an operator has to say and does not."""
    both = ("q_num_heads", "kv_num_heads")  # of the standard operator, where heads lie side by side
    for name in _COUNTS.get(kind, both if any(n in node.attributes for n in both) else ()):
        if count(node, name) is None:
            return f"its attribute {name} is no number of heads; export the model again"
    return None


def _keeps_cache(node: ir.Node) -> bool:
    return any(v is not None for v in node.inputs[4:]) or any(_is_read(o) for o in node.outputs[1:])


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _present(node: ir.Node, position: int) -> bool:
    return len(node.outputs) > position and _is_read(node.outputs[position])


def _attention_obstacle(node: ir.Node) -> str | None:
    if input_at(node, 4) is not None or _present(node, 1):
        return "keys and values share one cache tensor; export with a cache for each"
    if input_at(node, 1) is None:
        return "it holds no projection"
    if node.attributes.get_int("do_rotary", 0):
        return "it rotates queries and keys itself"
    return _mask_obstacle(input_at(node, 3))


def _multi_head_obstacle(node: ir.Node) -> str | None:
    if any(input_at(node, i) is not None for i in (8, 9)):
        return "its cache is a buffer shared with what it returns, or is reordered for beams"
    if _present(node, 3):
        return "it returns its scores"
    if input_at(node, 3) is not None and _packed(node):
        return "it adds a bias to packed operands"
    return _mask_obstacle(input_at(node, 4))


def _packed(node: ir.Node) -> bool:
    """Queries, keys and values, or keys and values, side by side in one input."""
    return input_at(node, 1) is None or input_at(node, 2) is None


def _mask_obstacle(mask: ir.Value | None) -> str | None:
    if mask is None or _rank(mask) in (1, 2, 3):
        return None
    return "the form of its mask is not known"


def _group_query_obstacle(node: ir.Node) -> str | None:
    for position, reason in _GROUP_QUERY_LIMITS.items():
        if input_at(node, position) is not None:
            return reason
    if _present(node, 3):
        return "it returns its scores"
    pasts = [input_at(node, 3), input_at(node, 4)]
    if _sliding(node) and None in pasts:
        return "it fills a cache that forgets tokens outside a window, and is given none"
    return None if all(v is None or v.is_graph_input() for v in pasts) else "its cache is changed before it is read"


def _sliding(node: ir.Node) -> int:
    """Tokens that its cache holds, where that forgets those outside a window; else 0."""
    slides = node.attributes.get_int("sliding_window_cache", 0)
    return max(node.attributes.get_int("local_window_size", 0), 0) if slides else 0


def _standard_obstacle(node: ir.Node) -> str | None:
    if input_at(node, 6) is not None:
        return "it counts the keys of each sequence"
    if _present(node, 3):
        return "it returns its scores"
    pasts = [input_at(node, 4), input_at(node, 5)]
    if not all(v is None or v.is_graph_input() for v in pasts):
        return "its cache is changed before it is read"
    return None if "q_num_heads" in node.attributes or _heads_declared(node) else "no shape says how many heads it has"


def _heads_declared(node: ir.Node) -> bool:
    """Whether 4-D operands, or caches, declare their heads."""
    return _declared_heads(node, 0) is not None and _declared_heads(node, 1) is not None


def _declared_heads(node: ir.Node, position: int) -> int | None:
    """Heads of the queries (0) or the keys (1), from a 4-D shape or the keys' cache."""
    for value in (input_at(node, position), input_at(node, 4) if position else None):
        if value is not None and value.shape is not None and value.shape.rank() == 4:
            size = value.shape[1]
            if isinstance(size, int):
                return size
    return None


_OBSTACLES = {
    "Attention": _attention_obstacle,
    "MultiHeadAttention": _multi_head_obstacle,
    "GroupQueryAttention": _group_query_obstacle,
    "StandardAttention": _standard_obstacle,
}


def _rank(value: ir.Value) -> int | None:
    """Rank of a value, declared or told from what makes it; None if unknown."""
    if value.shape is not None:
        return value.shape.rank()
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "EmbedLayerNormalization":
        return 1
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return len(node.attributes["perm"].as_ints())
    if node.op_type == "Reshape" and node.inputs[1] is not None and node.inputs[1].shape is not None:
        size = node.inputs[1].shape[0]
        return size if isinstance(size, int) else None
    if node.op_type in {"Cast", "Identity"} and node.inputs[0] is not None:
        return _rank(node.inputs[0])
    return None


def _operand_rank(node: ir.Node, position: int) -> int:
    """Rank of an operand of MultiHeadAttention: 3 unless a shape says otherwise."""
    value = input_at(node, position)
    return 3 if value is None else (_rank(value) or 3)


def _name_nodes(model: ir.Model) -> None:
    taken = {n.name for n in model.graph}
    for number, node in enumerate(model.graph):
        if not node.name:
            name = f"{node.op_type}_{number}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


# ------------------------------------------------------------------ writing out


class _Writer:
    """Writes one operator out; operators differ in their operands, caches and in what is added to scores."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.node = model, node
        self.nodes: list[ir.Node] = []
        self.heads, self.kv_heads = self._head_counts()
        self.dtype = _float_type(node)
        taken = {v.name for n in model.graph for v in n.outputs} | set(model.graph.initializers)
        taken |= {v.name for v in model.graph.inputs} | {n.name for n in model.graph}
        self.writer = NodeWriter(model.graph, {n for n in taken if n})

    # --- what operators differ in

    def _head_counts(self) -> tuple[int, int]:
        heads = self.node.attributes["num_heads"].as_int()
        return heads, heads

    def _operands(self) -> list[ir.Value]:
        """q [B, H, S, D], k [B, N, S, D], v [B, N, S, D]."""
        raise NotImplementedError

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return None, None

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        """What is added to the scores [B, H, S, T]."""
        raise NotImplementedError

    def _sinks(self, scores: ir.Value) -> ir.Value | None:
        """Columns that take part in the softmax, [B, H, S, 1]."""
        return None

    # --- the common core

    def write(self) -> WrittenOut:
        before = set(self.model.graph.initializers)
        q, k, v = self._operands()
        k, v = (self._grown(x, past) for x, past in zip((k, v), self._pasts(), strict=True))
        scores = self._op("MatMul", [q, self._turned(self._repeated(k))], "scores")
        scores = self._op("Mul", [scores, self._scale(q)], "scaled")
        if softcap := self.node.attributes.get_float("softcap", 0.0):
            cap = self._number(softcap)
            bent = self._op("Tanh", [self._op("Div", [scores, cap], "uncapped")], "bent")
            scores = self._op("Mul", [bent, cap], "capped")
        for bias in self._added(q, k):
            scores = self._op("Add", [scores, bias], "biased")
        mixed = self._op("MatMul", [self._weights(scores, k), self._repeated(v)], "mixed")
        return self._replace([self._merged(mixed), self._kept(k), self._kept(v)], before)

    def _kept(self, grown: ir.Value) -> ir.Value:
        """The cache as it is returned."""
        window = _sliding(self.node)
        ends = [self._ints([n]) for n in (-window, 2**31 - 1, 2)] if window else []
        return self._op("Slice", [grown, *ends], "kept") if window else grown

    def _weights(self, scores: ir.Value, k: ir.Value) -> ir.Value:
        sinks = self._sinks(scores)
        if sinks is not None:
            scores = self._op("Concat", [scores, sinks], "with_sinks", axis=-1)
        weights = self._op("Softmax", [scores], "weights", axis=-1)
        weights.producer().name = f"{self.node.name}/Softmax"  # type: ignore[union-attr]
        if sinks is None:
            return weights
        ends = [self._ints([0]), self._size(k, [2]), self._ints([3])]
        return self._op("Slice", [weights, *ends], "key_weights")

    def _merged(self, mixed: ir.Value) -> ir.Value:
        """[B, H, S, D] as the operator returns it."""
        turned = self._op("Transpose", [mixed], "turned", perm=[0, 2, 1, 3])
        return self._op("Reshape", [turned, self._ints([0, 0, -1])], "merged")

    def _replace(self, results: list[ir.Value], before: set[str]) -> WrittenOut:
        """Give the operator's outputs, under their names, from these values."""
        inputs, names = tuple(self.node.inputs), tuple(
            (o.name or "") if _is_read(o) else "" for o in self.node.outputs
        )  # fmt: skip
        self.model.graph.insert_before(self.node, self.nodes)
        for output, result in zip(self.node.outputs, results, strict=False):
            if _is_read(output):
                result.type, result.shape = output.type, output.shape
                output.replace_all_uses_with(result, replace_graph_outputs=True)
                output.name, result.name = None, output.name
        self.model.graph.remove(self.node, safe=True)
        added = frozenset(set(self.model.graph.initializers) - before)
        return WrittenOut(self.node, inputs, names, added)

    def _grown(self, new: ir.Value, past: ir.Value | None) -> ir.Value:
        return new if past is None else self._op("Concat", [past, new], "grown", axis=2)

    def _repeated(self, value: ir.Value) -> ir.Value:
        """[B, N, T, D] as [B, H, T, D]."""
        if self.kv_heads == self.heads:
            return value
        group = self.heads // self.kv_heads
        shape = self._op("Shape", [value], "kv_shape")
        batch, rest = (self._op("Gather", [shape, self._ints(i)], "kv_dims") for i in ([0], [2, 3]))
        apart = self._concat([batch, self._ints([self.kv_heads, 1]), rest])
        wide = self._concat([batch, self._ints([self.kv_heads, group]), rest])
        whole = self._concat([batch, self._ints([self.heads]), rest])
        spread = self._op("Expand", [self._op("Reshape", [value, apart], "kv_apart"), wide], "kv_wide")
        return self._op("Reshape", [spread, whole], "repeated")

    def _turned(self, k: ir.Value) -> ir.Value:
        return self._op("Transpose", [k], "k_turned", perm=[0, 1, 3, 2])

    def _scale(self, q: ir.Value) -> ir.Value:
        scale = self.node.attributes.get_float("scale", 0.0)
        if scale:
            return self._number(scale)
        real = self._op("Cast", [self._size(q, [3])], "head_dim", to=int(self.dtype))
        return self._op("Reciprocal", [self._op("Sqrt", [real], "root")], "scale")

    # --- pieces

    def _split(self, value: ir.Value, heads: int) -> ir.Value:
        """[B, S, heads * D] as [B, heads, S, D]."""
        split = self._op("Reshape", [value, self._ints([0, 0, heads, -1])], "split")
        return self._op("Transpose", [split], "heads", perm=[0, 2, 1, 3])

    def _slices(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        ends = np.cumsum(sizes)
        return [
            self._op("Slice", [value, *(self._ints([int(n)]) for n in (end - size, end, axis))], "piece")
            for size, end in zip(sizes, ends, strict=True)
        ]

    def _later(self, q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(last visible key of each query [S, 1], keys [1, T]); queries are the last of the keys."""
        queries, keys = (self._op("Gather", [self._op("Shape", [x], "shape"), self._int(2)], "length") for x in (q, k))
        row = self._op("Range", [self._op("Sub", [keys, queries], "offset"), keys, self._int(1)], "i")
        column = self._op("Range", [self._int(0), keys, self._int(1)], "j")
        return (
            self._op("Reshape", [row, self._ints([-1, 1])], "rows"),
            self._op("Reshape", [column, self._ints([1, -1])], "columns"),
        )

    def _causal(self, q: ir.Value, k: ir.Value, window: int = -1) -> ir.Value:
        rows, columns = self._later(q, k)
        hidden = self._op("Greater", [columns, rows], "later")
        if window > 0:
            first = self._op("Sub", [rows, self._int(window - 1)], "first")
            hidden = self._op("Or", [hidden, self._op("Less", [columns, first], "earlier")], "outside")
        return self._op("Where", [hidden, self._lowest(), self._number(0.0)], "causal")

    def _padding(self, mask: ir.Value, k: ir.Value) -> ir.Value:
        """Raw masks [B, T] and [B, S, T] hold 1 where a key counts; [B] holds how many keys count."""
        rank = _rank(mask)
        if rank == 1:
            positions = self._op(
                "Range", [self._int(0), self._op("Gather", [self._op("Shape", [k], "shape"), self._int(2)], "keys"),
                          self._int(1)], "positions"
            )  # fmt: skip
            counts = self._op("Cast", [mask], "counts", to=int(ir.DataType.INT64))
            keep = self._op(
                "Less", [positions, self._op("Reshape", [counts, self._ints([-1, 1])], "counts_column")], "keep"
            )
        else:
            keep = self._op("Cast", [mask], "keep", to=int(ir.DataType.BOOL))
        if rank == 3:
            shape = self._op("Shape", [keep], "keep_shape")
            lead, tail = (self._op("Gather", [shape, self._ints(i)], "dims") for i in ([0], [1, 2]))
            wide = self._concat([lead, self._ints([1]), tail])
        else:
            wide = self._ints([0, 1, 1, -1])
        shaped = self._op("Reshape", [keep, wide], "keep_wide")
        low = self.node.attributes.get_float("mask_filter_value", -10000.0)
        return self._op("Where", [shaped, self._number(0.0), self._number(low)], "mask")

    def _size(self, value: ir.Value, axes: list[int]) -> ir.Value:
        return self._op("Gather", [self._op("Shape", [value], "shape"), self._ints(axes)], "size")

    def _concat(self, parts: list[ir.Value]) -> ir.Value:
        return self._op("Concat", parts, "full_shape", axis=0)

    def _lowest(self) -> ir.Value:
        return self._number(float(self.dtype.min))

    def _op(self, kind: str, inputs: list[ir.Value], name: str, **attrs: int | list[int]) -> ir.Value:
        return self.writer.op(self.nodes, kind, inputs, f"{self.node.name}/{name}", **attrs)

    def _ints(self, numbers: list[int]) -> ir.Value:
        return self.writer.ints(numbers, f"{self.node.name}/constant")

    def _int(self, number: int) -> ir.Value:
        return self.writer.constant(np.array(number, np.int64), f"{self.node.name}/constant")

    def _number(self, number: float) -> ir.Value:
        return self.writer.scalar(number, self.dtype, f"{self.node.name}/constant")


class _Attention(_Writer):
    """com.microsoft Attention holds its own projection: input times [in, q + k + v]."""

    def _operands(self) -> list[ir.Value]:
        x, weight, bias = self.node.inputs[0], self.node.inputs[1], input_at(self.node, 2)
        assert x is not None and weight is not None
        whole = self._op("MatMul", [x, weight], "projection")
        if bias is not None:
            whole = self._op("Add", [whole, bias], "projection_bias")
        sizes = self.node.attributes.get_ints("qkv_hidden_sizes", None)
        if not sizes:
            assert weight.shape is not None
            sizes = [int(weight.shape[-1]) // 3] * 3  # type: ignore[arg-type]
        return [self._split(piece, self.heads) for piece in self._slices(whole, sizes, axis=2)]

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        return self._masks(q, k, input_at(self.node, 3), input_at(self.node, 5))

    def _masks(self, q: ir.Value, k: ir.Value, mask: ir.Value | None, bias: ir.Value | None) -> list[ir.Value]:
        found = [] if mask is None else [self._padding(mask, k)]
        if self.node.attributes.get_int("unidirectional", 0):
            found.append(self._causal(q, k))
        return found if bias is None else [*found, bias]


class _MultiHead(_Attention):
    """com.microsoft MultiHeadAttention: three operands, or [B, S, H, 3, D], or queries and [B, S, H, 2, D]."""

    def _operands(self) -> list[ir.Value]:
        q, k, v = (input_at(self.node, i) for i in range(3))
        assert q is not None
        if k is None:
            return [self._part(q, i) for i in range(3)]
        if v is None:
            return [self._split(q, self.heads), self._part(k, 0), self._part(k, 1)]
        operands = self._with_bias([q, k, v])
        return [self._split(x, self.heads) if _operand_rank(self.node, i) == 3 else x for i, x in enumerate(operands)]

    def _part(self, packed: ir.Value, number: int) -> ir.Value:
        piece = self._op("Gather", [packed, self._int(number)], "piece", axis=3)
        return self._op("Transpose", [piece], "heads", perm=[0, 2, 1, 3])

    def _with_bias(self, operands: list[ir.Value]) -> list[ir.Value]:
        """One vector [q + k + v] is added to the inputs of three axes; the others hold heads already."""
        bias = input_at(self.node, 3)
        if bias is None:
            return operands
        flat = [v for i, v in enumerate(operands) if _operand_rank(self.node, i) == 3]
        shapes = [v.shape[-1] if v.shape is not None else None for v in flat]
        whole = int(bias.shape[0]) if bias.shape is not None else 0  # type: ignore[arg-type]
        sizes = [s if isinstance(s, int) else whole // 3 for s in shapes]
        parts = self._slices(bias, sizes, axis=0)
        added = [self._op("Add", [v, b], "operand") for v, b in zip(flat, parts, strict=True)]
        return [*added, *operands[len(flat) :]]

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return input_at(self.node, 6), input_at(self.node, 7)

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        return self._masks(q, k, input_at(self.node, 4), input_at(self.node, 5))


class _GroupQuery(_Writer):
    """com.microsoft GroupQueryAttention, for batches whose sequences are equally long."""

    def _head_counts(self) -> tuple[int, int]:
        return self.node.attributes["num_heads"].as_int(), self.node.attributes["kv_num_heads"].as_int()

    def _operands(self) -> list[ir.Value]:
        q, k, v = (input_at(self.node, i) for i in range(3))
        assert q is not None
        if k is None or v is None:
            split = self._split(q, self.heads + 2 * self.kv_heads)
            parts = self._slices(split, [self.heads, self.kv_heads, self.kv_heads], axis=1)
        else:
            parts = [self._split(x, n) for x, n in ((q, self.heads), (k, self.kv_heads), (v, self.kv_heads))]
        if not self.node.attributes.get_int("do_rotary", 0):
            return parts
        cos, sin = self._angles(parts[0])
        return [self._rotated(parts[0], cos, sin), self._rotated(parts[1], cos, sin), parts[2]]

    def _angles(self, q: ir.Value) -> list[ir.Value]:
        """Rows [B, 1, S, R / 2] of both caches at each token's position."""
        positions = input_at(self.node, 9)
        if positions is None:
            last, length = input_at(self.node, 5), self._size(q, [2])
            assert last is not None
            wide = self._op("Cast", [last], "last", to=int(ir.DataType.INT64))
            row = self._op("Reshape", [wide, self._ints([-1, 1, 1])], "last_row")
            start = self._op("Sub", [self._op("Add", [row, self._int(1)], "end"), length], "start")
            scalar = self._op("Gather", [self._op("Shape", [q], "shape"), self._int(2)], "length")
            steps = self._op("Range", [self._int(0), scalar, self._int(1)], "steps")
            positions = self._op("Add", [start, steps], "positions")
        else:
            positions = self._op("Reshape", [positions, self._ints([0, 1, -1])], "positions")
        tables = [input_at(self.node, 7), input_at(self.node, 8)]
        return [self._op("Gather", [t, positions], "angle", axis=0) for t in tables if t is not None]

    def _rotated(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        half = self._size(cos, [3])
        width = self._op("Add", [half, half], "width")
        interleaved = bool(self.node.attributes.get_int("rotary_interleaved", 0))
        zero, one, two, axis = (self._ints([n]) for n in (0, 1, 2, 3))
        if interleaved:
            pair = [self._op("Slice", [x, begin, width, axis, two], "piece") for begin in (zero, one)]
        else:
            pair = [self._op("Slice", [x, a, b, axis], "piece") for a, b in ((zero, half), (half, width))]
        first = self._op("Sub", [self._mul(pair[0], cos), self._mul(pair[1], sin)], "first")
        second = self._op("Add", [self._mul(pair[1], cos), self._mul(pair[0], sin)], "second")
        if interleaved:
            apart = [self._op("Reshape", [y, self._ints([0, 0, 0, -1, 1])], "apart") for y in (first, second)]
            both = self._op("Concat", apart, "pairs", axis=4)
            turned = [self._op("Reshape", [both, self._ints([0, 0, 0, -1])], "turned")]
        else:
            turned = [first, second]
        rest = self._op("Slice", [x, width, self._ints([2**31 - 1]), axis], "rest")
        return self._op("Concat", [*turned, rest], "rotated", axis=3)

    def _mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._op("Mul", [a, b], "product")

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return input_at(self.node, 3), input_at(self.node, 4)

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        found = []
        if self.node.attributes.get_int("causal", 1):
            found.append(self._causal(q, k, self.node.attributes.get_int("local_window_size", -1)))
        bias = input_at(self.node, 10)
        return found if bias is None else [*found, bias]

    def _sinks(self, scores: ir.Value) -> ir.Value | None:
        given = input_at(self.node, 11)
        if given is not None:
            column = self._op("Reshape", [given, self._ints([1, self.heads, 1, 1])], "sink")
        elif self.node.attributes.get_int("smooth_softmax", 0):
            column = self._op("Reshape", [self._number(0.0), self._ints([1, 1, 1, 1])], "sink")
        else:
            return None
        size = self._concat([self._size(scores, [0, 1, 2]), self._ints([1])])
        return self._op("Expand", [column, size], "sinks")


class _Standard(_Writer):
    """The standard Attention with past inputs or present outputs."""

    def _head_counts(self) -> tuple[int, int]:
        attributes = self.node.attributes
        if "q_num_heads" in attributes:
            return attributes["q_num_heads"].as_int(), attributes["kv_num_heads"].as_int()
        q, k = _declared_heads(self.node, 0), _declared_heads(self.node, 1)
        assert q is not None and k is not None
        return q, k

    @property
    def _flat(self) -> bool:
        return "q_num_heads" in self.node.attributes

    def _operands(self) -> list[ir.Value]:
        operands = [v for v in self.node.inputs[:3] if v is not None]
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return [self._split(x, n) for x, n in zip(operands, counts, strict=True)] if self._flat else operands

    def _pasts(self) -> tuple[ir.Value | None, ir.Value | None]:
        return input_at(self.node, 4), input_at(self.node, 5)

    def _added(self, q: ir.Value, k: ir.Value) -> list[ir.Value]:
        found = []
        mask = input_at(self.node, 3)
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            mask = self._op("Where", [mask, self._number(0.0), self._lowest()], "mask")
        if mask is not None:
            found.append(mask)
        if self.node.attributes.get_int("is_causal", 0):
            found.append(self._causal(q, k))
        return found

    def _merged(self, mixed: ir.Value) -> ir.Value:
        return super()._merged(mixed) if self._flat else mixed


_WRITERS: Mapping[str, type[_Writer]] = {
    "Attention": _Attention,
    "MultiHeadAttention": _MultiHead,
    "GroupQueryAttention": _GroupQuery,
    "StandardAttention": _Standard,
}


def _float_type(node: ir.Node) -> ir.DataType:
    """The type an operator computes in: declared, or of the caches and weights that its operands are made with."""
    seen: list[ir.Value] = [v for v in (node.outputs[0], *node.inputs[:5]) if v is not None]
    for value in seen:  # grows
        known = value.const_value.dtype if value.const_value is not None else value.dtype
        if known is not None and known.is_floating_point():
            return known
        maker = value.producer()
        if maker is None or maker is node or len(seen) > _UPSTREAM:
            continue
        if maker.op_type == "Cast" and "to" in maker.attributes:
            cast = ir.DataType(maker.attributes["to"].as_int())
            if cast.is_floating_point():
                return cast
            continue
        seen += [v for v in maker.inputs if v is not None and not any(v is s for s in seen)]
    return ir.DataType.FLOAT
