"""Where feed-forward blocks may be: pairs of projections with nothing but local steps between, inside a residual.

Found on the graph alone, before any value is recorded; `passes/match/feed_forward.py` then proves each on a recording.
Silent on what nobody would call a feed-forward block: heads whose output is of another width, adapters with fewer
hidden features than outputs, projections without a residual connection around them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from passes.dataflow import LAYOUT, Flow, Node, Value, unflattened
from passes.operator_kinds import CHOOSERS, NORMS, PASS_THROUGH
from passes.whole_projection import projection_at

MIXTURES = frozenset(
    {
        "MixtureOfExperts", "com.microsoft.MoE", "com.microsoft.QMoE",
        "aten.grouped_mm", "aten._grouped_mm", "aten.grouped_mm_fallback",
    }
)  # fmt: skip
"""Operators that are a mixture of experts, or the products in one."""

_ENOUGH = 64
"""Nodes that are looked at on one walk; blocks in use have a few dozen at most, a norm written out included."""

_STATISTICS = NORMS | {"BatchNormalization", "InstanceNormalization", "aten.mean", "aten.var", "aten.var_mean"}
_ADDING = frozenset({"Add", "com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization"})
"""Operators that add their first two inputs, whatever they do to the sum."""

_MIXING = frozenset({"Softmax", "Attention", "MultiHeadAttention", "GroupedQueryAttention", "Scan", "Loop", "If"})


@dataclass(frozen=True)
class Block:
    """A candidate.

    Attributes:
        down: index of the output projection's contraction.
        projections: indices of the contractions that read the hidden states, one or two.
        sources: their complete outputs (bias included), in the same order.
        inner: indices of the nodes between the sources and `down`.
        hidden: what `down` reads.
        output: the block's result, bias included.
        input: the hidden states.
        residual: what is added to the result; None for a program that is nothing but the block.
        obstacle: why it cannot be described, though it looks like a block; None if nothing is known against it.
    """

    down: int
    projections: tuple[int, ...]
    sources: tuple[Value, ...]
    inner: tuple[int, ...]
    hidden: Value
    output: Value
    input: Value
    residual: Value | None
    obstacle: str | None = None


def blocks(flow: Flow) -> list[Block]:
    """All candidates, in execution order."""
    return [block for node in flow.nodes if (block := _block(flow, node)) is not None]


def recorded_values(flow: Flow) -> set[Value]:
    """The values that a recording must hold so that every candidate can be proved: inputs, outputs and shapes."""
    wanted: set[Value] = set()
    for block in blocks(flow):
        if block.obstacle is None:
            given = {flow.nodes[i].inputs[0] for i in block.projections}
            wanted.update(given, *(unflattened(flow, v) for v in given))
            wanted.add(block.output)
            wanted.update(v for i in block.inner for v in flow.nodes[i].inputs if v and not flow.is_fed(v))
    return {v for v in wanted if not flow.is_constant(v)}


def _block(flow: Flow, down: Node) -> Block | None:
    operands = flow.projection_operands(down)
    if operands is None:
        return None
    hidden, width = _sizes(flow, down, operands[1])
    if hidden < max(width, 1):
        return None
    inside = _between(flow, down.inputs[operands[0]])
    if inside is None:
        return None
    inner, sources = inside
    if down.op == "Conv" and (len(flow.shape(down.inputs[1])) > 3 and not _is_pointwise(flow, down, inner)):
        return None
    projections = [found[0] for v in sources if (found := projection_at(flow, v)) is not None]
    if any(_sizes(flow, p, _weight_position(flow, p))[0] != width for p in projections):
        return None
    inputs = [_unshaped(flow, p.inputs[1 - _weight_position(flow, p)]) for p in projections]
    if len(set(inputs)) != 1 or all(n.op in PASS_THROUGH | LAYOUT for n in inner):
        return None
    output = _complete(flow, down)
    around = _residual(flow, inputs[0], output)
    if around.value is None and not _is_all(flow, inputs[0], output):
        return None
    return Block(
        down.index,
        tuple(p.index for p in projections),
        tuple(sources),
        tuple(n.index for n in inner),
        down.inputs[operands[0]],
        output,
        inputs[0],
        around.value,
        _obstacle(flow, [*projections, down], inner, sources, inputs[0]) or _weighed(flow, around.factors),
    )


def _is_pointwise(flow: Flow, down: Node, inner: list[Node]) -> bool:
    """Whether a convolution over images looks at one pixel at a time, as do the steps above it."""
    return set(flow.shape(down.inputs[1])[2:]) == {1} and all(n.op != "Conv" for n in inner)


def _weight_position(flow: Flow, node: Node) -> int:
    operands = flow.projection_operands(node)
    assert operands is not None
    return operands[1]


def _sizes(flow: Flow, node: Node, weight: int) -> tuple[int, int]:
    """(features in, features out) of a contraction; 0 where the weight is packed into one axis."""
    shape = flow.shape(node.inputs[weight])
    if len(shape) < 2:
        return 0, 0
    if node.op in {"Linear", "Conv"} or node.attrs.get("transB", 0):
        return shape[1], shape[0]
    return (shape[-2], shape[-1]) if weight == 1 or node.op == "QLinearMatMul" else (shape[-1], shape[-2])


def _between(flow: Flow, hidden: Value) -> tuple[list[Node], list[Value]] | None:
    """Nodes above `hidden` up to the projections that feed it, and these projections' outputs.

    None where something else feeds it: an attention, an input, more than two projections.
    """
    inner: dict[int, Node] = {}
    sources: dict[Value, None] = {}
    todo = deque([hidden])
    while todo:
        value = todo.popleft()
        if not value or not flow.is_fed(value) or value in sources:
            continue
        if projection_at(flow, value) is not None:
            sources[value] = None
            if len(sources) > 2:
                return None
            continue
        node = flow.producer(value)
        if node is None or node.op in _MIXING or (flow.projection_operands(node) is None and _contracts(node)):
            return None
        if node.index not in inner:
            inner[node.index] = node
            if len(inner) > _ENOUGH:
                return None
            todo.extend(node.inputs)
    if not sources:
        return None
    order = sorted(sources, key=lambda v: n.index if (n := flow.producer(v)) is not None else -1)
    return [inner[i] for i in sorted(inner)], order


def _contracts(node: Node) -> bool:
    return node.op in {"MatMul", "Gemm", "Einsum", "FusedMatMul", "Baddbmm"}


def _complete(flow: Flow, node: Node) -> Value:
    """A contraction's result, bias included."""
    output = node.outputs[0]
    if projection_at(flow, output) is not None:
        return output
    below = [reader for value in _rounded(flow, output) for reader in flow.readers(value)]
    biased = next((r.outputs[0] for r in below if projection_at(flow, r.outputs[0]) is not None), None)
    return output if biased is None else biased


