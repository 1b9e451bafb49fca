"""Reads off a rewritten model which specs it computes, and in which number format."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from codegen.device import DType
from codegen.ops.fourier_mixing import onnx_body as mixing_body
from codegen.ops.grouped_query_attention.onnx_body import DOMAIN, function_name
from codegen.ops.grouped_query_attention.onnx_sight import sparse_numbers, sparse_words
from codegen.ops.grouped_query_attention.onnx_tiles import masked_name
from codegen.ops.linear_attention import onnx_body as linear_body
from codegen.ops.mixed_chunk_attention import onnx_body as chunks_body
from codegen.routed import RoutedFeedForward, of_heavy_branch, of_mixture
from codegen.sight import Pattern, Sight
from codegen.spec import (
    FeatureMap,
    FourierMixing,
    GroupedQueryAttention,
    LinearAttention,
    MixedChunkAttention,
    PositionBias,
)
from rewriter.errors import InvalidModelFile, NothingToRewrite, UnsupportedModel, first_line

_ONNX_DTYPES = {
    ir.DataType.FLOAT: DType.FLOAT32,
    ir.DataType.FLOAT16: DType.FLOAT16,
    ir.DataType.BFLOAT16: DType.BFLOAT16,
}

SPARSE = "Sparse"
"""Begins the part of a function's name that says which relations of positions its body computes."""

SIGHT_NUMBERS = ("reach", "block", "stride", "sinks", "period", "first", "last")
"""Numbers of a sight, in the order in which bodies read them."""

FLAGS = ("causal", "bias", "sinks", "masked_rows_are_zero")


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Need:
    """One kernel that a model could use."""

    spec: GroupedQueryAttention | FourierMixing | LinearAttention | MixedChunkAttention | RoutedFeedForward
    dtype: DType


def needs(path: Path) -> list[Need]:
    """Each different kernel once, in the order of the model.

    Raises:
        NothingToRewrite: the model has nothing rewritten that a kernel could compute.
        InvalidModelFile: a rewritten node is not what this library writes.
        UnsupportedModel: the sizes of heads cannot be told because the model does not run.
    """
    found = _of_module(path) if path.is_dir() else _of_file(path)
    if not found:
        raise NothingToRewrite(
            "the model has no rewritten attention, no mix and no routed feed-forward block that calls kernels",
            hint="rewrite it first; models whose config or standard Attention operator holds the heads have none, and "
            "there are none of linear attention with features of FAVOR+",
        )
    return list(dict.fromkeys(found))


def _of_module(path: Path) -> list[Need]:
    from codegen.launch.operands import DTYPES
    from codegen.launch.torch_op import computed
    from rewriter.install.checkpoint_loading import load
    from rewriter.install.conditional_block import conditional_blocks
    from rewriter.install.expert_mixer import expert_mixers
    from rewriter.install.token_mixer import token_mixers
    from rewriter.install.torch_module import mixers
    from rewriter.install.unit_block import unit_blocks

    found: list[Need] = []
    model = load(path)
    for mixer in mixers(model).values():
        dtype = DTYPES.get(mixer.q_proj.weight.dtype)
        if dtype is None:
            continue
        if mixer.linear_term is None:
            found += [Need(computed(spec), dtype) for spec in mixer.specs()]
        elif mixer.linear_term.spec.features is not FeatureMap.FAVOR:
            found.append(Need(mixer.linear_term.spec, dtype))
    dtype = DTYPES.get(next(model.parameters()).dtype)
    mixes = (module.spec for of in (token_mixers, unit_blocks) for module in of(model).values())
    specs: list[FourierMixing | MixedChunkAttention | RoutedFeedForward] = [
        s for s in mixes if isinstance(s, FourierMixing | MixedChunkAttention)
    ]
    specs += [of_mixture(mixer.spec) for mixer in expert_mixers(model).values()]
    specs += [of_heavy_branch(block.spec) for block in conditional_blocks(model).values()]
    return found + [Need(spec, dtype) for spec in specs if dtype is not None]


def _of_file(path: Path) -> list[Need]:
    from rewriter.capture.onnx_branches import lift
    from rewriter.capture.onnx_load import load

    model = load(path)
    lift(model)
    own = [n for n in model.graph if n.domain == DOMAIN]
    mixing = [_mixing_need(n) for n in own if n.op_type in _MIXING]
    mixing += [_chunks_need(n, called) for n in own if (called := _called(model, n)) is not None]
    nodes = [n for n in own if _flags(n.op_type) is not None or n.op_type in _LINEAR]
    if not nodes:
        return mixing
    for node in nodes:
        _attention_need(node, [(1, 1, 1, 1)] * 3)  # broken attributes are said before anything is run
    shapes = _operand_shapes(path, model, nodes)
    return [_attention_need(node, shapes[i]) for i, node in enumerate(nodes)] + mixing


