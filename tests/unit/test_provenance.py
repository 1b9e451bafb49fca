"""Affine forms: whatever layout operators a program chains, a form must denote exactly what the program computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from passes.dataflow import Flow
from passes.forms import Form, Opaque
from passes.match.attention import Matches, find_attention
from passes.provenance import Tracer
from rewriter.capture import onnx_file, onnx_load, torch_export

BATCH, TOKENS, WIDTH, FEATURES = 2, 3, 5, 8


def check(flow: Flow, value: str) -> tuple[Form, Tracer]:
    """Trace `value` and compare what its form denotes with what was recorded."""
    tracer = Tracer(flow)
    form = tracer.trace(value)
    recorded = np.asarray(flow.value(value), dtype=np.float64)
    denoted = form.evaluate(flow, tracer.sources)
    assert denoted.shape == recorded.shape
    np.testing.assert_allclose(denoted, recorded, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(recorded).max())))
    return form, tracer


# ------------------------------------------------------------------ random chains in ONNX


@dataclass
class Chain:
    """An ONNX graph that grows by one operator at a time; `shape` is the shape of `value`."""

    data: Any
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    value: str = "x"
    shape: tuple[int, ...] = (BATCH, TOKENS, WIDTH)
    numbers: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def rank(self) -> int:
        return len(self.shape)

    def constant(self, array: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def noise(self, shape: tuple[int, ...]) -> str:
        return self.constant(self.numbers.standard_normal(shape) + 3, np.float32)

    def add(
        self, op: str, inputs: list[str], shape: tuple[int, ...], outputs: int = 1, pick: int = 0, **attrs: Any
    ) -> None:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, **attrs))
        self.value, self.shape = names[pick], shape

    def draw(self, low: int, high: int) -> int:
        return int(self.data.draw(st.integers(low, high)))

    def axis(self) -> int:
        return self.draw(0, self.rank - 1)

    def model(self) -> onnx.ModelProto:
        nodes = [*self.nodes, helper.make_node("Softmax", [self.value], ["y"])]
        graph = helper.make_graph(
            nodes,
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [BATCH, TOKENS, WIDTH])],
            [onnx.ValueInfoProto(name="y")],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def project(c: Chain) -> None:
    weight = c.constant(np.random.default_rng(1).standard_normal((WIDTH, FEATURES)), np.float32)
    c.add("MatMul", ["x", weight], (BATCH, TOKENS, FEATURES))
    if c.data.draw(st.booleans()):
        c.add("Add", [c.value, c.noise((FEATURES,))], c.shape)


def reshape(c: Chain) -> None:
    size = int(np.prod(c.shape))
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    first = c.data.draw(st.sampled_from(divisors))
    second = c.data.draw(st.sampled_from([d for d in divisors if (size // first) % d == 0]))
    shape = (first, second, size // first // second)
    c.add("Reshape", [c.value, c.constant([-1, *shape[1:]])], shape)


def transpose(c: Chain) -> None:
    perm = c.data.draw(st.permutations(range(c.rank)))
    c.add("Transpose", [c.value], tuple(c.shape[p] for p in perm), perm=perm)


def slice_(c: Chain) -> None:
    axis = c.axis()
    start = c.draw(0, c.shape[axis] - 1)
    end = c.draw(start + 1, c.shape[axis])
    shape = resized(c.shape, axis, end - start)
    c.add("Slice", [c.value, *(c.constant([v]) for v in (start, end, axis))], shape)


def reverse(c: Chain) -> None:
    axis = c.axis()
    c.add("Slice", [c.value, *(c.constant([v]) for v in (-1, -(2**63), axis, -1))], c.shape)


def split(c: Chain) -> None:
    axis = c.axis()
    cut = c.draw(0, c.shape[axis] - 1)
    sizes = [cut, c.shape[axis] - cut]
    c.add("Split", [c.value, c.constant(sizes)], resized(c.shape, axis, sizes[1]), outputs=2, pick=1, axis=axis)


def concat_with_itself(c: Chain) -> None:
    axis = c.axis()
    c.add("Concat", [c.value, c.value], resized(c.shape, axis, 2 * c.shape[axis]), axis=axis)


def concat_with_constants(c: Chain) -> None:
    axis = c.axis()
    extra = c.noise(resized(c.shape, axis, 2))
    c.add("Concat", [extra, c.value], resized(c.shape, axis, 2 + c.shape[axis]), axis=axis)


def rotate_half(c: Chain) -> None:
    axis = c.axis()
    half = c.shape[axis] // 2
    whole, shape = c.value, c.shape
    if not half:
        return
    c.add("Slice", [whole, *(c.constant([v]) for v in (0, half, axis))], resized(shape, axis, half))
    front = c.value
    c.add("Slice", [whole, *(c.constant([v]) for v in (half, 2**62, axis))], resized(shape, axis, shape[axis] - half))
    c.add("Neg", [c.value], c.shape)
    c.add("Concat", [c.value, front], shape, axis=axis)


def gather(c: Chain) -> None:
    axis = c.axis()
    index = [c.draw(-c.shape[axis], c.shape[axis] - 1) for _ in range(c.draw(1, 4))]
    c.add("Gather", [c.value, c.constant(index)], resized(c.shape, axis, len(index)), axis=axis)


def select(c: Chain) -> None:
    axis = c.axis()
    if c.rank > 1:
        index = c.constant(c.draw(0, c.shape[axis] - 1))
        c.add("Gather", [c.value, index], (*c.shape[:axis], *c.shape[axis + 1 :]), axis=axis)


def expand(c: Chain) -> None:
    axis, repeats = c.axis(), c.draw(1, 3)
    shape = (*c.shape[:axis], 1, *c.shape[axis:])
    c.add("Unsqueeze", [c.value, c.constant([axis])], shape)
    wanted = resized(c.shape, axis, repeats)
    c.add("Expand", [c.value, c.constant(wanted)], wanted)


def tile(c: Chain) -> None:
    axis = c.axis()
    repeats = [2 if a == axis else 1 for a in range(c.rank)]
    c.add("Tile", [c.value, c.constant(repeats)], resized(c.shape, axis, 2 * c.shape[axis]))


def pad(c: Chain) -> None:
    axis = c.axis()
    pads = [0] * 2 * c.rank
    pads[axis], pads[c.rank + axis] = 1, 2
    c.add("Pad", [c.value, c.constant(pads)], resized(c.shape, axis, c.shape[axis] + 3))


def scale(c: Chain) -> None:
    op = c.data.draw(st.sampled_from(["Mul", "Div"]))
    c.add(op, [c.value, c.noise((c.shape[-1],))], c.shape)


def shift(c: Chain) -> None:
    other, flip = c.noise(c.shape), c.data.draw(st.booleans())
    op = c.data.draw(st.sampled_from(["Add", "Sub"]))
    c.add(op, [other, c.value] if flip else [c.value, other], c.shape)


def where(c: Chain) -> None:
    condition = c.constant(c.numbers.random(c.shape) > 0.3, np.bool_)
    c.add("Where", [condition, c.value, c.noise(())], c.shape)


def add_to_itself_turned(c: Chain) -> None:
    """Two terms of one source, as in a rotation."""
    whole, shape = c.value, c.shape
    reverse(c)
    c.add("Mul", [c.value, c.noise((shape[-1],))], shape)
    c.add("Add", [whole, c.value], shape)


def scatter(c: Chain) -> None:
    rows = c.draw(1, c.shape[0])
    updates = c.noise((rows, *c.shape[1:]))
    c.add("ScatterND", [c.value, c.constant([[r] for r in range(rows)]), updates], c.shape)


def trilu(c: Chain) -> None:
    if c.rank >= 2:
        c.add("Trilu", [c.value, c.constant(c.draw(-2, 2))], c.shape, upper=int(c.data.draw(st.booleans())))


STEPS: list[Callable[[Chain], None]] = [
    reshape, transpose, slice_, reverse, split, concat_with_itself, concat_with_constants, rotate_half, gather, select,
    expand, tile, pad, scale, shift, where, add_to_itself_turned, scatter, trilu,
]  # fmt: skip
LARGEST = 600


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_a_form_denotes_what_a_chain_of_operators_computed(data: st.DataObject) -> None:
    chain = Chain(data)
    project(chain)
    doublings = 0
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=7)):
        doublings += step is add_to_itself_turned
        if np.prod(chain.shape) < LARGEST and chain.rank < 6 and doublings < 4:
            step(chain)
    flow = onnx_file.capture(onnx_load.from_proto(chain.model())).flow
    form, tracer = check(flow, chain.value)
    assert [source.kind for source in tracer.sources] == ["projection"]
    assert form.shape == chain.shape


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_step_alone(step: Callable[[Chain], None]) -> None:
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        chain = Chain(data)
        project(chain)
        step(chain)
        check(onnx_file.capture(onnx_load.from_proto(chain.model())).flow, chain.value)

    run()


# ------------------------------------------------------------------ idioms in torch


class Traced(nn.Module):
    """A projection and what is done with it; the last operator's result is the program's output."""

    def __init__(self, body: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, FEATURES, bias=bias)
        self.gate = nn.Linear(WIDTH, FEATURES)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.linear(x))


def torch_flow(module: nn.Module, x: Tensor | None = None) -> Flow:
    if x is None:
        x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch_export.capture(module, (x,), {}).flow


KEEP = torch.tensor([True, True, False, True, False, True, True, True])
ORDER = torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])
IDIOMS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads": lambda y: y.view(BATCH, TOKENS, 2, 4).transpose(1, 2),
    "chunk": lambda y: y.chunk(2, dim=-1)[1],
    "split": lambda y: torch.split(y, [3, 5], dim=-1)[1],
    "unbind": lambda y: y.reshape(BATCH, TOKENS, 2, 4).unbind(2)[1],
    "select": lambda y: y[:, -1],
    "slice with a step": lambda y: y[..., 1::2],
    "stack and flatten": lambda y: torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2),
    "rotate half": lambda y: torch.cat([-y[..., 4:], y[..., :4]], -1),
    "index": lambda y: y[..., ORDER],
    "index_select": lambda y: y.index_select(-1, ORDER),
    "gather": lambda y: y.gather(-1, ORDER.expand(BATCH, TOKENS, FEATURES)),
    "boolean index": lambda y: y[..., KEEP],
    "expand": lambda y: y[:, None].expand(BATCH, 3, TOKENS, FEATURES).reshape(BATCH * 3, TOKENS, FEATURES),
    "repeat": lambda y: y.repeat(1, 2, 1),
    "repeat_interleave": lambda y: y.repeat_interleave(2, dim=1),
    "roll": lambda y: y.roll(2, dims=-1),
    "flip": lambda y: y.flip(-1),
    "pad": lambda y: functional.pad(y, (1, 2)),
    "tril": lambda y: y.tril(1),
    "movedim": lambda y: y.movedim(0, -1),
    "permute": lambda y: y.permute(2, 0, 1).contiguous(),
    "mT": lambda y: y.mT,
    "unflatten": lambda y: torch.unflatten(y, -1, (2, 4)),
    "squeeze": lambda y: y.unsqueeze(1).squeeze(1),
    "where": lambda y: torch.where(KEEP, y, torch.tensor(-2.0)),
    "masked_fill": lambda y: y.masked_fill(KEEP, 0.0),
    "masked_fill with a number": lambda y: y.masked_fill(KEEP, -2.0),
    "scale": lambda y: y * 0.125 / 3,
    "negative": lambda y: -y,
    "shift": lambda y: 3 - y,
    "by position": lambda y: y * torch.linspace(1, 2, TOKENS)[:, None],
    "in place": lambda y: y.clone().mul_(2).add_(1),
    "sum of two": lambda y: y * 0.5 + y[..., ORDER] * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_of_torch(name: str) -> None:
    flow = torch_flow(Traced(IDIOMS[name]))
    _, tracer = check(flow, flow.outputs[0])
    assert len(tracer.sources) == 1


def test_a_bias_belongs_to_its_projection() -> None:
    flow = torch_flow(Traced(lambda y: y.flip(-1)))
    form, tracer = check(flow, flow.outputs[0])
    assert form.bias is None and len(form.ids) == 1
    assert (form.coefficients[0] == 1).all()
    assert tracer.sources[0].shape == (BATCH, TOKENS, FEATURES)
    assert (form.ids[0][..., 0] - tracer.sources[0].base).reshape(-1).tolist() == [7, 15, 23, 31, 39, 47]


def test_a_form_sees_a_wrong_id() -> None:
    """The control of `check`."""
    flow = torch_flow(Traced(lambda y: y.flip(-1)))
    form, tracer = check(flow, flow.outputs[0])
    wrong = Form((np.roll(form.ids[0], 1, axis=-1),), form.coefficients, form.bias)
    error = np.abs(wrong.evaluate(flow, tracer.sources) - flow.value(flow.outputs[0])).max()
    assert error > 0.05


# ------------------------------------------------------------------ what is not affine


class Gated(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(self.linear(x), torch.sigmoid(self.gate(x)))


class ChosenByData(Traced):
    """Leaky: which factor an element gets depends on hidden states."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.where(self.gate(x) > 0, y, y * 0.1)