def _rounded(flow: Flow, value: Value) -> Iterator[Value]:
    yield value
    for reader in flow.readers(value):
        if reader.op in {"QuantizeLinear", "DequantizeLinear"}:
            yield from _rounded(flow, reader.outputs[0])


def _unshaped(flow: Flow, value: Value) -> Value:
    """What a projection's input was before its tokens were flattened."""
    while (node := flow.producer(value)) is not None and node.op in PASS_THROUGH | {"Reshape", "Flatten"}:
        value = node.inputs[0]
    return value


def _is_all(flow: Flow, source: Value, output: Value) -> bool:
    """Whether the program is the block and no more."""
    if source not in flow.inputs:
        return False
    while readers := flow.readers(output):
        if len(readers) != 1 or readers[0].op not in PASS_THROUGH | {"Reshape"}:
            return False
        output = readers[0].outputs[0]
    return output in flow.outputs


@dataclass(frozen=True)
class _Way:
    """From a block's output down to where the residual connection joins it.

    Attributes:
        value: what is added there, and what the block's input is or was made of; None if there is no such place.
        factors: what the output is multiplied with on the way.
    """

    value: Value | None
    factors: tuple[Value, ...]


def _residual(flow: Flow, source: Value, output: Value) -> _Way:
    above = _above(flow, source)
    seen, todo = {output}, deque([output])
    factors: list[Value] = []
    while todo and len(seen) <= _ENOUGH:
        value = todo.popleft()
        for reader in flow.readers(value):
            others = [v for v in reader.inputs if v != value]
            if (added := _added(reader, value)) is not None and (joined := _addend(flow, added, above)) is not None:
                return _Way(joined, tuple(factors))
            if reader.op == "Mul" or _contracts(reader):
                factors += [v for v in others if flow.data_dependent(v)]
            if flow.projection_operands(reader) is None and _keeps_features(flow, reader):
                for after in reader.outputs:
                    if after and after not in seen:
                        seen.add(after)
                        todo.append(after)
    return _Way(None, ())