def _attention_need(node: ir.Node, shapes: Sequence[Shape]) -> Need:
    """Of a node whose q, k and v have these shapes."""
    if len(shapes) != 3 or any(len(shape) != 4 for shape in shapes):
        raise _broken(node, ValueError("its operands are not q, k and v"))
    return _linear_need(node, *shapes) if node.op_type in _LINEAR else _need(node, shapes[0][3], shapes[2][3])


def _names() -> dict[str, dict[str, Any]]:
    """Every name that a function can have, with what it says."""
    found = {}
    for values in itertools.product((False, True), repeat=len(FLAGS)):
        for softcap in (None, 1.0):
            flags: dict[str, Any] = dict(zip(FLAGS, values, strict=True))
            found[function_name(GroupedQueryAttention(1, 1, 1, 1, 1.0, softcap=softcap, **flags))] = {
                **flags,
                "softcap": softcap,
            }
    return found


_NAMES = _names()


def _flags(name: str) -> dict[str, Any] | None:
    """What the name of an attention's function says, but for its pattern; None for another's."""
    return _NAMES.get(name.partition(SPARSE)[0])


def _pattern(node: ir.Node) -> Pattern:
    """The sights of an attention's node; raises ValueError for a name that does not say what its attributes are."""
    words = masked_name(node.op_type).partition(SPARSE)[2]
    if not words:
        return ()
    read = {name: node.attributes.get(f"sparse_{name}") for name in SIGHT_NUMBERS}
    numbers = {name: list(found.as_ints()) for name, found in read.items() if found is not None}
    rows = zip(*numbers.values(), strict=True)
    ordered = words.endswith("Ordered")
    pattern = tuple(Sight(**dict(zip(numbers, row, strict=True)), ordered=ordered) for row in rows)
    if "".join(sparse_words(pattern)) != words or sparse_numbers(pattern) != list(numbers):
        raise ValueError(f"{node.op_type} with {', '.join(numbers)}")
    return pattern


def _mixings() -> dict[str, FourierMixing]:
    """Every name that a mixing function can have, with a spec of that name."""
    flags = itertools.product((False, True), repeat=3)
    specs = [FourierMixing(1, hartley=h, gain=g, bias=b) for h, g, b in flags]
    return {mixing_body.function_name(spec): spec for spec in specs}


_MIXING = _mixings()


def _mixing_need(node: ir.Node) -> Need:
    try:
        spec = replace(_MIXING[node.op_type], hidden=node.attributes["hidden_size"].as_int())
        return Need(spec, _ONNX_DTYPES[ir.DataType(node.attributes["dtype"].as_int())])
    except (KeyError, ValueError, TypeError) as error:
        raise _broken(node, error) from error


def _chunked() -> dict[str, MixedChunkAttention]:
    """Every name that what is between the projections of such a unit can have, with a spec of that name."""
    found = {}
    biases = (PositionBias.NONE, PositionBias.TOEPLITZ)  # of every kind by one name
    for causal, averaged, bias in itertools.product((False, True), (False, True), biases):
        spec = MixedChunkAttention(1, 1, 1, causal=causal, averaged=averaged, bias=bias, rotary=False)
        found[chunks_body.chunks_name(spec)] = spec
    return found


_CHUNKS = _chunked()


def _called(model: ir.Model, node: ir.Node) -> str | None:
    """The function of mixed chunk attention that a node's own function calls, if it is such a unit."""
    function = model.functions.get((DOMAIN, node.op_type, ""))
    return None if function is None else next((n.op_type for n in function if n.op_type in _CHUNKS), None)


def _chunks_need(node: ir.Node, called: str) -> Need:
    """In the number format that is between the projections, whatever the file's own."""
    try:
        hidden, expanded, base, chunk = (
            node.attributes[name].as_int() for name in ("hidden_size", "expanded_size", "base_size", "chunk")
        )
        spec = replace(_CHUNKS[called], hidden=hidden, expanded=expanded, base=base, chunk=chunk)
        return Need(spec, _ONNX_DTYPES[ir.DataType(node.attributes["compute"].as_int())])
    except (KeyError, ValueError, TypeError) as error:
        raise _broken(node, error) from error


