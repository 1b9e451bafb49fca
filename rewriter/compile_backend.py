"""``torch.compile(model, backend="rewriter", options={"target": "gqa4"})``: attention is rewritten, then compiled.

torch finds `backend` through the entry point group ``torch_dynamo_backends``. What it hands over is a graph whose
parameters are inputs. Those are constants of the rewriting: they are bound into the graph, merged once, and watched,
so that a changed parameter is merged anew. Everything happens at the graph's first call, when tensors are real.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.match.feed_forward import find_feed_forward
from passes.targets.block import BlockReplacement
from passes.targets.grouped_query import keeps_hidden_biases
from passes.targets.replacement import Replacement
from rewriter.decision import assignment, decide
from rewriter.errors import NothingToRewrite, UnsupportedModel, UsageError, VerificationFailed, first_line
from rewriter.install.fx_graph import rewrite_exported_program
from rewriter.verify.torch_pair import verify_torch

TARGET_VARIABLE = "REWRITER_TARGET"
ANCHORS = ("softmax", "scaled_dot_product_attention", "multi_head_attention")
FUSED_LAYER = "transformer_encoder_layer_fwd"


@dataclass(frozen=True)
class Options:
    """What ``options`` may hold.

    Attributes:
        target: a target's name or object, or a mapping from layer selectors to either; the environment variable
            REWRITER_TARGET where it is left out.
        layers: which sites, as for `rewriter.optimize`.
        backend: what compiles the rewritten graph; by default "inductor" where it has a compiler, else "eager".
        verify: compare with the original graph before its first use.
    """

    target: Any
    layers: str | None = None
    backend: Any = None
    verify: bool = True


class NotRewritten(UserWarning):
    """A graph is compiled as it is; the message says why."""


def backend(
    graph: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: Any = None
) -> Callable[..., Any]:
    """The function that torch.compile calls with each graph that it captured.

    A graph in which nothing can be rewritten is compiled unchanged, with a `NotRewritten` warning that lists reasons
    (none where the graph has no softmax). So is every graph while gradients are recorded.

    Raises:
        UnknownTarget, UsageError: a wrong option, or no target.
    """
    chosen = _options(options, mode)
    if not any(_attends(node) for node in graph.graph.nodes):
        compiler = torch._dynamo.lookup_backend(chosen.backend)
        return compiler(graph, list(example_inputs))
    return _Rewritten(graph, chosen)


def _options(options: Mapping[str, Any] | None, mode: Any) -> Options:
    given = dict(options or {})
    known = [f.name for f in fields(Options)]
    if mode is not None:
        raise UsageError("mode belongs to another backend", hint='use options={"target": ..., "backend": ...}')
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"unknown options: {', '.join(unknown)}", hint=f"options: {', '.join(known)}")
    if given.setdefault("target", os.environ.get(TARGET_VARIABLE)) is None:
        # torch shows what an error says, and not its hint
        hint = f'pass options={{"target": "gqa4"}} or set {TARGET_VARIABLE}'
        raise UsageError(f"no target: {hint}", hint=hint)
    chosen = Options(**{"backend": None, **given})
    assignment(chosen.target, chosen.layers)
    return chosen if chosen.backend is not None else Options(**{**given, "backend": _default_backend()})


def _default_backend() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return "eager"
    return "inductor"


def _attends(node: FxNode) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in {"call_function", "call_method"} and any(anchor in name for anchor in (*ANCHORS, FUSED_LAYER))


# ------------------------------------------------------------ one captured graph


@dataclass(frozen=True)
class _Compiled:
    """What runs instead of a graph.

    Attributes:
        run: takes the graph's inputs at the positions `kept`.
        weights: the parameters that were merged into it, by position, with their versions.
    """

    run: Callable[..., Any]
    kept: tuple[int, ...]
    weights: tuple[tuple[int, Tensor, object], ...]

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether these inputs hold the very parameters that were merged, unchanged since."""
        return all(args[i] is tensor and _version(tensor) == version for i, tensor, version in self.weights)


