"""Door in for PyTorch: a module is exported (torch.export, training IR) and seen as a Flow.

The exported graph is for analysis only; what a person gets back is their own module, edited.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from passes.dataflow import Array, Flow, Node, Value, Weight
from passes.products import with_products
from passes.softmaxes import with_softmaxes
from rewriter.capture.aten_names import Literal, canonical
from rewriter.capture.flex_attention import OPERATOR, UNREAD, operands, written_out
from rewriter.capture.folded_adapters import fold_adapters
from rewriter.capture.folded_norms import fold_norms
from rewriter.capture.late_clips import clip_behind_cuts
from rewriter.capture.own_containers import own
from rewriter.capture.pointwise import operator_name, write_as_linear
from rewriter.capture.quiet_export import quiet_export
from rewriter.capture.score_order import order_scores
from rewriter.capture.torch_trace import trace, writes_through_views
from rewriter.errors import NotExportable, UnsupportedModel, first_line
from rewriter.module_modes import evaluating, unchanged

_REGIONS = frozenset({"wrap_with_autocast", "wrap_with_set_grad_enabled"})
_ANCHORS = frozenset({"softmax", "_softmax", "scaled_dot_product_attention"})


@dataclass(frozen=True)
class TorchCapture:
    """An exported program and its view.

    Attributes:
        program: what torch.export gave; None where it refused, and one run was traced instead.
        flow: the view; `Weight.name` is the state-dict key.
    """

    program: torch.export.ExportedProgram | None
    flow: Flow


@dataclass(frozen=True)
class GraphView:
    """A flat graph and its view.

    Attributes:
        module: the graph that was run.
        flow: the view.
        names: for each fx node of the graph that holds a tensor, the value that the flow knows it by.
        bound: what each placeholder held in the recording, by node name.
        tensors: recorded tensors by value, in their own dtype.
    """

    module: GraphModule
    flow: Flow
    names: Mapping[str, Value]
    bound: Mapping[str, Any]
    tensors: Mapping[Value, torch.Tensor]


def capture(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TorchCapture:
    """Export `module` for these example inputs and record every value.

    Where torch.export refuses (control flow that depends on data), one run is traced. Raises UnsupportedModel with the
    exporter's reason if that fails too.
    """
    try:
        program = exported(module, args, kwargs)
    except NotExportable:
        traced = _traced(module, args, kwargs)
        if traced is None:
            raise
        return traced
    try:
        return view(program, args, kwargs)
    except RuntimeError as error:  # e.g. a buffer that the forward makes on its first call
        raise UnsupportedModel(
            f"the exported program does not run on the inputs it was exported with: {first_line(error)}",
            hint="call the model once before, so that what its forward caches exists",
        ) from error


def _traced(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TorchCapture | None:
    """One run instead of an export; None if it cannot be traced either."""
    try:
        with evaluating(module), unchanged(module):
            graph, bound = trace(module, args, kwargs)
        return TorchCapture(None, view_graph_module(graph, bound).flow)
    except Exception:  # the exporter's reason, which comes first, is the one to tell
        return None


def exported(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """What torch.export makes of the module in eval mode; raises NotExportable with its reason if it fails."""
    try:
        with evaluating(module), torch.no_grad(), unchanged(module), quiet_export():
            program = functional(torch.export.export(module, own(args), own(dict(kwargs)), strict=False))
    except Exception as error:  # torch.export raises many unrelated types
        scripted = next((n for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
        if scripted is not None:
            raise NotExportable(
                f"{scripted} is compiled to TorchScript, which torch.export does not see through",
                hint="build the model with the module that it was made from",
            ) from error
        if any(_attends_flexibly(m) for m in module.modules()):
            raise NotExportable(
                f"its attention runs on flex_attention, which torch.export did not take: {first_line(error)}",
                hint='load the model with attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")',
            ) from error
        raise NotExportable(
            f"torch.export could not capture the model: {first_line(error)}",
            hint="pass example_inputs that the model accepts, or make its forward exportable",
        ) from error
    return with_linear_maps(program)


def _attends_flexibly(module: torch.nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "flex_attention"


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without what cannot be recorded node by node: writing into slices, and vmap; itself if it has none.

    No operator is decomposed, but none works in place any more.
    """
    return program if is_functional(program.graph) else program.run_decompositions({})