def _linears() -> dict[str, LinearAttention]:
    """Every name that a function of linear attention with a kernel can have, with a spec of that name."""
    found = {}
    for causal, features, shown in itertools.product(
        (False, True), (FeatureMap.LEARNED, FeatureMap.ELU1), (False, True)
    ):
        spec = LinearAttention(GroupedQueryAttention(1, 1, 1, 1, 1.0, causal=causal), features=features)
        found[linear_body.function_name(spec, shown)] = spec
    return found


_LINEAR = _linears()


def _linear_need(node: ir.Node, q: Shape, k: Shape, v: Shape) -> Need:
    """The scale that the operands' own gains leave; kernels are told both when they are called."""
    try:
        found = _LINEAR[node.op_type]
        scale = node.attributes["scale"].as_float()
        plain = replace(found.attention, heads=q[1], kv_heads=k[1], head_dim=q[3], value_dim=v[3], scale=scale)
        spec = replace(found, attention=plain, chunk=node.attributes["chunk"].as_int())
        return Need(spec, _ONNX_DTYPES[ir.DataType(node.attributes["dtype"].as_int())])
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise _broken(node, error) from error


def _broken(node: ir.Node, error: Exception) -> InvalidModelFile:
    return InvalidModelFile(f"the node {node.name!r} of {DOMAIN} has wrong attributes: {error!r}")


def _need(node: ir.Node, head_dim: int, value_dim: int) -> Need:
    flags = dict(_flags(node.op_type) or {})
    try:
        if flags["softcap"] is not None:
            flags["softcap"] = node.attributes["softcap"].as_float()
        spec = GroupedQueryAttention(
            heads=node.attributes["num_heads"].as_int(),
            kv_heads=node.attributes["kv_num_heads"].as_int(),
            head_dim=head_dim,
            value_dim=value_dim,
            scale=node.attributes["scale"].as_float(),
            pattern=_pattern(node),
            **flags,
        )
        return Need(spec, _ONNX_DTYPES[ir.DataType(node.attributes["dtype"].as_int())])
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise _broken(node, error) from error


def _operand_shapes(path: Path, model: ir.Model, nodes: list[ir.Node]) -> list[list[Shape]]:
    """Shapes of q, k and v of each node, of which batch and tokens mean nothing: as declared in the file where heads
    and features are, else seen in one run of the model."""
    operands = [list(node.inputs[:3]) for node in nodes]
    declared = [[_declared(value) for value in values] for values in operands]
    if all(shape is not None for shapes in declared for shape in shapes):
        return [[shape for shape in shapes if shape is not None] for shapes in declared]
    seen = _run(model, [value for values in operands for value in values if value is not None and value.name])
    try:
        return [[seen[str(value.name)] for value in values if value is not None] for values in operands]
    except KeyError as error:
        raise InvalidModelFile(f"{path.name}: a rewritten node reads {error}, which nothing computes") from error


def _declared(value: ir.Value | None) -> Shape | None:
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    return None if sizes[1] is None or sizes[3] is None else tuple(size or 0 for size in sizes)


def _run(model: ir.Model, values: list[ir.Value]) -> dict[str, Shape]:
    from rewriter.capture.feeds import candidate_sizes, make_feeds
    from rewriter.verify.session import cpu_session

    present = {output.name for output in model.graph.outputs}
    names = list(dict.fromkeys(str(value.name) for value in values))
    sizes = candidate_sizes(model)
    model.graph.outputs.extend(dict.fromkeys(v for v in values if v.name not in present))
    trouble: Exception | None = None
    try:
        session = cpu_session(model)
    except Exception as error:  # onnxruntime's errors share no public base class
        raise UnsupportedModel(
            f"onnxruntime does not open the model: {first_line(error)}", hint="rewrite it again, or export it anew"
        ) from error
    for batch, length, past in sizes:
        feeds = make_feeds(model, batch=batch, length=length, past=past)
        try:
            outputs = session.run(names, feeds)
        except Exception as error:  # onnxruntime's errors share no public base class
            trouble = trouble or error
            continue
        return {name: np.shape(array) for name, array in zip(names, outputs, strict=True)}
    raise UnsupportedModel(
        f"the model does not run: {first_line(trouble) if trouble else 'no size fits'}",
        hint="check that the file runs in onnxruntime with inputs of any size",
    )
