"""Small decoders written by hand around one fused attention operator, with equal heads within groups, or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
HEADS, DIM, WIDTH, LAYERS, VOCAB, POSITIONS = 4, 32, 32, 2, 64, 64
FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL


@dataclass
class Graph:
    """Nodes and initializers under construction; `tied` makes the heads of each group equal."""

    tied: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def op(self, kind: str, inputs: list[str], outputs: list[str] | str, domain: str = "", **attrs: Any) -> str:
        names = [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(
            helper.make_node(kind, inputs, names, name=f"{names[0]}/node", domain=domain or None, **attrs)
        )
        return names[0]

    def constant(self, name: str, array: Array) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def random(self, name: str, *shape: int) -> str:
        return self.constant(name, (_scale(shape) * self.rng.standard_normal(shape)).astype(np.float32))

    def heads(self, *rows: int, heads: int = HEADS) -> Array:
        """[rows..., heads * DIM] for keys or values; each head of an even number equals the next, if tied."""
        array = (_scale((*rows, 1)) * self.rng.standard_normal((*rows, heads, DIM))).astype(np.float32)
        noise = (0.5 * _scale((*rows, 1)) * self.rng.standard_normal((*rows, DIM))).astype(np.float32)
        pairs = array.reshape(*rows, heads // 2, 2, DIM)
        pairs[...] = pairs[..., :1, :]
        if not self.tied:
            array[..., -1, :] += noise
        return array.reshape(*rows, heads * DIM)

    def projection(self, x: str, name: str, weight: Array, bias: Array | None = None) -> str:
        out = self.op("MatMul", [x, self.constant(f"{name}.weight", weight)], f"{name}.product")
        return out if bias is None else self.op("Add", [out, self.constant(f"{name}.bias", bias)], f"{name}.projected")

    def queries(self, *rows: int) -> Array:
        return (_scale((*rows, 1)) * self.rng.standard_normal((*rows, HEADS * DIM))).astype(np.float32)

    def take(self, name: str, kind: int, shape: list[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def give(self, name: str, shape: list[int | str]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, FLOAT, shape))
        return name


def _scale(shape: tuple[int, ...]) -> float:
    """Keeps activations near one; vectors are small."""
    return float(shape[0]) ** -0.5 if len(shape) > 1 and shape[0] > 1 else 0.3


Attend = Callable[[Graph, int, str], str]
"""(graph, layer, hidden states [B, S, WIDTH]) to the attention's output [B, S, HEADS * DIM]."""


def model(
    attend: Attend, path: Path, *, tied: bool, opset: int = 17, prepare: Callable[[Graph], None] = lambda g: None
) -> Path:
    """Embedding, `LAYERS` residual attentions and a head; checked in onnxruntime by whoever runs it."""
    graph = Graph(tied)
    ids = graph.take("input_ids", INT64, ["batch", "sequence"])
    graph.give("logits", ["batch", "sequence", VOCAB])
    prepare(graph)
    x = graph.op("Gather", [graph.random("embedding", VOCAB, WIDTH), ids], "embedded")
    for layer in range(LAYERS):
        mixed = attend(graph, layer, x)
        out = graph.op(
            "MatMul", [mixed, graph.random(f"layers.{layer}.o.weight", HEADS * DIM, WIDTH)], f"layers.{layer}.o"
        )
        x = graph.op("Add", [x, out], f"layers.{layer}.residual")
    graph.op("MatMul", [x, graph.random("head.weight", WIDTH, VOCAB)], "logits")
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "decoder", graph.inputs, graph.outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8 if opset < 23 else 10,
    )
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return path


# ------------------------------------------------------------------ pieces that operators share


