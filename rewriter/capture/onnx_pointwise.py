"""Projections as vision models write them, as products with a matrix: convolutions of kernel size 1 and batch norms.

Sums of products, as adapters leave them, too (`rewriter.capture.onnx_adapters`).

Like fused operators (`rewriter.capture.fused`) they are written out on a copy to be matched, and in the model that is
kept only where an attention that they project for is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.dataflow import Array
from rewriter.capture.onnx_adapters import Adapted, adapted_sums
from rewriter.capture.onnx_constants import drop_unread, weight_numbers, weight_tensor
from rewriter.onnx_nodes import NodeWriter, input_at

_PRODUCTS = frozenset({"MatMul", "Einsum", "Gemm", "FusedMatMul"})
_FUSED = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_ENDS = _PRODUCTS | _FUSED | {"Conv", "Softmax"}


@dataclass(frozen=True)
class _Convolution:
    """A convolution and the norm that alone reads it, if there is one."""

    node: ir.Node
    norm: ir.Node | None

    @property
    def result(self) -> ir.Value:
        return (self.norm or self.node).outputs[0]

    @property
    def constants(self) -> list[ir.Value]:
        """What it reads of the file's weights."""
        norm = self.norm.inputs[1:] if self.norm is not None else ()
        return [v for v in (*self.node.inputs[1:], *norm) if v is not None]

    def matrix(self) -> tuple[Array, Array | None]:
        """([in, out], what is added to each feature), float32."""
        kernel, bias = (input_at(self.node, i) for i in (1, 2))
        assert kernel is not None
        numbers = weight_numbers(kernel)
        rows = numbers.reshape(len(numbers), -1)
        added = None if bias is None else weight_numbers(bias)
        if self.norm is None:
            return rows.T, added
        factor, shift = _folded(self.norm, 0.0 if added is None else added)
        return (rows * factor[:, None]).T, shift


@dataclass(frozen=True)
class _NormedProduct:
    """A product with a stored matrix, what is added to it, and the norm that alone reads it."""

    node: ir.Node
    added: ir.Node | None
    norm: ir.Node

    @property
    def constants(self) -> list[ir.Value]:
        """As of `_Convolution`."""
        added = self.added.inputs if self.added is not None else ()
        return [v for v in (self.node.inputs[1], *added, *self.norm.inputs[1:]) if v is not None]


def _folded(norm: ir.Node, added: Array | float) -> tuple[Array, Array]:
    """(what a norm multiplies features by, what it then adds to them), given what was added before it."""
    gain, shift, mean, variance = (weight_numbers(v) for v in norm.inputs[1:5] if v is not None)
    factor = gain / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    return factor, shift + (added - mean) * factor


@dataclass(frozen=True)
class Written:
    """What a product was written for.

    Attributes:
        node: the name of the convolution or of the sum, or of the product itself where only a norm went into it.
        gone: initializers that nothing reads any more, taken out of the graph.
    """

    node: str
    gone: tuple[str, ...]


def has_unwritten(model: ir.Model) -> bool:
    """Whether attentions project by convolutions, sums or batch norms that can be written as products."""
    return bool(_found(model))


def write_as_products(model: ir.Model, only: Collection[str] | None = None) -> dict[str, Written]:
    """Write what attentions project by as products, in place: all, or what has these names. Returns what was there by
    the name of the product.

    Unnamed nodes are named first.
    """
    taken = {v.name for n in model.graph for v in n.outputs} | set(model.graph.initializers)
    taken |= {v.name for v in model.graph.inputs} | {n.name for n in model.graph}
    writer = NodeWriter(model.graph, {n for n in taken if n})
    written: dict[str, Written] = {}
    for found in _found(model):
        name = found.node.name or writer.unique(f"{found.node.outputs[0].name}/{found.node.op_type}")
        found.node.name = name
        if only is None or name in only:
            read = found.constants  # a node that was removed reads nothing
            product = _written(model.graph, writer, found)
            written[product] = Written(name, drop_unread(model.graph, read))
    return written


def _written(graph: ir.Graph, writer: NodeWriter, found: _Convolution | _NormedProduct | Adapted) -> str:
    """The name of the product that is there now."""
    if isinstance(found, Adapted):
        return found.write(graph, writer)
    return _write(graph, writer, found) if isinstance(found, _Convolution) else _fold(graph, writer, found)