class _Rewritten:
    """Stands for a captured graph; rewrites it at the first call, and again when a parameter has changed."""

    def __init__(self, graph: GraphModule, options: Options) -> None:
        self.graph = graph
        self.options = options
        self.compiled: _Compiled | None = None
        self.blocks: Sequence[BlockReplacement] = ()

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None or not self.compiled.fits(args):
            self.compiled = self._compile(args)
        return self.compiled.run(*(args[i] for i in self.compiled.kept))

    def _compile(self, args: Sequence[Any]) -> _Compiled:
        weights = {i: a for i, a in enumerate(args) if isinstance(a, nn.Parameter)}
        try:
            if torch.is_grad_enabled() and any(w.requires_grad for w in weights.values()):
                raise UnsupportedModel(
                    "gradients are recorded, and merged weights would not pass them on to the model's parameters",
                    hint="call it under torch.no_grad(); to train, rewriter.optimize(model, ...) first",
                )
            module = self._rewrite(args, weights)
        except (NothingToRewrite, UnsupportedModel) as error:
            hint = f" ({error.hint})" if error.hint else ""
            warnings.warn(f"a graph is compiled as it is: {error}{hint}", NotRewritten, stacklevel=2)
            run: Callable[..., Any] = torch.compile(self.graph, backend=self.options.backend)
            return _Compiled(run, tuple(range(len(args))), ())
        kept = tuple(i for i, a in enumerate(args) if isinstance(a, Tensor) and i not in weights)
        held = tuple((i, w, _version(w)) for i, w in weights.items())
        return _Compiled(torch.compile(module, backend=self.options.backend), kept, held)

    def _rewrite(self, args: Sequence[Any], weights: Mapping[int, Tensor]) -> nn.Module:
        program = _exported(self.graph, args, weights)
        kept = keeps_hidden_biases(self.options.target)
        done = rewrite_exported_program(program, self._choose, blocks=self._chosen_blocks, hidden_biases=kept)
        if not done.replacements and not done.blocks:
            raise NothingToRewrite("; ".join(f"{name}: {reason}" for name, reason in done.refused))
        before, after = (p.module(check_guards=False) for p in (program, done.model))
        if self.options.verify:
            _require_equal(program, before, after, done.exact)
        return after

    def _choose(self, flow: Flow, matches: Matches) -> Sequence[Replacement]:
        """What to install: a cache that leaves the graph is read by code that was traced for its old shape."""
        blocks = functools.partial(find_feed_forward, flow, matches.names)
        decision = decide(flow, matches, self.options.target, self.options.layers, blocks=blocks)
        self.blocks = decision.blocks.replacements
        kept = [r for r in decision.replacements if not (r.site.k.presents or r.site.v.presents)]
        if not kept and not self.blocks:
            names = ", ".join(r.site.name for r in decision.replacements[:3])
            raise NothingToRewrite(
                f"the key/value cache of {names} leaves the graph, and what reads it expects its shape",
                hint="call the model with use_cache=False, or rewriter.optimize(model, ...) before torch.compile",
            )
        return kept

    def _chosen_blocks(self) -> Sequence[BlockReplacement]:
        return self.blocks


def _require_equal(program: ExportedProgram, before: nn.Module, after: nn.Module, exact: bool) -> None:
    """Every output that holds numbers must be finite, and equal where the rewrite is exact."""
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    with torch.no_grad():
        pairs = zip(*(pytree.tree_leaves(m(*args, **kwargs)) for m in (before, after)), strict=True)
    for old, new in pairs:
        if isinstance(old, Tensor) and old.is_floating_point():
            verification = verify_torch(old, new, {}, exact=exact)
            if not verification.ok:
                failed = verification.failures[0]
                raise VerificationFailed(f"the rewritten graph failed the check {failed.name!r}: {failed.detail}")


def _version(tensor: Tensor) -> object:
    """Changes when the tensor is written to, or its memory exchanged; not on a write through ``.data``."""
    return tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