def opened(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """As `functional`, and without regions (autocast) around attentions, whose casts are written out."""
    return program.run_decompositions({}) if hides_attention(program.graph_module) else functional(program)


def hides_attention(module: GraphModule) -> bool:
    """Whether an attention lies in a region that the graph wraps into one call."""
    regions = [
        operator.attrgetter(str(a.target))(module)
        for fx in module.graph.nodes
        if getattr(fx.target, "__name__", "") in _REGIONS
        for a in fx.all_input_nodes
        if a.op == "get_attr"
    ]
    inner = [r for r in regions if isinstance(r, GraphModule)]
    return any(operator_name(n) in _ANCHORS for r in inner for n in r.graph.nodes) or any(map(hides_attention, inner))


def is_functional(graph: torch.fx.Graph) -> bool:
    """Whether each node of a graph that computes on hidden states can be recorded by itself.

    What flex_attention is given as masks is made by vmap, too, of positions alone.
    """
    if writes_through_views(graph):
        return False
    return any(fx.target is OPERATOR for fx in graph.nodes) or not any(is_mapped(fx) for fx in graph.nodes)


def is_mapped(fx: FxNode) -> bool:
    """Whether a node is part of a vmap, within which tensors lack the axis that is mapped over."""
    return str(getattr(fx.target, "__module__", "")).startswith("torch._functorch")


def with_linear_maps(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, edited in place: convolutions, sums and batch norms by which attentions project are linear
    layers, and scores have their axes in attention's order."""
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target is None}
    written = write_as_linear(program.graph) | fold_adapters(program.graph, inputs) | fold_norms(program.graph)
    if written | clip_behind_cuts(program.graph) | order_scores(program.graph):
        program.graph_module.recompile()
    return program


def view(program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TorchCapture:
    """The Flow of an exported program, with its values recorded on these inputs."""
    return TorchCapture(program, view_program(program, args, kwargs).flow)


def view_program(program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphView:
    """As `view`, with what a rewrite of the graph itself needs."""
    stored = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
    bound = placeholders(program, args, kwargs)
    kinds = [str(t.dtype).removeprefix("torch.") for t in program.state_dict.values() if t.is_floating_point()]
    return _view(program.graph_module, bound, stored, kinds)


def placeholders(
    program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What each placeholder of a program holds in a call, by node name: weights and inputs."""
    held = {**program.state_dict, **program.constants}
    stored = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
    flat = iter(torch.utils._pytree.arg_tree_leaves(*args, **kwargs))
    names = [fx.name for fx in program.graph.nodes if fx.op == "placeholder"]
    return {name: held[stored[name]] if name in stored else next(flat) for name in names}


def view_graph_module(module: GraphModule, bound: Mapping[str, Any]) -> GraphView:
    """A graph module of aten operators that reads its weights by get_attr; `bound` holds its inputs by node name."""
    kinds = [str(t.dtype).removeprefix("torch.") for t in module.parameters() if t.is_floating_point()]
    return _view(module, bound, {}, kinds)


def _view(module: GraphModule, bound: Mapping[str, Any], stored: Mapping[str, str], kinds: Sequence[str]) -> GraphView:
    builder = _Builder(module)
    with torch.no_grad():
        values = builder.run(bound, stored)
    flow = builder.flow(values, max(set(kinds), key=kinds.count) if kinds else "float32")
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return GraphView(module, flow, builder.names, bound, tensors)


class _Builder:
    """Walks the graph once, running it and writing down a canonical node for each call."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.values: dict[Value, Any] = {}
        self.nodes: list[Node] = []
        self.weights: dict[Value, Weight] = {}
        self.inputs: list[Value] = []
        self.attributes: dict[str, Value] = {}

    def run(self, bound: Mapping[str, Any], stored: Mapping[str, str]) -> dict[Value, Any]:
        """`bound`: placeholders' values; `stored`: the state-dict key of those that are weights."""
        env = dict(bound)
        self.names: dict[str, Value] = {name: name for name in bound}
        for fx in self.module.graph.nodes:
            if fx.op != "placeholder" or not isinstance(env[fx.name], torch.Tensor):
                continue
            if fx.name in stored:
                self._weight(fx.name, stored[fx.name], env[fx.name], len(fx.users))
            else:
                self.inputs.append(fx.name)
                self.values[fx.name] = env[fx.name]
        self.outputs = self._graph(self.module, env, "", self.names)
        return self.values

    def _weight(self, value: Value, target: str, tensor: torch.Tensor, readers: int) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.weights[value] = Weight(target, tuple(tensor.shape), dtype, readers)
        self.values[value] = tensor

    def _graph(self, module: GraphModule, env: dict[str, Any], prefix: str, names: dict[str, Value]) -> Any:
        """Run one graph; `env` holds results by fx name, `names` the value name each stands for."""
        result: Any = None
        for fx in module.graph.nodes:
            if fx.op == "get_attr":
                env[fx.name] = operator.attrgetter(fx.target)(module)
                # one attribute read at several places is one weight
                value = names[fx.name] = self.attributes.setdefault(f"{prefix}{fx.target}", prefix + fx.name)
                if isinstance(env[fx.name], torch.Tensor):
                    before = self.weights[value].readers if value in self.weights else 0
                    self._weight(value, fx.target, env[fx.name], before + len(fx.users))
            elif fx.op == "call_function":
                self._call(module, fx, env, prefix, names)
            elif fx.op == "output":
                result = fx.args[0]
        return torch.fx.node.map_arg(result, lambda n: names.get(n.name, ""))

    def _call(self, module: GraphModule, fx: FxNode, env: dict[str, Any], prefix: str, names: dict[str, Value]) -> None:
        args: Any = torch.fx.node.map_arg(fx.args, lambda n: env[n.name])
        kwargs: Any = torch.fx.node.map_arg(fx.kwargs, lambda n: env[n.name])
        if fx.target is OPERATOR:
            self._attend(fx, args, kwargs, env, prefix, names)
            return
        inner = next((a for a in args if isinstance(a, GraphModule)), None)
        if inner is not None:
            start = next(i for i, a in enumerate(args) if a is inner) + 1
            with _around(fx, args):
                self._inline(fx, inner, fx.args[start:], env, prefix, names)
            return
        assert callable(fx.target)
        if fx.target is operator.getitem:
            env[fx.name] = args[0][args[1]]
            names.setdefault(fx.name, prefix + fx.name)
            self.values[names[fx.name]] = env[fx.name]
            return
        args, kwargs = _guard_mutation(fx, args, kwargs)
        env[fx.name] = fx.target(*args, **kwargs)
        names[fx.name] = prefix + fx.name
        self._note(fx, env, prefix, names)

    def _inline(
        self,
        fx: FxNode,
        inner: GraphModule,
        arguments: Sequence[Any],
        env: dict[str, Any],
        prefix: str,
        names: dict[str, Value],
    ) -> None:
        """A higher-order operator that wraps a region (autocast, no_grad) is seen through."""
        holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        scope = f"{prefix}{fx.name}."
        inside: dict[str, Any] = {}
        inside_names: dict[str, Value] = {}
        for holder, argument in zip(holders, arguments, strict=True):
            inside[holder.name] = env[argument.name] if isinstance(argument, FxNode) else argument
            if isinstance(argument, FxNode):
                inside_names[holder.name] = names.get(argument.name, "")
        outer = self._graph(inner, inside, scope, inside_names)
        pieces = outer if isinstance(outer, (tuple, list)) else (outer,)
        env[fx.name] = tuple(self.values.get(p) for p in pieces)
        for user in fx.users:
            if user.target is operator.getitem and user.args[1] < len(pieces):  # type: ignore[operator]
                names[user.name] = pieces[user.args[1]]  # type: ignore[index]

    def _attend(
        self,
        fx: FxNode,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        env: dict[str, Any],
        prefix: str,
        names: dict[str, Value],
    ) -> None:
        """flex_attention in plain operators; where that is not the same, an attention that is not read."""
        result = OPERATOR(*args, **kwargs)
        inner = written_out(fx, args, result)
        if inner is not None:
            for node in inner.graph.nodes:
                node.meta["nn_module_stack"] = fx.meta.get("nn_module_stack")
            self._inline(fx, inner, operands(fx), env, prefix, names)
            env[fx.name] = (env[fx.name][0], *result[1:])
            return
        env[fx.name] = result
        names[fx.name] = prefix + fx.name
        self._note(fx, env, prefix, names)
        self.nodes[-1] = replace(self.nodes[-1], op="Attention", attrs={"unread": UNREAD})

    def _note(self, fx: FxNode, env: dict[str, Any], prefix: str, names: dict[str, Value]) -> None:
        result = env[fx.name]
        if isinstance(result, (tuple, list)):
            outputs = [""] * len(result)
            for user in fx.users:
                if user.target is operator.getitem:
                    outputs[int(user.args[1])] = prefix + user.name  # type: ignore[arg-type]
        elif isinstance(result, torch.Tensor):
            outputs = [names[fx.name]]
            self.values[names[fx.name]] = result
        else:
            return
        op = canonical(fx, env)
        tensors = [a for a in op.operands if isinstance(a, Literal) or isinstance(env.get(a.name), torch.Tensor)]
        self.nodes.append(
            Node(
                index=len(self.nodes),
                op=op.name,
                domain="aten",
                attrs=op.attrs,
                inputs=tuple(
                    self._literal(prefix + fx.name, a) if isinstance(a, Literal) else names[a.name] for a in tensors
                ),
                outputs=tuple(outputs),
                evaluate=_evaluator(fx, tensors, {n: env[n] for n in (a.name for a in fx.all_input_nodes)}),
                owner=_owner(fx),
                name=fx.name,
                likeness=partial(_likeness, fx, tensors),
            )
        )

    def _literal(self, owner: str, literal: Literal) -> Value:
        value = f"{owner}.argument{literal.position}"
        self.values[value] = torch.tensor(literal.number)
        self.weights[value] = Weight("", (), "float32", 1)
        return value

    def flow(self, values: dict[Value, Any], dtype: str) -> Flow:
        def read(name: Value) -> Array:
            return to_numpy(values[name])

        produced = {v for n in self.nodes for v in n.outputs}
        leaves = torch.utils._pytree.tree_leaves(self.outputs)
        outputs = tuple(v for v in leaves if isinstance(v, str) and v in produced)
        nodes = with_softmaxes(with_products(self.nodes))
        return Flow(nodes, tuple(self.inputs), outputs, self.weights, read, dtype, _other_dtypes(values, dtype))


def _other_dtypes(values: Mapping[Value, Any], dtype: str) -> dict[Value, str]:
    """Of floating tensors in another dtype than this."""
    floating = {v: t for v, t in values.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    kinds = {v: str(t.dtype).removeprefix("torch.") for v, t in floating.items()}
    return {v: kind for v, kind in kinds.items() if kind != dtype}


def _around(fx: FxNode, args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """What a region runs in, where that changes what its operators give."""
    if getattr(fx.target, "__name__", "") == "wrap_with_autocast":
        return torch.autocast(*args[:4])
    return contextlib.nullcontext()


def _guard_mutation(fx: FxNode, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """In-place operators run on a copy, so that what was recorded before them stays as it was."""
    schema = getattr(fx.target, "_schema", None)
    if schema is None or not schema.is_mutable or not args:
        return args, kwargs
    return (args[0].clone(), *args[1:]), kwargs


def _evaluator(
    fx: FxNode, operands: Sequence[FxNode | Literal], env: Mapping[str, Any]
) -> Callable[[Sequence[Array | None]], tuple[Array, ...]]:
    def evaluate(arrays: Sequence[Array | None]) -> tuple[Array, ...]:
        given = {a.name: x for a, x in zip(operands, arrays, strict=True) if isinstance(a, FxNode)}
        literal = {a.position: x for a, x in zip(operands, arrays, strict=True) if isinstance(a, Literal)}

        def load(node: FxNode) -> Any:
            array = given.get(node.name)
            if array is None:
                return env[node.name]
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            return _strided_like(tensor, env[node.name]) if fx.target is torch.ops.aten.as_strided.default else tensor

        args = torch.fx.node.map_arg(fx.args, load)
        kwargs = torch.fx.node.map_arg(fx.kwargs, load)
        args = tuple(a if (x := literal.get(i)) is None else _literal(fx, i, x) for i, a in enumerate(args))
        args, kwargs = _guard_mutation(fx, args, kwargs)
        assert callable(fx.target)
        with torch.no_grad():
            result = fx.target(*args, **kwargs)
        pieces = result if isinstance(result, (tuple, list)) else (result,)
        return tuple(p.numpy() for p in pieces)

    return evaluate


def _strided_like(tensor: torch.Tensor, recorded: Any) -> torch.Tensor:
    """The same numbers laid out in memory as what was recorded, which as_strided counts in."""
    if not isinstance(recorded, torch.Tensor) or recorded.shape != tensor.shape:
        return tensor
    return torch.empty_strided(recorded.shape, recorded.stride(), dtype=tensor.dtype).copy_(tensor)


def _literal(fx: FxNode, position: int, array: Array) -> torch.Tensor | float:
    """What an operator is given in a number's place: a tensor, but where it takes nothing but numbers."""
    schema = getattr(fx.target, "_schema", None)
    arguments = schema.arguments if schema is not None else ()
    number = position < len(arguments) and str(arguments[position].type) == "number" and array.size == 1
    return array.item() if number else torch.from_numpy(array)


def _likeness(fx: FxNode, operands: Sequence[FxNode | Literal]) -> str | None:
    """The operator and its other arguments; None if something that is no operand reaches it from other nodes."""
    numbers = {a.name: i for i, a in enumerate(operands) if isinstance(a, FxNode)}
    if any(n.name not in numbers for n in fx.all_input_nodes):
        return None
    literal = {a.position for a in operands if isinstance(a, Literal)}
    args = [None if i in literal else _numbered(a, numbers) for i, a in enumerate(fx.args)]
    return f"{fx.target} {args!r} {_numbered(fx.kwargs, numbers)!r}"


def _numbered(argument: Any, numbers: Mapping[str, int]) -> Any:
    """An argument with operands as what they are by number."""
    if isinstance(argument, FxNode):
        return f"operand {numbers[argument.name]}"
    if isinstance(argument, (list, tuple)):
        return [_numbered(a, numbers) for a in argument]
    if isinstance(argument, Mapping):
        return {k: _numbered(a, numbers) for k, a in argument.items()}
    return argument


def _owner(fx: FxNode) -> str:
    stack = fx.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path)


def to_numpy(tensor: Any) -> Array:
    """numpy copy-free where possible; half floats are widened to float32."""
    if not isinstance(tensor, torch.Tensor):
        raise KeyError("not a recorded tensor")
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return np.asarray(tensor.cpu().numpy())