def _found(model: ir.Model) -> list[_Convolution | _NormedProduct | Adapted]:
    found: list[_Convolution | _NormedProduct | Adapted] = [*adapted_sums(model.graph)]
    for node in dict.fromkeys(_read_by_attention(model.graph)):
        if _is_pointwise(node):
            found.append(_Convolution(node, _norm_behind(node)))
        elif (normed := _normed_product(node)) is not None:
            found.append(normed)
    return found


def _read_by_attention(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        if node.op_type in _FUSED:
            yield from _next(node, _above)
        elif node.op_type == "Softmax":
            for product in (*_next(node, _above), *_next(node, _below)):
                if product.op_type in _PRODUCTS:
                    yield from _next(product, _above)


def _above(node: ir.Node) -> Iterable[ir.Node]:
    return [p for v in node.inputs if v is not None and (p := v.producer()) is not None]


def _below(node: ir.Node) -> Iterable[ir.Node]:
    return [use.node for v in node.outputs for use in v.uses()]


def _next(start: ir.Node, step: Callable[[ir.Node], Iterable[ir.Node]]) -> Iterator[ir.Node]:
    """The first convolutions, products and softmaxes in one direction."""
    todo, seen = [*step(start)], {start}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op_type in _ENDS:
            yield node
        else:
            todo.extend(step(node))


def _is_pointwise(node: ir.Node) -> bool:
    """Whether a convolution multiplies each place by one stored matrix of floats, and does nothing else."""
    if node.op_type != "Conv" or node.domain not in {"", "ai.onnx"} or node.outputs[0].is_graph_output():
        return False
    kernel, bias = (input_at(node, i) for i in (1, 2))
    numbers = None if kernel is None else weight_tensor(kernel)
    stored = numbers is not None and (bias is None or weight_tensor(bias) is not None)
    if numbers is None or not stored or not numbers.dtype.is_floating_point() or numbers.dtype.itemsize < 2:
        return False
    size = [n for n in numbers.shape if isinstance(n, int)]
    attributes = node.attributes
    still = all(n == 1 for key in ("strides", "dilations") for n in attributes.get_ints(key, [1]))
    still = still and all(n == 0 for n in attributes.get_ints("pads", [0]))
    automatic = attributes.get_string("auto_pad", "NOTSET")
    one = attributes.get_int("group", 1) == 1 and all(n == 1 for n in size[2:])
    return still and one and len(size) > 2 and automatic in {"NOTSET", "VALID"}


def _norm_behind(node: ir.Node | None) -> ir.Node | None:
    if node is None:
        return None
    uses = [use for use in node.outputs[0].uses() if use.node.op_type != "Shape"]
    norm = uses[0].node if len(uses) == 1 else None
    if norm is None or norm.op_type != "BatchNormalization" or norm.attributes.get_int("training_mode", False):
        return None
    stored = all(v is not None and weight_tensor(v) is not None for v in norm.inputs[1:5])
    alone = not any(v.uses() or v.is_graph_output() for v in norm.outputs[1:])
    return norm if stored and alone and uses[0].idx == 0 and not norm.outputs[0].is_graph_output() else None


def _normed_product(node: ir.Node) -> _NormedProduct | None:
    """A product whose tokens are flattened, rows stay whole, for a norm of as many features."""
    weight = input_at(node, 1)
    matrix = None if weight is None else weight_tensor(weight)
    if node.op_type != "MatMul" or node.domain not in {"", "ai.onnx"} or matrix is None or len(matrix.shape) != 2:
        return None
    if not matrix.dtype.is_floating_point() or matrix.dtype.itemsize < 2:
        return None
    added, value, rank = None, node.outputs[0], 0
    while (reader := _only_reader(value)) is not None:
        if (norm := _norm_behind(value.producer())) is not None:
            channels = None if norm.inputs[1] is None else weight_tensor(norm.inputs[1])
            whole = channels is not None and channels.size == matrix.shape[1]
            return _NormedProduct(node, added, norm) if whole and rank == 2 else None
        if reader.op_type == "Add" and added is None and value is node.outputs[0]:
            other = next((v for v in reader.inputs if v is not value), None)
            numbers = None if other is None else weight_tensor(other)
            if numbers is None or tuple(numbers.shape) != (matrix.shape[1],):
                return None
            added = reader
        elif reader.op_type in {"Flatten", "Reshape"} and reader.inputs[0] is value:
            rank = 2 if reader.op_type == "Flatten" else _reshaped_rank(reader)
        else:
            return None
        value = reader.outputs[0]
    return None


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads elements of a value, not its shape alone."""
    readers = [use.node for use in value.uses() if use.node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _reshaped_rank(node: ir.Node) -> int:
    """How many axes a Reshape gives; 0 if nothing says so."""
    target, shape = input_at(node, 1), node.outputs[0].shape
    numbers = None if target is None else weight_tensor(target)
    if numbers is not None:
        return int(numbers.size)
    return 0 if shape is None else shape.rank()


def _fold(graph: ir.Graph, writer: NodeWriter, found: _NormedProduct) -> str:
    """The name of the product, whose matrix and bias now hold the norm's numbers."""
    node, weight = found.node, found.node.inputs[1]
    stored = None if weight is None else weight_tensor(weight)
    assert weight is not None and stored is not None and node.name is not None
    kind, product = stored.dtype.numpy(), node.outputs[0]
    before = 0.0 if found.added is None else _bias_of(found.added, product)
    factor, shift = _folded(found.norm, before)
    matrix = writer.constant((weight_numbers(weight) * factor).astype(kind), f"{weight.name}/normed")
    bias = writer.constant(shift.astype(kind), f"{weight.name}/added")
    node.replace_input_with(1, matrix)
    if found.added is None:
        nodes: list[ir.Node] = []
        total = writer.op(nodes, "Add", [product, bias], f"{node.name}/sum")
        total.type, total.shape = product.type, product.shape
        product.replace_all_uses_with(total)
        nodes[0].replace_input_with(0, product)
        graph.insert_after(node, nodes)
    else:
        found.added.replace_input_with(1 if found.added.inputs[0] is product else 0, bias)
    read, result = found.norm.inputs[0], found.norm.outputs[0]
    assert read is not None
    result.replace_all_uses_with(read)
    graph.remove(found.norm, safe=True)
    return node.name


def _bias_of(added: ir.Node, product: ir.Value) -> Array:
    other = next(v for v in added.inputs if v is not None and v is not product)
    return weight_numbers(other)


def _write(graph: ir.Graph, writer: NodeWriter, found: _Convolution) -> str:
    """The name of the product that takes a convolution's place."""
    node, (matrix, added) = found.node, found.matrix()
    x, kernel = (input_at(node, i) for i in (0, 1))
    assert x is not None and kernel is not None and node.name is not None
    stored = weight_tensor(kernel)
    assert stored is not None
    rank, kind = len(stored.shape), stored.dtype.numpy()
    nodes: list[ir.Node] = []
    flat = x if rank == 3 else writer.op(nodes, "Reshape", [x, writer.ints([0, 0, -1], f"{node.name}/flat_shape")],
                                         f"{node.name}/flat")  # fmt: skip
    rows = writer.op(nodes, "Transpose", [flat], f"{node.name}/rows", perm=[0, 2, 1])
    weight = writer.constant(np.ascontiguousarray(matrix).astype(kind), f"{kernel.name}/matrix")
    made = writer.op(nodes, "MatMul", [rows, weight], f"{node.name}/product")
    product = nodes[-1].name
    assert product is not None
    if added is not None:
        bias = input_at(node, 2)
        made = writer.op(nodes, "Add", [made, writer.constant(added.astype(kind), f"{(bias or kernel).name}/added")],
                         f"{node.name}/sum")  # fmt: skip
    result = writer.op(nodes, "Transpose", [made], f"{node.name}/channels", perm=[0, 2, 1])
    if rank > 3:
        result = _spread(writer, nodes, result, x, node.name)
    old = found.result
    graph.insert_before(node, nodes)
    result.type, result.shape = old.type, old.shape
    old.replace_all_uses_with(result)
    old.name, result.name = None, old.name
    if found.norm is not None:
        graph.remove(found.norm, safe=True)
    graph.remove(node, safe=True)
    return product


def _spread(writer: NodeWriter, nodes: list[ir.Node], flat: ir.Value, like: ir.Value, name: str) -> ir.Value:
    """[batch, channels, places] with places along axes of their own again, as in `like`."""
    shape = writer.op(nodes, "Shape", [like], f"{name}/shape")
    bounds = [writer.ints([n], f"{name}/places") for n in (2, np.iinfo(np.int32).max, 0)]
    places = writer.op(nodes, "Slice", [shape, *bounds], f"{name}/size")
    target = writer.op(nodes, "Concat", [writer.ints([0, -1], f"{name}/lead"), places], f"{name}/laid", axis=0)
    return writer.op(nodes, "Reshape", [flat, target], f"{name}/image")