# ------------------------------------------------------------ from the captured graph to an exported program


def _exported(graph: GraphModule, args: Sequence[Any], weights: Mapping[int, Tensor]) -> ExportedProgram:
    """The graph with `weights` bound into it, dynamic where it was captured so. Raises UnsupportedModel."""
    bound, dynamic = _bound(graph, weights)
    # the graph is run on these, and may write to them
    inputs = tuple(a.clone() for i, a in enumerate(args) if isinstance(a, Tensor) and i not in weights)
    try:
        with torch.no_grad():
            return torch.export.export(bound, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export raises many unrelated types
        raise UnsupportedModel(
            f"torch.export could not take the graph: {first_line(error)}",
            hint="pass dynamic=False to torch.compile, or rewriter.optimize(model, ...) first",
        ) from error


def _bound(graph: GraphModule, weights: Mapping[int, Tensor]) -> tuple[GraphModule, Any]:
    """(the graph reading `weights` as attributes and sizes off its tensors, dynamic dimensions of what is left)."""
    root = nn.Module()
    bound = copy.deepcopy(graph.graph)
    holders = [n for n in bound.nodes if n.op == "placeholder"]
    for node in bound.nodes:
        if node.op in {"get_attr", "call_module"}:
            raise UnsupportedModel(f"the captured graph holds a {node.op} of {node.target}")
        if FUSED_LAYER in str(node.target):
            raise UnsupportedModel(
                "torch runs whole encoder layers as one fused operator",
                hint="switch that off with torch.backends.mha.set_fastpath_enabled(False)",
            )
        _name_owners(node)
    for position, tensor in weights.items():
        name = _parameter_name(holders[position])
        _register(root, name, tensor)
        _replace(holders[position], "get_attr", name, ())
    left = [n for n in bound.nodes if n.op == "placeholder"]
    tensors = [n for n in left if isinstance(n.meta["example_value"], Tensor)]
    for holder in left:
        if holder not in tensors:
            source, axis = _size_of(holder, tensors)
            with bound.inserting_after(tensors[-1]):
                size = bound.call_method("size", (source, axis))
            holder.replace_all_uses_with(size)
            bound.erase_node(holder)
    dynamic = {str(n.target): _dynamic_axes(n) for n in tensors}
    return GraphModule(root, bound), dynamic


def _replace(holder: FxNode, op: str, target: str, args: tuple[Any, ...]) -> None:
    with holder.graph.inserting_before(holder):
        new = holder.graph.create_node(op, target, args)
    new.meta.update(holder.meta)
    holder.replace_all_uses_with(new)
    holder.graph.erase_node(holder)


def _name_owners(node: FxNode) -> None:
    """Module paths without the expression by which torch reached the model: ``L['self'].layers.0`` is layers.0."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: (re.sub(r"^L\['\w+'\](\[\d+\])?\.?", "", path), kind) for key, (path, kind) in stack.items()
        }


def _parameter_name(holder: FxNode) -> str:
    """The dotted name that the model knows a parameter by, read from where torch found it."""
    argument = holder.meta.get("grapharg")
    keys = re.findall(r"\['([^']+)'\]", argument.source.name) if argument is not None else []
    return ".".join(keys) if keys and all(k.isidentifier() or k.isdigit() for k in keys) else str(holder.target)


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))


def _size_of(holder: FxNode, tensors: Sequence[FxNode]) -> tuple[FxNode, int]:
    """A tensor input and its axis that this number is the size of."""
    wanted = str(holder.meta["example_value"])
    for tensor in tensors:
        for axis, size in enumerate(tensor.meta["example_value"].shape):
            if str(size) == wanted:
                return tensor, axis
    raise UnsupportedModel(
        f"the graph takes the number {holder.name}, which is the size of none of its tensors",
        hint="rewriter.optimize(model, ...) first",
    )


def _dynamic_axes(tensor: FxNode) -> dict[int, Any]:
    shape = tensor.meta["example_value"].shape
    return {axis: Dim.DYNAMIC for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)}
