"""The mixture of experts as a model-local ONNX function over standard operators, valid at any opset from 12 on.

Tokens are gathered for each expert, and experts work one by one. Where experts choose, what they give is
added up by ScatterND from opset 16 on; before, every expert's answer to every token is looked up, zero where there is
none, and summed. Where tokens choose, each token looks up the answers to its own choices; where every choice is
served, an expert works on just those tokens that ask for it. TopK breaks ties by the lower index, by its definition.

Shape legend: N = G T tokens in G groups, E experts, C capacity, K selected experts, M = N K choices, n tokens of one
expert, H features, F features inside.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from codegen.ops.activation.onnx_body import activate
from codegen.ops.function_body import FunctionBody, computed_in
from codegen.render import identifier
from codegen.spec import MixtureOfExperts, Routing

DOMAIN = "rewriter.ops"

SCATTER_ADDS = 16
"""The opset from which ScatterND can add."""

AXES_ARE_INPUT = 13
"""The opset from which ReduceSum takes its axes as an input."""

Parameters = Mapping[str, ir.Value]


def function_name(spec: MixtureOfExperts) -> str:
    """Who chooses, the number of experts and a hash of the spec, whose numbers stand in the body."""
    return str(identifier("mixture", [spec.routing.value, spec.activation.value, f"e{spec.experts}"], spec))


def attributes(dtype: ir.DataType) -> list[ir.Attr]:
    """Attributes of a call: the ONNX numbers of x's dtype and of what its router computes in."""
    return [ir.AttrInt64("dtype", int(dtype)), ir.AttrInt64("compute", int(computed_in(dtype)))]


def stored_as(name: str, dtype: ir.DataType) -> ir.DataType:
    """The dtype in which a parameter is an input, for x of `dtype`: the router's stay wide."""
    return computed_in(dtype) if name.startswith("router") else dtype


def function(spec: MixtureOfExperts, opset: int) -> ir.Function:
    """Inputs x [B, S, H] and the parameters of `MixtureOfExperts.shapes` in order; the output is [B, S, H]."""
    body = _Body(opset)
    x = ir.Value(name="x_BSH")
    held = {name: ir.Value(name=name) for name in spec.shapes}
    flat = body.reshaped(x, [-1, spec.hidden], "tokens_NH")
    probabilities = _probabilities(body, spec, flat, held)
    by = _by_experts if spec.routing is Routing.EXPERTS_CHOOSE else _by_tokens
    mixed = (_all_served if spec.drops_nothing else by)(body, spec, flat, probabilities, held)
    if spec.bias:
        mixed = body.op("Add", [mixed, held["bias"]], "shifted_NH")
    output = body.op("Reshape", [mixed, body.op("Shape", [x], "shape")], "output_BSH")
    graph = ir.Graph([x, *held.values()], [output], nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("dtype", "compute")]
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared)


