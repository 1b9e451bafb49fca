"""A file's nodes and weights as the flow shows them.

Products with quantised weights are shown as one node with a float matrix, sequences of tensors are seen through, and
what stands before such nodes and is read by no other reads nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import onnx_ir as ir

from passes.dataflow import CONTRACTIONS, Array, Node, Value, Weight, unlike
from rewriter.capture.fused.unfuse import obstacle
from rewriter.capture.onnx_bodies import bodies_of, holds_anchor, read_in_bodies
from rewriter.capture.onnx_constants import constant_tensor
from rewriter.capture.onnx_elementwise import single_node
from rewriter.capture.onnx_vocabulary import OPERATORS
from rewriter.capture.quantised import QuantisedProduct
from rewriter.capture.sequences import OnTensors, on_tensors

FUNCTION_DOMAIN = "rewriter.ops"

_PLAIN = frozenset(
    {
        *(ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS),
        *(ir.AttributeType.STRING, ir.AttributeType.STRINGS),
    }
)
"""Attributes that are numbers and words."""


def nodes_shown(nodes: Sequence[ir.Node], products: Mapping[int, QuantisedProduct]) -> tuple[Node, ...]:
    """Nodes as the flow shows them: products with quantised weights as one, sequences of tensors seen through.

    What stands before such nodes and is read by no other reads nothing.
    """
    through = {i: t for i, n in enumerate(nodes) if (t := on_tensors(n)) is not None}
    shown = {id(nodes[i]) for i in (*products, *through)}
    hidden = [*(p.hidden for p in products.values()), *(t.hidden for t in through.values())]
    inner = {id(n): n for group in hidden for n in group}
    while read := {k for k, n in inner.items() if not _users(n) <= inner.keys() | shown}:
        inner = {k: n for k, n in inner.items() if k not in read}
    return tuple(
        _product(i, n, products[i])
        if i in products
        else _on_tensors(i, n, through[i])
        if i in through
        else replace(_node(i, n), op="Folded", inputs=())
        if id(n) in inner
        else _node(i, n)
        for i, n in enumerate(nodes)
    )


def _users(node: ir.Node) -> set[int]:
    return {id(user) for output in node.outputs for user, _ in output.uses()}


def _product(index: int, node: ir.Node, product: QuantisedProduct) -> Node:
    bias = (product.bias.name or "",) if product.bias is not None else ()
    inputs = (product.x.name or "", product.name, *bias)
    return replace(_node(index, node), op="Gemm" if bias else "MatMul", domain="", attrs={}, inputs=inputs)


def _on_tensors(index: int, node: ir.Node, through: OnTensors) -> Node:
    inputs = tuple(v.name or "" for v in through.inputs)
    return replace(_node(index, node), op=through.op, inputs=inputs, evaluate=through.run, likeness=unlike)


def _node(index: int, node: ir.Node) -> Node:
    attrs = {k: _attribute(a) for k, a in node.attributes.items() if isinstance(a, ir.Attr)}
    if node.domain == FUNCTION_DOMAIN:
        attrs["is_causal"] = int("Causal" in node.op_type)
    if (reason := obstacle(node)) is not None:
        attrs["unread"] = reason
    if any(holds_anchor(body) for body in bodies_of(node)):
        attrs["softmax_inside"] = True
    inputs = tuple((v.name or "") if v is not None else "" for v in node.inputs)
    if node.op_type == "RotaryEmbedding" and node.domain == "com.microsoft":  # the standard one takes positions last
        inputs = (inputs[0], *inputs[2:4], inputs[1])
    return Node(
        index=index,
        op=_canonical_op(node),
        domain=node.domain,
        attrs=attrs,
        inputs=inputs + read_in_bodies(node, inputs),
        outputs=tuple(v.name or "" for v in node.outputs),
        evaluate=_evaluator(node, attrs),
        owner=_owner(node),
        name=node.name or "",
        likeness=partial(_likeness, node),
    )


def _likeness(node: ir.Node) -> str | None:
    """The operator and its attributes; None if some of them are more than numbers and words."""
    plain = {k: a.value for k, a in node.attributes.items() if isinstance(a, ir.Attr) and a.type in _PLAIN}
    if len(plain) < len(node.attributes):
        return None
    return f"{node.domain}::{node.op_type} {sorted(plain.items())!r} {len(node.outputs)}"


def _canonical_op(node: ir.Node) -> str:
    if node.domain in ("", "ai.onnx"):
        return "Conv" if node.op_type == "ConvInteger" else node.op_type  # of integers, but a convolution
    known = CONTRACTIONS | {
        "RotaryEmbedding", "SimplifiedLayerNormalization", "GroupedQueryAttention", "QLinearSoftmax",
        "QuantizeLinear", "DequantizeLinear",
    }  # fmt: skip
    # an attention of whatever kind has a softmax inside, unless it is linear
    if node.domain == "com.microsoft" and node.op_type.endswith("Attention") and not node.op_type.startswith("Linear"):
        return "MultiHeadAttention"
    if node.domain == FUNCTION_DOMAIN and "Attention" in node.op_type:
        return "GroupedQueryAttention"
    if node.domain == FUNCTION_DOMAIN and node.op_type.startswith("mixture"):
        return "MixtureOfExperts"
    return node.op_type if node.op_type in known else f"{node.domain}.{node.op_type}"


def _attribute(attribute: ir.Attr) -> Any:
    return None if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) else attribute.value


def _evaluator(node: ir.Node, attrs: Mapping[str, Any]) -> Callable[[Sequence[Array | None]], tuple[Array, ...]]:
    count = len(node.outputs)
    if node.op_type not in OPERATORS:
        return single_node(node)

    def evaluate(arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        return OPERATORS[node.op_type](attrs, arrays, count)

    return evaluate


def _owner(node: ir.Node) -> str:
    """The module path that an exporter left: name scopes (dynamo) or the node's own name (TorchScript)."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        try:
            path = ast.literal_eval(scopes)
        except (SyntaxError, ValueError):
            path = []
        if isinstance(path, list) and len(path) >= 2:
            return str(path[-2])
    name = (node.name or "").strip("/")
    return name.rsplit("/", 1)[0].replace("/", ".") if "/" in name else ""


