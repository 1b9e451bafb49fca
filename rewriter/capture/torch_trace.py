"""Where torch.export refuses a module: one run of it, traced with real tensors, branches taken as they were taken.

Control flow that depends on data is no obstacle to this, and is not in the result. That is enough to see what a forward
did with these inputs; whether it does the same with others is for the doors out to prove.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree


def trace(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[GraphModule, dict[str, Any]]:
    """(flat graph, what each of its placeholders holds); weights are attributes by their state-dict keys.

    Raises ValueError where parts of tensors are overwritten untraceably, and whatever the module or the tracer raises.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def run(*tensors: Tensor) -> list[Tensor]:
        given = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            given[position] = tensor
        again, named = pytree.tree_unflatten(given, spec)
        return [leaf for leaf in pytree.tree_leaves(module(*again, **named)) if isinstance(leaf, Tensor)]

    tensors = [leaves[i] for i in positions]
    with torch.no_grad(), traceback.preserve_node_meta(), _noting_modules(module):
        graph = _made(run, tensors)
        if writes_through_views(graph.graph):
            graph = _made(torch.func.functionalize(run, remove="mutations"), tensors)
        if writes_through_views(graph.graph):  # operators as they are dispatched, of which none works in place
            with sdpa_kernel(SDPBackend.MATH):  # others dispatch attention to operators of their own
                graph = _made(torch.func.functionalize(run, remove="mutations"), tensors, dispatched=True)
    if writes_through_views(graph.graph):
        raise ValueError("what the module writes into slices cannot be followed")
    holders = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    return _with_keys(graph, module), dict(zip(holders, tensors, strict=True))


def _made(run: Callable[..., Any], tensors: list[Tensor], dispatched: bool = False) -> GraphModule:
    made = make_fx(run, tracing_mode="real", pre_dispatch=not dispatched, _error_on_data_dependent_ops=False)(*tensors)
    assert isinstance(made, GraphModule)
    return made


def writes_through_views(graph: Graph) -> bool:
    """Whether an operator changes part of another's result: values cannot be recorded one by one then."""
    for fx in graph.nodes:
        schema = getattr(fx.target, "_schema", None)
        written = fx.args[0] if schema is not None and schema.is_mutable and fx.args else None
        if isinstance(written, Node) and _is_view(written) and not _is_all_that_is_read(written):
            return True
    return False


def _is_view(node: Node) -> bool:
    """Whether an operator's result may share memory with its argument."""
    schema = getattr(node.target, "_schema", None)
    returned = schema.returns[0].alias_info if schema is not None and schema.returns else None
    return returned is not None and not returned.is_write


def _is_all_that_is_read(view: Node) -> bool:
    """Whether a view is of a fresh tensor that nothing else reads: what is written into it is seen nowhere else."""
    base = view.args[0] if view.args else None
    return isinstance(base, Node) and base.op == "call_function" and len(base.users) == 1 and not _is_view(base)


@contextmanager
def _noting_modules(module: torch.nn.Module) -> Iterator[None]:
    """Each traced node is told the path of the innermost module that it runs in."""
    meta, stack = traceback.get_current_meta(), [""]

    def note() -> None:
        meta["nn_module_stack"] = {stack[-1]: (stack[-1], "")}

    def entering(path: str) -> Any:
        def enter(_: torch.nn.Module, args: Any) -> None:
            stack.append(path)
            note()

        return enter

    def leave(_: torch.nn.Module, args: Any, output: Any) -> None:
        stack.pop()
        note()

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(entering(path)))
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        meta.pop("nn_module_stack", None)


def _with_keys(graph: GraphModule, module: torch.nn.Module) -> GraphModule:
    """The graph with parameters and buffers under their own names, not the tracer's."""
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    keys: dict[int, str] = {}
    for key, tensor in held:
        keys.setdefault(id(tensor), key)
    attributes: dict[str, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found = getattr(graph, str(node.target))
            node.target = keys.get(id(found), str(node.target))
            attributes[node.target] = found
    return GraphModule(attributes, graph.graph)