class _Body(FunctionBody):
    """With sizes that are numbers or values of shape [1]."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self.opset = opset

    def reshaped(self, value: ir.Value, sizes: list[int | ir.Value], name: str) -> ir.Value:
        return self.op("Reshape", [value, self.sizes(sizes)], name)

    def expanded(self, value: ir.Value, sizes: list[int | ir.Value], name: str) -> ir.Value:
        return self.op("Expand", [value, self.sizes(sizes)], name)

    def sizes(self, sizes: list[int | ir.Value]) -> ir.Value:
        return self.concat([s if isinstance(s, ir.Value) else self.ints([s]) for s in sizes])

    def turned(self, value: ir.Value, perm: list[int], name: str) -> ir.Value:
        return self.op("Transpose", [value], name, [ir.AttrInt64s("perm", perm)])

    def counted(self, size: ir.Value, name: str, start: ir.Value | None = None) -> ir.Value:
        """From 0, or `start`, up to `size`, which is left out; both of shape [1]."""
        first = self.scalar(0) if start is None else self.op("Squeeze", [start], "first")
        return self.op("Range", [first, self.op("Squeeze", [size], "limit"), self.scalar(1)], name)

    def product(self, a: ir.Value, b: ir.Value | int, name: str) -> ir.Value:
        return self.op("Mul", [a, b if isinstance(b, ir.Value) else self.ints([b])], name)

    def total(self, a: ir.Value, b: ir.Value | int, name: str) -> ir.Value:
        return self.op("Add", [a, b if isinstance(b, ir.Value) else self.ints([b])], name)

    def zeros(self, sizes: ir.Value, name: str, kind: type = np.int64) -> ir.Value:
        value = ir.AttrTensor("value", ir.tensor(np.zeros(1, kind)))
        return self.op("ConstantOfShape", [sizes], name, [value])

    def best(self, value: ir.Value, count: ir.Value, axis: int, name: str) -> tuple[ir.Value, ir.Value]:
        """The highest values along an axis, and where they stand."""
        node = ir.Node("", "TopK", [value, count], [ir.AttrInt64("axis", axis)], num_outputs=2)
        for output, kind in zip(node.outputs, ("values", "index"), strict=True):
            output.name = f"{name}_{kind}"
        self.nodes.append(node)
        return node.outputs[0], node.outputs[1]

    def summed(self, value: ir.Value, axis: int, name: str) -> ir.Value:
        keep = ir.AttrInt64("keepdims", 0)
        if self.opset >= AXES_ARE_INPUT:
            return self.op("ReduceSum", [value, self.ints([axis])], name, [keep])
        return self.op("ReduceSum", [value], name, [ir.AttrInt64s("axes", [axis]), keep])


class _Sizes:
    """N tokens, G groups, T tokens of a group, C capacity; [1] each."""

    def __init__(self, tokens: ir.Value, groups: ir.Value, group: ir.Value, capacity: ir.Value) -> None:
        self.tokens, self.groups, self.group, self.capacity = tokens, groups, group, capacity


def _sizes(body: _Body, spec: MixtureOfExperts, flat: ir.Value) -> _Sizes:
    tokens = body.take(body.op("Shape", [flat], "flat_shape"), [0])
    full = body.op("Div", [body.total(tokens, spec.group_limit - 1, "up"), body.ints([spec.group_limit])], "least")
    candidates = body.counted(body.total(tokens, 1, "end"), "candidates", start=full)
    divides = body.op("Equal", [body.op("Mod", [tokens, candidates], "rest"), body.ints([0])], "divides")
    viable = body.op("Where", [divides, candidates, tokens], "viable")
    groups = body.op("ReduceMin", [viable], "G", [ir.AttrInt64("keepdims", 1)])
    group = body.op("Div", [tokens, groups], "T")
    wide = body.op("Cast", [group], "T_double", [ir.AttrInt64("to", int(ir.DataType.DOUBLE))])
    share = body.op("Mul", [_double(body, spec.capacity_factor), wide], "share")
    rounded = body.op("Round", [body.op("Div", [share, _double(body, spec.experts)], "room")], "rounded")
    whole = body.op("Cast", [rounded], "whole", [ir.AttrInt64("to", int(ir.DataType.INT64))])
    least = body.op("Max", [whole, body.ints([spec.min_capacity])], "at_least")
    return _Sizes(tokens, groups, group, body.op("Min", [least, group], "C"))


def _double(body: _Body, number: float) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.float64))
    return body.op("Constant", [], "number", [ir.AttrTensor("value", tensor)])


def _probabilities(body: _Body, spec: MixtureOfExperts, flat: ir.Value, held: Parameters) -> ir.Value:
    """[N, E], in what the router computes in."""
    logits = body.op("MatMul", [body.cast(flat, "compute", "wide_NH"), held["router_weight"]], "products_NE")
    if spec.router_bias:
        logits = body.op("Add", [logits, held["router_bias"]], "logits_NE")
    return body.op("Softmax", [logits], "probabilities_NE", [ir.AttrInt64("axis", 1)])


def _in_groups(body: _Body, spec: MixtureOfExperts, probabilities: ir.Value, sizes: _Sizes) -> ir.Value:
    return body.reshaped(probabilities, [sizes.groups, sizes.group, spec.experts], "probabilities_GTE")


# ------------------------------------------------------------ experts choose


def _by_experts(
    body: _Body, spec: MixtureOfExperts, flat: ir.Value, probabilities: ir.Value, held: Parameters
) -> ir.Value:
    """[N, H]"""
    sizes = _sizes(body, spec, flat)
    probabilities = _in_groups(body, spec, probabilities, sizes)
    turned = body.turned(probabilities, [0, 2, 1], "probabilities_GET")
    gates, index = body.best(turned, sizes.capacity, 2, "chosen_GEC")
    start = body.product(body.reshaped(body.counted(sizes.groups, "groups"), [-1, 1, 1], "g_G11"), sizes.group, "start")
    index = body.turned(body.total(index, start, "rows_GEC"), [1, 0, 2], "rows_EGC")
    rows = body.reshaped(index, [spec.experts, -1], "rows_En")  # n = G C
    worked = _experts(body, spec, body.op("Gather", [flat, rows], "given_EnH"), held)
    gates = body.reshaped(body.turned(gates, [1, 0, 2], "gates_EGC"), [spec.experts, -1, 1], "gates_En1")
    weighted = body.op("Mul", [worked, body.cast(gates, "dtype", "gates_En1")], "weighted_EnH")
    if body.opset >= SCATTER_ADDS:
        return _added(body, spec, flat, rows, weighted)
    return _looked_up(body, spec, rows, weighted, sizes)


def _added(body: _Body, spec: MixtureOfExperts, flat: ir.Value, rows: ir.Value, weighted: ir.Value) -> ir.Value:
    zeros = body.zeros(body.op("Shape", [flat], "flat_shape"), "zeros_NH", np.float32)
    places = body.reshaped(rows, [-1, 1], "places_n1")
    updates = body.cast(body.reshaped(weighted, [-1, spec.hidden], "updates_nH"), "compute", "updates_nH")
    start = body.cast(zeros, "compute", "zeros_NH")  # onnxruntime adds no halves on CPUs
    mixed = body.op("ScatterND", [start, places, updates], "mixed_NH", [ir.AttrString("reduction", "add")])
    return body.cast(mixed, "dtype", "mixed_NH")


def _looked_up(body: _Body, spec: MixtureOfExperts, rows: ir.Value, weighted: ir.Value, sizes: _Sizes) -> ir.Value:
    """Each expert's answer to each token, behind whose answers stands a row of zeros for tokens that it left."""
    count = body.product(sizes.groups, sizes.capacity, "n")
    numbers = body.expanded(body.counted(count, "numbers"), [spec.experts, count], "numbers_En")
    none = body.total(body.zeros(body.sizes([spec.experts, sizes.tokens]), "zeros_EN"), count, "none_EN")
    answers = body.op("ScatterElements", [none, rows, numbers], "answers_EN", [ir.AttrInt64("axis", 1)])
    row = body.zeros(body.sizes([spec.experts, 1, spec.hidden]), "zeros_E1H", np.float32)
    both = [weighted, body.cast(row, "dtype", "zeros_E1H")]
    padded = body.op("Concat", both, "padded_EmH", [ir.AttrInt64("axis", 1)])  # m = n + 1
    expert = body.reshaped(body.counted(body.ints([spec.experts]), "experts"), [-1, 1], "e_E1")
    start = body.product(expert, body.total(count, 1, "m"), "start_E1")
    places = body.total(answers, start, "places_EN")
    looked = body.op("Gather", [body.reshaped(padded, [-1, spec.hidden], "padded"), places], "answers_ENH")
    return body.summed(looked, 0, "mixed_NH")