def is_written_out(function: ir.Function) -> bool:
    """Whether calls of a function are read as what its body says: all but attention of ours that sees every key."""
    return function.domain != FUNCTION_DOMAIN or "Sparse" in function.name


def stored_weights(model: ir.Model, nodes: Iterable[ir.Node]) -> dict[Value, Weight]:
    fed = {v.name for v in model.graph.inputs}
    weights = {
        name: Weight(
            name,
            tuple(int(s) for s in value.const_value.shape),  # type: ignore[arg-type]
            value.const_value.dtype.name.lower(),
            len(value.uses()),
        )
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and name not in fed
    }
    for node in nodes:
        tensor = constant_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is not None and node.outputs[0].name:
            shape = tuple(int(s) for s in tensor.shape)  # type: ignore[arg-type]
            name = node.outputs[0].name
            weights[name] = Weight(name, shape, tensor.dtype.name.lower(), len(node.outputs[0].uses()))
    return weights


def quantised_matrices(products: Iterable[QuantisedProduct]) -> dict[Value, Weight]:
    """The float matrices that quantised weights stand for."""
    held = {p.name: p for p in products}
    return {n: Weight(n, p.shape, f"int{p.bits}", len(p.codes.uses())) for n, p in held.items()}


def float_dtype(model: ir.Model) -> str:
    """The floating dtype most of the stored numbers have; "int8" where activations are quantised on the way."""
    counts: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + int(tensor.size)
    name = max(counts, key=lambda k: counts[k]) if counts else "FLOAT"
    if any(_rounds(n) for n in model.graph):
        return "int8"
    return {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}[name]


def _rounds(node: ir.Node) -> bool:
    """Whether an operator quantises activations."""
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("accuracy_level", 0) == 4
    return node.op_type in {"QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
