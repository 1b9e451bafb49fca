"""``torch.compile(model, backend="rewriter", options={"target": "gqa4"})``: attention is rewritten, then compiled.

torch finds `backend` through the entry point group ``torch_dynamo_backends``. What it hands over is a graph whose
parameters are inputs. Those are constants of the rewriting: they are bound into the graph, merged once, and watched,
so that a changed parameter is merged anew. Everything happens at the graph's first call, when tensors are real.
"""

from __future__ import annotations

import copy
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

from rewriter.decision import assignment
from rewriter.errors import NothingToRewrite, RewriteError, UnsupportedModel, UsageError
from rewriter.graph_rewrite import rewrite_graph

TARGET_VARIABLE = "REWRITER_TARGET"
ANCHORS = ("softmax", "scaled_dot_product_attention", "multi_head_attention")


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
    return _Watched(graph, chosen)


def _options(options: Mapping[str, Any] | None, mode: Any) -> Options:
    given = dict(options or {})
    known = [f.name for f in fields(Options)]
    if mode is not None:
        raise UsageError("mode belongs to another backend", hint='use options={"target": ..., "backend": ...}')
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"unknown options: {', '.join(unknown)}", hint=f"options: {', '.join(known)}")
    if given.setdefault("target", os.environ.get(TARGET_VARIABLE)) is None:
        raise UsageError("no target", hint=f'pass options={{"target": "gqa4"}} or set {TARGET_VARIABLE}')
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
    return node.op in {"call_function", "call_method"} and any(anchor in name for anchor in ANCHORS)


# ------------------------------------------------------------ one captured graph


class _Watched:
    """Calls the rewritten graph; rewrites at the first call and whenever a parameter is not what it was."""

    def __init__(self, graph: GraphModule, options: Options) -> None:
        self.graph = graph
        self.options = options
        self.holders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self.seen: list[tuple[Tensor, Any]] = []
        self.kept: list[int] = []
        self.run: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.run is None or any(args[i] is not t or _version(t) != v for i, (t, v) in self._weights()):
            self._prepare(args)
        assert self.run is not None
        return self.run(*(args[i] for i in self.kept))

    def _weights(self) -> list[tuple[int, tuple[Tensor, Any]]]:
        return list(zip(self.watched, self.seen, strict=True))

    def _prepare(self, args: Sequence[Any]) -> None:
        weights = [i for i, a in enumerate(args) if isinstance(a, nn.Parameter)]
        try:
            if torch.is_grad_enabled() and any(args[i].requires_grad for i in weights):
                raise NothingToRewrite("gradients are recorded, and merged weights would not learn from them")
            program = _bind(self.graph, self.holders, args)
            done: Any = rewrite_graph(
                program, self.options.target, layers=self.options.layers, example_inputs=None,
                verify=self.options.verify,
            )  # fmt: skip
        except (NothingToRewrite, UnsupportedModel) as error:
            warnings.warn(f"not rewritten: {error}", NotRewritten, stacklevel=3)
            self.kept, self.watched, self.seen = list(range(len(args))), [], []
            self.run = torch.compile(self.graph, backend=self.options.backend)
            return
        self.watched, self.seen = weights, [(args[i], _version(args[i])) for i in weights]
        self.kept = [i for i, a in enumerate(args) if isinstance(a, Tensor) and i not in weights]
        self.run = torch.compile(done.module(check_guards=False), backend=self.options.backend)


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor's memory does; inference tensors have no counter and cannot be written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