# ------------------------------------------------------------ tokens choose


def _by_tokens(
    body: _Body, spec: MixtureOfExperts, flat: ir.Value, probabilities: ir.Value, held: Parameters
) -> ir.Value:
    """[N, H]"""
    sizes = _sizes(body, spec, flat)
    probabilities = _in_groups(body, spec, probabilities, sizes)
    gates, choices = body.best(probabilities, body.ints([spec.selected]), 2, "asked_GTK")
    first = body.op("Gather", [gates, body.scalar(0)], "best_GT", [ir.AttrInt64("axis", 2)])
    gates, choices = body.turned(gates, [0, 2, 1], "gates_GKT"), body.turned(choices, [0, 2, 1], "choices_GKT")
    place = _places(body, spec, first, choices, sizes)
    kept = body.op("Less", [place, sizes.capacity], "kept_GKT")
    slots = _slots(body, spec, choices, place, kept, sizes)
    rows = _rows(body, spec, slots, kept, sizes)
    worked = _experts(body, spec, body.op("Gather", [flat, rows], "given_EnH"), held)
    answers = body.op("Gather", [body.reshaped(worked, [-1, spec.hidden], "worked"), slots], "answers_GKTH")
    gates = body.cast(body.reshaped(gates, [sizes.groups, spec.selected, -1, 1], "gates_GKT1"), "dtype", "gates_GKT1")
    kept = body.reshaped(kept, [sizes.groups, spec.selected, -1, 1], "kept_GKT1")
    zero = body.cast(body.zeros(body.ints([1]), "zero", np.float32), "dtype", "zero")
    weighted = body.op("Where", [kept, body.op("Mul", [answers, gates], "weighted"), zero], "weighted_GKTH")
    return body.reshaped(body.summed(weighted, 1, "mixed_GTH"), [-1, spec.hidden], "mixed_NH")


