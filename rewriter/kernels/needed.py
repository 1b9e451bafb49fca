"""Reads off a rewritten model which specs it computes, and in which number format."""

from __future__ import annotations

import itertools
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
from codegen.routed import RoutedFeedForward, of_heavy_branch, of_mixture
from codegen.sight import Pattern, Sight
from codegen.spec import FourierMixing, GroupedQueryAttention
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


@dataclass(frozen=True)
class Need:
    """One kernel that a model could use."""

    spec: GroupedQueryAttention | FourierMixing | RoutedFeedForward
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
            "there are none of linear attention",
        )
    return list(dict.fromkeys(found))


def _of_module(path: Path) -> list[Need]:
    from codegen.launch.operands import DTYPES
    from codegen.launch.torch_op import computed
    from rewriter.install.conditional_block import conditional_blocks
    from rewriter.install.expert_mixer import expert_mixers
    from rewriter.install.persistence import load
    from rewriter.install.token_mixer import token_mixers
    from rewriter.install.torch_module import mixers

    found: list[Need] = []
    model = load(path)
    for mixer in mixers(model).values():
        dtype = DTYPES.get(mixer.q_proj.weight.dtype)
        if dtype is not None and mixer.linear_term is None:
            found += [Need(computed(spec), dtype) for spec in mixer.specs()]
    dtype = DTYPES.get(next(model.parameters()).dtype)
    mixes = (mixing.spec for mixing in token_mixers(model).values())
    specs: list[FourierMixing | RoutedFeedForward] = [s for s in mixes if isinstance(s, FourierMixing)]
    specs += [of_mixture(mixer.spec) for mixer in expert_mixers(model).values()]
    specs += [of_heavy_branch(block.spec) for block in conditional_blocks(model).values()]
    return found + [Need(spec, dtype) for spec in specs if dtype is not None]


def _of_file(path: Path) -> list[Need]:
    from rewriter.capture.onnx_load import load

    model = load(path)
    own = [n for n in model.graph if n.domain == DOMAIN]
    mixing = [_mixing_need(n) for n in own if n.op_type in _MIXING]
    nodes = [n for n in own if _flags(n.op_type) is not None]
    if not nodes:
        return mixing
    for node in nodes:
        _need(node, 1, 1)  # broken attributes are said before anything is run
    sizes = _head_sizes(path, model, nodes)
    return [_need(node, *sizes[i]) for i, node in enumerate(nodes)] + mixing


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
        raise InvalidModelFile(f"the node {node.name!r} of {DOMAIN} has wrong attributes: {error!r}") from error


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
        raise InvalidModelFile(f"the node {node.name!r} of {DOMAIN} has wrong attributes: {error!r}") from error


def _head_sizes(path: Path, model: ir.Model, nodes: list[ir.Node]) -> list[tuple[int, int]]:
    """head_dim and value_dim of each node: as declared in the file, else seen in one run of the model."""
    pairs = [(node.inputs[0], node.inputs[2]) for node in nodes]
    declared = [tuple(_last(value) for value in pair) for pair in pairs]
    if all(size is not None for pair in declared for size in pair):
        return [(int(d), int(e)) for d, e in declared if d is not None and e is not None]
    seen = _run(model, [value for pair in pairs for value in pair if value is not None and value.name])
    try:
        return [(seen[str(q.name)], seen[str(v.name)]) for q, v in pairs if q is not None and v is not None]
    except KeyError as error:
        raise InvalidModelFile(f"{path.name}: a rewritten node reads {error}, which nothing computes") from error


def _last(value: ir.Value | None) -> int | None:
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    size = value.shape[3]
    return size if isinstance(size, int) else None


def _run(model: ir.Model, values: list[ir.Value]) -> dict[str, int]:
    from rewriter.capture.feeds import candidate_sizes, make_feeds
    from rewriter.verify.session import cpu_session

    present = {output.name for output in model.graph.outputs}
    names = list(dict.fromkeys(str(value.name) for value in values))
    sizes = candidate_sizes(model)
    model.graph.outputs.extend(dict.fromkeys(v for v in values if v.name not in present))
    trouble: Exception | None = None
    session = cpu_session(model)
    for batch, length, past in sizes:
        feeds = make_feeds(model, batch=batch, length=length, past=past)
        try:
            outputs = session.run(names, feeds)
        except Exception as error:  # onnxruntime's errors share no public base class
            trouble = trouble or error
            continue
        return {name: int(np.shape(array)[-1]) for name, array in zip(names, outputs, strict=True)}
    raise UnsupportedModel(f"the model does not run: {first_line(trouble) if trouble else 'no size fits'}")