def _added(node: Node, value: Value) -> Value | None:
    """What a node adds to `value`; None if it does not."""
    both = node.inputs[:2]
    return both[1 - both.index(value)] if node.op in _ADDING and value in both and len(set(both)) == 2 else None


def _addend(flow: Flow, value: Value, above: set[Value]) -> Value | None:
    """`value`, or one of those it is the sum of, that lies in `above`: parallel blocks are added up in any order."""
    if value in above:
        return value
    node = flow.producer(value)
    if node is None or node.op != "Add":
        return None
    return next((v for v in node.inputs if v in above), None)


def _weighed(flow: Flow, factors: tuple[Value, ...]) -> str | None:
    made_of = (flow.producer(v) for factor in factors for v in _above(flow, factor))
    if any(n is not None and n.op in {"Softmax", "TopK"} for n in made_of):
        return "it is an expert of a mixture: a router weighs what it gives"
    return None


def _above(flow: Flow, value: Value) -> set[Value]:
    """`value` and what it is made of, up to projections, nearest first and not beyond what one walk may see."""
    seen, todo = {value}, deque([value])
    while todo and len(seen) <= _ENOUGH:
        node = flow.producer(todo.popleft())
        if node is None or _contracts(node) or flow.projection_operands(node) is not None:
            continue
        if not _keeps_features(flow, node):
            continue
        for before in node.inputs:
            if before and before not in seen and flow.is_fed(before):
                seen.add(before)
                todo.append(before)
    return seen


def _keeps_features(flow: Flow, node: Node) -> bool:
    """False for a transposition that moves the last axis: a block over tokens is not one over features."""
    if node.op != "Transpose":
        return True
    perm = node.attrs.get("perm")
    if perm is not None:
        return bool(perm[-1] == len(perm) - 1)
    try:
        return flow.shape(node.inputs[0])[-1] == flow.shape(node.outputs[0])[-1]
    except KeyError:
        return False


def _obstacle(
    flow: Flow, projections: list[Node], inner: list[Node], sources: list[Value], source: Value
) -> str | None:
    """What speaks against a block that has the form of one."""
    if any(n.op == "Conv" for n in projections):
        return "its projections are convolutions"
    if any(len(flow.shape(n.inputs[_weight_position(flow, n)])) > 2 for n in projections):
        return "it is a mixture of experts already: its weights have an axis of experts"
    if _is_routed(flow, source):
        return "it is an expert of a mixture: a router chooses the tokens that it reads"
    if any(_weight_position(flow, n) == 0 for n in projections):
        return "a weight stands on the left of its product"
    for node in projections:
        if node.op in {"Einsum", "QLinearMatMul"} or (node.op == "FusedMatMul" and node.attrs.keys() - {"transB"}):
            return f"its projections are written as {node.op}"
    norm = next((n for n in inner if n.op in _STATISTICS or n.op.startswith("Reduce")), None)
    if norm is not None:
        return "a norm stands between its projections"
    if any(n.op == "Conv" for n in inner):
        return "a convolution over tokens stands between its projections"
    return _read_elsewhere(flow, projections[-1], inner, sources)


def _is_routed(flow: Flow, value: Value) -> bool:
    while (node := flow.producer(value)) is not None and node.op in LAYOUT | PASS_THROUGH:
        choosers = (node.inputs[p] for p in CHOOSERS.get(node.op, ()) if p < len(node.inputs))
        if any(flow.data_dependent(v) for v in choosers):
            return True
        value = node.inputs[0]
    return False


def _read_elsewhere(flow: Flow, down: Node, inner: list[Node], sources: list[Value]) -> str | None:
    own = {n.index for n in inner} | {down.index}
    values = [*sources, *(v for n in inner for v in n.outputs if v)]
    if any(v in flow.outputs for v in values) or any(r.index not in own for v in values for r in flow.live_readers(v)):
        return "its hidden layer is read outside of it too"
    return None


def mixtures(flow: Flow) -> list[Node]:
    """Operators that are mixtures of experts already."""
    return [n for n in flow.nodes if n.op in MIXTURES]