class GatheredByData(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return torch.gather(self.linear(x), -1, self.gate(x).argsort(-1))


class MaskedByData(Traced):
    def forward(self, x: Tensor) -> Tensor:
        return torch.masked_fill(self.linear(x), self.gate(x) > 0, 0.0)


NOT_AFFINE: dict[str, nn.Module] = {
    "gelu": Traced(functional.gelu),
    "square": Traced(lambda y: y * y),
    "softplus": Traced(functional.softplus),
    "reciprocal": Traced(lambda y: 1 / y),
    "cumulative": Traced(lambda y: y.cumsum(1)),
    "gated": Gated(lambda y: y),
    "times its mean": Traced(lambda y: y * y.mean(-1, keepdim=True)),
    "over its absolute mean": Traced(lambda y: y / y.abs().mean(-1, keepdim=True)),
    "over its largest": Traced(lambda y: y / y.abs().amax(-1, keepdim=True)),
    "over another's norm": Traced(lambda y: y / y.flip(1).norm(dim=-1, keepdim=True)),
    "chosen by data": ChosenByData(lambda y: y),
    "gathered by data": GatheredByData(lambda y: y),
    "masked by data": MaskedByData(lambda y: y),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_affine_is_opaque_with_a_reason(name: str) -> None:
    flow = torch_flow(NOT_AFFINE[name])
    with pytest.raises(Opaque) as error:
        Tracer(flow).trace(flow.outputs[0])
    assert len(str(error.value)) > 20


def test_an_input_that_passed_no_projection_is_opaque() -> None:
    flow = torch_flow(Traced(lambda y: y))
    with pytest.raises(Opaque, match="without passing a projection"):
        Tracer(flow).trace(flow.inputs[0])


# ------------------------------------------------------------------ norms


def rms(y: Tensor, eps: float = 1e-6) -> Tensor:
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


def layer(y: Tensor) -> Tensor:
    centred = y - y.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def by_head(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: norm(y.view(BATCH, TOKENS, 2, 4)).transpose(1, 2)


GAIN = torch.linspace(0.5, 2, FEATURES)
NORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "rms written out": ("rms", rms),
    "rms divided": ("rms", lambda y: y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5)),
    "rms with a gain": ("rms", lambda y: GAIN * rms(y)),
    "rms by head": ("rms", by_head(rms)),
    "rms by torch": ("rms", lambda y: functional.rms_norm(y, (FEATURES,), GAIN)),
    "layer written out": ("layer", layer),
    "layer by head": ("layer", by_head(layer)),
    "layer by torch": ("layer", lambda y: functional.layer_norm(y, (FEATURES,), GAIN, GAIN)),
    "l2 written out": ("l2", lambda y: y / torch.sqrt((y * y).sum(-1, keepdim=True))),
    "l2 by norm": ("l2", lambda y: y / y.norm(dim=-1, keepdim=True)),
    "l2 by normalize": ("l2", lambda y: functional.normalize(y, dim=-1)),
    "l2 by head": ("l2", by_head(lambda y: functional.normalize(y, dim=-1))),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_becomes_a_source_of_its_kind(name: str) -> None:
    kind, body = NORMS[name]
    flow = torch_flow(Traced(body))
    _, tracer = check(flow, flow.outputs[0])
    (source,) = [s for s in tracer.sources if s.kind == "norm"]
    assert source.norm == kind
    assert source.under is not None
    inner, _ = check(flow, source.under)
    assert (inner.coefficients[0] == 1).all(), "what is normalised is the projection itself"


# ------------------------------------------------------------------ biases behind the projection's layout


class Biased(nn.Module):
    """A projection without a bias, whose second half is laid out by `layout` before `bias` is added."""

    def __init__(self, layout: Callable[[Tensor], Tensor], bias: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, 2 * FEATURES, bias=False)
        self.layout, self.bias = layout, nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layout(self.linear(x).chunk(2, dim=-1)[1]) + self.bias, -1)


NUMBERS = torch.linspace(-1, 1, FEATURES)
BY_HEAD: Callable[[Tensor], Tensor] = lambda y: y.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
LATE: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, list[int]]] = {
    "a vector": (lambda y: y, NUMBERS, list(range(FEATURES))),
    "a vector by head": (BY_HEAD, NUMBERS.view(2, 1, -1), list(range(FEATURES))),
    "a vector that all heads share": (BY_HEAD, NUMBERS[:4], [0, 1, 2, 3, 0, 1, 2, 3]),
    "a number for each head": (BY_HEAD, NUMBERS[:2].view(2, 1, 1), [0, 0, 0, 0, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", LATE)
def test_a_bias_behind_a_split_belongs_to_the_columns_it_is_added_to(name: str) -> None:
    layout, bias, index = LATE[name]
    flow = torch_flow(Biased(layout, bias))
    form, tracer = check(flow, next(n for n in flow.nodes if n.op == "Add").outputs[0])
    (source,) = tracer.source_of(form.ids[0])
    assert source.kind == "biased" and form.plain and source.bias is not None and source.bias_index is not None
    assert source.bias_index.tolist() == [-1] * FEATURES + index


@pytest.mark.parametrize("bias", [torch.randn(TOKENS, 1), torch.randn(TOKENS, FEATURES)], ids=["rows", "table"])
def test_what_differs_from_token_to_token_is_no_bias(bias: Tensor) -> None:
    flow = torch_flow(Biased(lambda y: y, bias))
    form, tracer = check(flow, next(n for n in flow.nodes if n.op == "Add").outputs[0])
    assert [s.kind for s in tracer.sources] == ["projection"] and form.bias is not None


# ------------------------------------------------------------------ rotations and gates, through the matcher


class Attention(nn.Module):
    """One attention of 2 heads; `turn` is applied to q and k [B, H, T, D], `gate` says what is gated."""

    def __init__(self, turn: Callable[[Tensor], Tensor], gate: str = "", dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleDict({r: nn.Linear(WIDTH, 2 * dim) for r in ("q", "k", "v", "gate")})
        self.out = nn.Linear(2 * dim, WIDTH)
        self.turn, self.gate = turn, gate

    def forward(self, x: Tensor) -> Tensor:
        parts = {r: self.projections[r](x).unflatten(-1, (2, -1)).transpose(1, 2) for r in ("q", "k", "v")}
        gate = torch.unflatten(torch.sigmoid(self.projections["gate"](x)), -1, (2, -1)).transpose(1, 2)
        parts = {r: y * gate if r in self.gate else y for r, y in parts.items()}
        q, k, v = self.turn(parts["q"]), self.turn(parts["k"]), parts["v"]
        y = functional.scaled_dot_product_attention(q, k, v)
        if "o" in self.gate:
            y = y * gate
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def angles(tokens: int, pairs: int) -> Tensor:
    return torch.arange(tokens)[:, None] * 10.0 ** -torch.arange(pairs) + 0.3


def half(y: Tensor, sign: float = -1.0) -> Tensor:
    a = torch.cat([angles(y.shape[-2], y.shape[-1] // 2)] * 2, -1)
    first, second = y.chunk(2, -1)
    return y * a.cos() + torch.cat([sign * second, first], -1) * a.sin()


def interleaved(y: Tensor) -> Tensor:
    a = angles(y.shape[-2], y.shape[-1] // 2)
    even, odd = y[..., ::2], y[..., 1::2]
    return torch.stack([even * a.cos() - odd * a.sin(), even * a.sin() + odd * a.cos()], -1).flatten(-2)


def two_sums(y: Tensor) -> Tensor:
    a = angles(y.shape[-2], y.shape[-1] // 2)
    first, second = y.chunk(2, -1)
    return torch.cat([first * a.cos() - second * a.sin(), first * a.sin() + second * a.cos()], -1)


def complex_pairs(y: Tensor) -> Tensor:
    a = angles(y.shape[-2], y.shape[-1] // 2)
    pairs = torch.view_as_complex(torch.unflatten(y, -1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(a), a)).flatten(-2)


def summed(y: Tensor, sign: float = -1.0) -> Tensor:
    """Pairs times two by two matrices, written out."""
    a = angles(y.shape[-2], y.shape[-1] // 2)
    matrices = torch.stack([a.cos(), sign * a.sin(), a.sin(), a.cos()], -1).unflatten(-1, (2, 2))
    return (y.unflatten(-1, (-1, 1, 2)) * matrices).sum(-1).flatten(-2)


def partial(y: Tensor) -> Tensor:
    return torch.cat([half(y[..., :4]), y[..., 4:]], -1)


def matched(module: nn.Module) -> Matches:
    generator = torch.Generator().manual_seed(2)
    return find_attention(torch_flow(module, torch.randn(BATCH, 6, WIDTH, generator=generator)))


ROTATIONS: dict[str, tuple[str | None, list[int] | None, Callable[[Tensor], Tensor]]] = {
    "none": (None, None, lambda y: y),
    "half": ("half", [4, 5, 6, 7, 0, 1, 2, 3], half),
    "the other way": ("half", [4, 5, 6, 7, 0, 1, 2, 3], lambda y: half(y.flip(-1)).flip(-1)),
    "interleaved": ("interleaved", [1, 0, 3, 2, 5, 4, 7, 6], interleaved),
    "complex": ("interleaved", [1, 0, 3, 2, 5, 4, 7, 6], complex_pairs),
    "summed": ("interleaved", [1, 0, 3, 2, 5, 4, 7, 6], summed),
    "partial": ("partial", [2, 3, 0, 1, 4, 5, 6, 7], partial),
    "in two sums": ("half", [4, 5, 6, 7, 0, 1, 2, 3], two_sums),
    "scaled": ("half", [4, 5, 6, 7, 0, 1, 2, 3], lambda y: half(y) * 1.2),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_told_apart(name: str) -> None:
    kind, partner, turn = ROTATIONS[name]
    matches = matched(Attention(turn))
    assert matches.refusals == ()
    (site,) = matches.sites
    for operand in (site.q, site.k):
        assert (operand.rotary.kind if operand.rotary else None) == kind
        assert (list(operand.rotary.partner) if operand.rotary else None) == partner
    assert site.v.rotary is None


NO_ROTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a reflection": lambda y: half(y, sign=1.0),
    "a reflection, summed": lambda y: summed(y, sign=1.0),
    "more than pairs, summed": lambda y: (y.unflatten(-1, (-1, 1, 4)) * angles(4, 4)).sum(-1).flatten(-2),
    "a sum of neighbours": lambda y: y + y.roll(1, dims=-1),
    "a shear": lambda y: y + half(y) * 0.5,
    "a shift of tokens": lambda y: y + y.roll(1, dims=-2),
}


@pytest.mark.parametrize("name", NO_ROTATIONS)
def test_what_only_looks_like_a_rotation_is_run_and_not_read_as_one(name: str) -> None:
    matches = matched(Attention(NO_ROTATIONS[name]))
    (site,) = matches.sites
    assert site.q.rotary is None and site.q.headwise and site.k.headwise
    assert site.stays


def test_what_mixes_heads_is_refused() -> None:
    matches = matched(Attention(lambda y: y + y.roll(1, dims=1)))
    assert matches.sites == () and len(matches.refusals) == 1
    assert matches.refusals[0].reason.startswith("query: ")


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_a_gated_operand_is_not_read(role: str) -> None:
    """It would replay perfectly on the recording, and be wrong on every other input."""
    matches = matched(Attention(lambda y: y, gate=role))
    said = [*(site.whole for site in matches.sites), *(refusal.reason for refusal in matches.refusals)]
    assert ["hidden states" in reason for reason in said] == [True]


def test_a_gated_output_is_no_obstacle() -> None:
    (site,) = matched(Attention(lambda y: y, gate="o")).sites
    assert site.out is None