def _places(body: _Body, spec: MixtureOfExperts, best: ir.Value, choices: ir.Value, sizes: _Sizes) -> ir.Value:
    """[G, K, T]: how many choices of the same expert are served before."""
    last = ir.AttrInt64("axis", 2)
    _, order = body.best(best, sizes.group, 1, "served_GT")
    order = body.reshaped(order, [sizes.groups, 1, sizes.group], "order_G1T")
    order = body.expanded(order, [sizes.groups, spec.selected, sizes.group], "order_GKT")
    ranked = body.op("GatherElements", [choices, order], "ranked_GKT", [last])
    column = body.reshaped(ranked, [sizes.groups, -1, 1], "ranked_Gm1")  # m = K T
    same = body.op("Equal", [column, body.counted(body.ints([spec.experts]), "experts")], "same_GmE")
    counted = body.op("Cast", [same], "counted_GmE", [ir.AttrInt64("to", int(ir.DataType.INT64))])
    running = body.op("CumSum", [counted, body.scalar(1)], "running_GmE")
    before = body.op("Mul", [body.op("Sub", [running, body.ints([1])], "others"), counted], "before_GmE")
    before = body.reshaped(body.summed(before, 2, "before_Gm"), [sizes.groups, spec.selected, -1], "before_GKT")
    zeros = body.zeros(body.op("Shape", [choices], "choices_shape"), "zeros_GKT")
    return body.op("ScatterElements", [zeros, order, before], "place_GKT", [last])


def _slots(
    body: _Body, spec: MixtureOfExperts, choices: ir.Value, place: ir.Value, kept: ir.Value, sizes: _Sizes
) -> ir.Value:
    """[G, K, T]: the row of the experts' answers, E blocks of G C, in which a choice is answered; 0 if it is not."""
    block = body.product(sizes.groups, sizes.capacity, "n")
    group = body.reshaped(body.counted(sizes.groups, "groups"), [-1, 1, 1], "g_G11")
    start = body.total(body.product(choices, block, "block_GKT"), body.product(group, sizes.capacity, "part"), "start")
    return body.op("Where", [kept, body.total(start, place, "slot_GKT"), body.ints([0])], "slots_GKT")


def _rows(body: _Body, spec: MixtureOfExperts, slots: ir.Value, kept: ir.Value, sizes: _Sizes) -> ir.Value:
    """[E, G C]: the token that each row of an expert works on; the first one where it has room left.

    Choices that found no room are written behind the end, each to a place of its own, and cut off.
    """
    size = body.product(body.product(sizes.groups, sizes.capacity, "n"), spec.experts, "size")
    choices = body.product(sizes.tokens, spec.selected, "choices")
    shape: list[int | ir.Value] = [sizes.groups, spec.selected, sizes.group]
    spare = body.reshaped(body.total(body.counted(choices, "numbers"), size, "behind"), shape, "spare_GKT")
    places = body.reshaped(body.op("Where", [kept, slots, spare], "places_GKT"), [-1], "places")
    token = body.reshaped(body.counted(sizes.tokens, "tokens"), [sizes.groups, 1, sizes.group], "tokens_G1T")
    tokens = body.reshaped(body.expanded(token, shape, "tokens_GKT"), [-1], "tokens")
    zeros = body.zeros(body.total(size, choices, "length"), "zeros")
    rows = body.op("ScatterElements", [zeros, places, tokens], "rows", [ir.AttrInt64("axis", 0)])
    rows = body.op("Slice", [rows, body.ints([0]), size], "rows")
    return body.reshaped(rows, [spec.experts, -1], "rows_En")