def with_lengths(graph: Graph) -> None:
    """What GroupQueryAttention takes, made from a mask as exporters make it; and tables of angles."""
    mask = graph.take("attention_mask", INT64, ["batch", "total_sequence"])
    axes, one = graph.constant("one", np.array([1])), graph.constant("minus", np.array([1]))
    summed = graph.op("ReduceSum", [mask, axes], "counts", keepdims=0)
    graph.op("Cast", [graph.op("Sub", [summed, one], "last")], "seqlens_k", to=INT32)
    length = graph.op("Gather", [graph.op("Shape", [mask], "mask_shape"), graph.constant("axis", np.array(1))], "total")
    graph.op("Cast", [length], "total_sequence_length", to=INT32)
    angles = np.arange(POSITIONS)[:, None] / 50.0 ** (np.arange(DIM // 2) / (DIM // 2))
    graph.constant("cos", np.cos(angles).astype(np.float32))
    graph.constant("sin", np.sin(angles).astype(np.float32))
    graph.constant("cos_partial", np.cos(angles[:, ::2]).astype(np.float32))
    graph.constant("sin_partial", np.sin(angles[:, ::2]).astype(np.float32))
    ends = graph.op("Unsqueeze", ["counts", one], "ends")
    length = graph.op("Shape", ["input_ids"], "ids_shape")
    new = graph.op("Gather", [length, graph.constant("second", np.array(1))], "new")
    steps = graph.op("Range", [graph.constant("zero", np.array(0)), new, graph.constant("step", np.array(1))], "steps")
    graph.op("Add", [graph.op("Sub", [ends, new], "starts"), steps], "position_ids")
    graph.constant("sinks", np.linspace(-1, 1, HEADS).astype(np.float32))


def with_padding(graph: Graph) -> None:
    graph.take("attention_mask", INT64, ["batch", "total_sequence"])
    graph.op("Cast", ["attention_mask"], "key_padding", to=INT32)


def caches(graph: Graph, layer: int, heads: int = HEADS) -> tuple[list[str], list[str]]:
    """Names of past key and value, and of both presents, declared as inputs and outputs."""
    parts = ("key", "value")
    past = [graph.take(f"past_key_values.{layer}.{p}", FLOAT, ["batch", heads, "past", DIM]) for p in parts]
    return past, [graph.give(f"present.{layer}.{p}", ["batch", heads, "total", DIM]) for p in parts]


def separate(graph: Graph, layer: int, x: str, *, bias: bool, heads: int = HEADS) -> list[str]:
    name = f"layers.{layer}"
    vectors = [graph.queries() if bias else None, *(graph.heads(heads=heads) if bias else None for _ in range(2))]
    weights = [graph.queries(WIDTH), graph.heads(WIDTH, heads=heads), graph.heads(WIDTH, heads=heads)]
    return [
        graph.projection(x, f"{name}.{role}", weight, vector)
        for role, weight, vector in zip("qkv", weights, vectors, strict=True)
    ]


def normed(graph: Graph, value: str, heads: int) -> str:
    """A norm over each head's features, between two reshapes."""
    name = f"{value}.norm"
    apart = graph.op(
        "Reshape", [value, graph.constant(f"{name}.shape", np.array([0, -1, heads, DIM]))], f"{name}.apart"
    )
    weight = graph.constant(f"{name}.weight", np.linspace(0.5, 1.5, DIM).astype(np.float32))
    out = graph.op("SimplifiedLayerNormalization", [apart, weight], f"{name}.out", axis=-1, epsilon=1e-6)
    return graph.op("Reshape", [out, graph.constant(f"{name}.flat", np.array([0, -1, heads * DIM]))], f"{name}.normed")


def turned(graph: Graph, value: str, heads: int) -> str:
    """com.microsoft RotaryEmbedding on heads side by side, at the positions that the mask leaves to new tokens."""
    inputs = [value, "position_ids", "cos", "sin"]
    return graph.op("RotaryEmbedding", inputs, f"{value}.turned", "com.microsoft", num_heads=heads)


def group_query(
    *,
    packed: bool = False,
    bias: bool = False,
    tables: str = "",
    sink: bool = False,
    past: bool = True,
    heads: int = HEADS,
    turn: bool = False,
    norm: bool = False,
    **attrs: Any,
) -> Attend:
    """com.microsoft GroupQueryAttention.

    `tables` is the suffix of the angles' names, `heads` the number of key/value heads; `norm` and `turn` put a norm per
    head and a rotation in front of the operator.
    """

    def attend(graph: Graph, layer: int, x: str) -> str:
        if packed:
            weights = [graph.queries(WIDTH), graph.heads(WIDTH), graph.heads(WIDTH)]
            operands = [graph.projection(x, f"layers.{layer}.qkv", np.concatenate(weights, axis=1)), "", ""]
        else:
            operands = separate(graph, layer, x, bias=bias, heads=heads)
        counts = (HEADS, heads)
        if norm:
            operands[:2] = [normed(graph, v, n) for v, n in zip(operands, counts, strict=False)]
        if turn:
            operands[:2] = [turned(graph, v, n) for v, n in zip(operands, counts, strict=False)]
        held, present = caches(graph, layer, heads) if past else (["", ""], [])
        angles = [f"cos{tables}", f"sin{tables}"] if attrs.get("do_rotary") else ["", ""]
        inputs = [*operands, *held, "seqlens_k", "total_sequence_length", *angles]
        inputs += ["", "", "sinks"] if sink else []
        return graph.op(
            "GroupQueryAttention", inputs, [f"layers.{layer}.mixed", *present], "com.microsoft",
            num_heads=HEADS, kv_num_heads=heads, **attrs,
        )  # fmt: skip

    return attend


def grown(graph: Graph, new: str, past: str, present: str) -> str:
    """[B, S, heads * D] joined to the cache [B, heads, P, D], which is returned, and flattened again."""
    shape = graph.constant(f"{new}.shape", np.array([0, 0, HEADS, DIM]))
    apart = graph.op(
        "Transpose", [graph.op("Reshape", [new, shape], f"{new}.split")], f"{new}.heads", perm=[0, 2, 1, 3]
    )
    graph.op("Concat", [past, apart], present, axis=2)
    back = graph.op("Transpose", [present], f"{new}.back", perm=[0, 2, 1, 3])
    return graph.op("Reshape", [back, graph.constant(f"{new}.flat", np.array([0, 0, HEADS * DIM]))], f"{new}.grown")


def multi_head(
    *, packing: str = "", bias: bool = False, mask: bool = True, past: bool = False, outside: bool = False, **attrs: Any
) -> Attend:
    """com.microsoft MultiHeadAttention; `outside` grows the caches in front of it.

    `packing` is "", "kv" or "qkv"; "split" for a packed projection that is split in front of it, "heads" for keys and
    values of four axes.
    """

    def attend(graph: Graph, layer: int, x: str) -> str:
        name = f"layers.{layer}"
        parts = [graph.queries(WIDTH), graph.heads(WIDTH), graph.heads(WIDTH)]
        if packing == "split":
            product = graph.projection(x, f"{name}.qkv", np.concatenate(parts, axis=1))
            sizes = graph.constant(f"{name}.sizes", np.array([HEADS * DIM] * 3))
            operands = [f"{name}.{role}.piece" for role in "qkv"]
            graph.op("Split", [product, sizes], operands, axis=-1)
        elif packing == "heads":
            operands = [graph.projection(x, f"{name}.{r}", w) for r, w in zip("qkv", parts, strict=True)]
            shape = graph.constant(f"{name}.shape", np.array([0, 0, HEADS, DIM]))
            split = [graph.op("Reshape", [v, shape], f"{v}.split") for v in operands[1:]]
            operands[1:] = [graph.op("Transpose", [v], f"{v}.heads", perm=[0, 2, 1, 3]) for v in split]
        elif packing:
            chosen = parts if packing == "qkv" else parts[1:]
            stacked = np.stack([p.reshape(WIDTH, HEADS, DIM) for p in chosen], axis=2).reshape(WIDTH, -1)
            product = graph.projection(x, f"{name}.{packing}", stacked)
            shape = graph.constant(f"{name}.shape", np.array([0, 0, HEADS, len(chosen), DIM]))
            whole = graph.op("Reshape", [product, shape], f"{name}.packed")
            operands = [whole, "", ""] if packing == "qkv" else [graph.projection(x, f"{name}.q", parts[0]), whole, ""]
        else:
            operands = [graph.projection(x, f"{name}.{r}", w) for r, w in zip("qkv", parts, strict=True)]
        vector = ""
        if bias:
            vector = graph.constant(f"{name}.bias", np.concatenate([graph.queries(), graph.heads(), graph.heads()]))
        held, present = caches(graph, layer) if past else (["", ""], [])
        if outside:
            operands[1:] = [grown(graph, *of) for of in zip(operands[1:], held, present, strict=True)]
            held, present = ["", ""], []
        inputs = [*operands, vector, "key_padding" if mask else "", "", *held]
        while inputs[-1] == "":
            inputs.pop()
        return graph.op(
            "MultiHeadAttention", inputs, [f"{name}.mixed", *present], "com.microsoft", num_heads=HEADS, **attrs
        )

    return attend


def standard(*, flat: bool, mask: bool = False, past: bool = True, **attrs: Any) -> Attend:
    """The standard Attention with caches of its own, on operands of three or of four axes."""

    def attend(graph: Graph, layer: int, x: str) -> str:
        name = f"layers.{layer}"
        operands = separate(graph, layer, x, bias=True)
        if not flat:
            shape = graph.constant(f"{name}.shape", np.array([0, 0, HEADS, DIM]))
            split = [graph.op("Reshape", [v, shape], f"{v}.split") for v in operands]
            operands = [graph.op("Transpose", [v], f"{v}.heads", perm=[0, 2, 1, 3]) for v in split]
        held, present = caches(graph, layer) if past else (["", ""], [])
        counts = {"q_num_heads": HEADS, "kv_num_heads": HEADS} if flat else {}
        inputs = [*operands, "score_mask" if mask else "", *held]
        out = graph.op("Attention", inputs, [f"{name}.mixed", *present], **counts, **attrs)
        if flat:
            return out
        turned = graph.op("Transpose", [out], f"{name}.turned", perm=[0, 2, 1, 3])
        return graph.op("Reshape", [turned, graph.constant(f"{name}.merge", np.array([0, 0, -1]))], f"{name}.merged")

    return attend


def with_score_mask(graph: Graph) -> None:
    """[B, 1, S, T], True where a key counts."""
    mask = graph.take("attention_mask", INT64, ["batch", "total_sequence"])
    kept = graph.op("Cast", [mask], "kept", to=BOOL)
    apart = graph.op("Unsqueeze", [kept, graph.constant("axes", np.array([1, 2]))], "kept_apart")
    length = graph.op(
        "Gather", [graph.op("Shape", ["input_ids"], "ids_shape"), graph.constant("second", np.array([1]))], "length"
    )
    ones = graph.constant("ones", np.array([1, 1]))
    shape = graph.op("Concat", [ones, length, graph.constant("last", np.array([1]))], "mask_shape", axis=0)
    graph.op("Expand", [apart, shape], "score_mask")


@dataclass(frozen=True)
class FusedCase:
    """One operator in one of its forms.

    Attributes:
        native: a rewritten site keeps the operator, with fewer key/value heads.
        pooled: how many of them lose nothing.
    """

    attend: Attend
    prepare: Callable[[Graph], None]
    opset: int = 17
    native: bool = True
    cached: bool = True
    pooled: int = 2


FUSED: Mapping[str, FusedCase] = {
    "gqa": FusedCase(group_query(bias=True), with_lengths),
    "gqa-grouped": FusedCase(group_query(heads=2, do_rotary=1), with_lengths, pooled=1),
    "gqa-turned-before": FusedCase(group_query(turn=True), with_lengths),
    "gqa-normed-before": FusedCase(group_query(norm=True, do_rotary=1, heads=2), with_lengths, pooled=1),
    "gqa-normed-and-turned-before": FusedCase(group_query(norm=True, turn=True), with_lengths),
    "gqa-no-cache": FusedCase(group_query(past=False, do_rotary=1), with_lengths, cached=False),
    "gqa-rotary": FusedCase(group_query(do_rotary=1), with_lengths),
    "gqa-rotary-interleaved": FusedCase(group_query(do_rotary=1, rotary_interleaved=1, scale=0.3), with_lengths),
    "gqa-rotary-partial": FusedCase(group_query(do_rotary=1, tables="_partial"), with_lengths),
    "gqa-packed-rotary": FusedCase(group_query(packed=True, do_rotary=1), with_lengths),
    "gqa-window-softcap": FusedCase(group_query(do_rotary=1, local_window_size=4, softcap=3.0), with_lengths),
    "gqa-sinks": FusedCase(group_query(sink=True), with_lengths),
    "mha-bias-mask": FusedCase(multi_head(bias=True), with_padding, native=False, cached=False),
    "mha-split-bias": FusedCase(multi_head(packing="split", bias=True), with_padding, native=False, cached=False),
    "mha-heads-bias": FusedCase(multi_head(packing="heads", bias=True), with_padding, native=False, cached=False),
    "mha-cache": FusedCase(multi_head(past=True, unidirectional=1), with_padding, native=False),
    "mha-cache-bias": FusedCase(multi_head(past=True, bias=True, unidirectional=1), with_padding, native=False),
    "mha-cache-outside": FusedCase(multi_head(past=True, outside=True), with_padding, native=False),
    "mha-packed-qkv": FusedCase(multi_head(packing="qkv", mask=False), lambda g: None, native=False, cached=False),
    "mha-packed-kv": FusedCase(multi_head(packing="kv", mask=False), lambda g: None, native=False, cached=False),
    "attention23": FusedCase(standard(flat=False, is_causal=1), lambda g: None, opset=23),
    "attention23-flat": FusedCase(standard(flat=True, is_causal=1), lambda g: None, opset=23),
    "attention24-mask-softcap": FusedCase(standard(flat=True, mask=True, softcap=2.0), with_score_mask, opset=24),
}


def fused_file(name: str, folder: Path, *, tied: bool = True) -> Path:
    case = FUSED[name]
    path = folder / f"{name}-{'tied' if tied else 'perturbed'}.onnx"
    return model(case.attend, path, tied=tied, opset=case.opset, prepare=case.prepare)