def _all_served(
    body: _Body, spec: MixtureOfExperts, flat: ir.Value, probabilities: ir.Value, held: Parameters
) -> ir.Value:
    """[N, H]"""
    gates, choices = body.best(probabilities, body.ints([spec.selected]), 1, "asked_NK")
    asked = body.reshaped(choices, [-1], "asked_M")
    places = [_places_of(body, asked, expert) for expert in range(spec.experts)]
    rows = [body.op("Div", [place, body.ints([spec.selected])], "rows_n") for place in places]
    given = [body.op("Gather", [flat, row], "given_nH") for row in rows]
    first = ir.AttrInt64("axis", 0)
    worked = [_worked(body, spec, tokens, held, expert) for expert, tokens in enumerate(given)]
    order = body.op("Concat", places, "order_M", [first])
    count = body.op("Shape", [asked], "M")
    numbers = [body.zeros(count, "zeros_M"), order, body.counted(count, "numbers_M")]
    answered = body.op("ScatterElements", numbers, "answered_M", [first])
    answers = body.op("Gather", [body.op("Concat", worked, "worked_MH", [first]), answered], "answers_MH")
    answers = body.reshaped(answers, [-1, spec.selected, spec.hidden], "answers_NKH")
    gates = body.cast(body.reshaped(gates, [-1, 1, spec.selected], "gates_N1K"), "dtype", "gates_N1K")
    return body.reshaped(body.op("MatMul", [gates, answers], "mixed_N1H"), [-1, spec.hidden], "mixed_NH")


def _places_of(body: _Body, asked: ir.Value, expert: int) -> ir.Value:
    """[n]: which of all choices are this expert, in order."""
    asks = body.op("Equal", [asked, body.ints([expert])], "asks_M")
    return body.reshaped(body.op("NonZero", [asks], "places_1n"), [-1], "places_n")


# ------------------------------------------------------------ experts


def _experts(body: _Body, spec: MixtureOfExperts, x: ir.Value, held: Parameters) -> ir.Value:
    """[E, n, H] of x [E, n, H]: one by one, since onnxruntime prepares constant matrices of two axes, not batches."""
    rows = [_expert(body, spec, x, held, expert) for expert in range(spec.experts)]
    worked = body.op("Concat", rows, "worked_mH", [ir.AttrInt64("axis", 0)])  # m = E n
    return body.reshaped(worked, [spec.experts, -1, spec.hidden], "worked_EnH")


def _expert(body: _Body, spec: MixtureOfExperts, x: ir.Value, held: Parameters, expert: int) -> ir.Value:
    """[n, H]"""
    return _worked(body, spec, body.op("Gather", [x, body.scalar(expert)], "given_nH"), held, expert)


def _worked(body: _Body, spec: MixtureOfExperts, given: ir.Value, held: Parameters, expert: int) -> ir.Value:
    """[n, H] of one expert's tokens [n, H]."""

    def of(value: ir.Value, name: str) -> ir.Value:
        return body.op("Gather", [value, body.scalar(expert)], name)

    def projected(name: str, given: ir.Value) -> ir.Value:
        product = body.op("MatMul", [given, of(held[f"{name}_weight"], f"{name}_matrix")], f"{name}_products")
        if f"{name}_bias" not in held:
            return product
        return body.op("Add", [product, of(held[f"{name}_bias"], f"{name}_vector")], name)

    up = projected("up", given)
    if spec.gated:
        gate = activate(body, spec.activation, projected("gate", given), "activated_nF")
        return projected("down", body.op("Mul", [gate, up], "inner_nF"))
    return projected("down", activate(body, spec.activation, up, "activated_nF"))
