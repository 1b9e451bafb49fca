"""Door out for flat torch graphs: a GraphModule or an ExportedProgram, edited at the matched sites and nowhere else.

The result is of the same kind and is called the same way; dynamic dimensions stay dynamic. The input object is left
as it is, and tensors that did not change are shared with it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from passes.dataflow import Flow
from passes.match.attention import Matches, find_attention
from passes.refused_readers import refused_readers
from passes.site import Refusal
from passes.targets.block import BlockReplacement
from passes.targets.grouped_query import averaged
from passes.targets.replacement import Replacement
from rewriter.capture.torch_export import (
    hides_attention,
    is_functional,
    is_mapped,
    opened,
    view_graph_module,
    view_program,
    with_linear_maps,
)
from rewriter.errors import UnsupportedModel, UsageError, first_line
from rewriter.install.fx_check import require_equal
from rewriter.install.fx_editor import Editor
from rewriter.install.fx_mixing import MixPlan
from rewriter.install.fx_plan import SitePlan
from rewriter.install.fx_repeat import RepeatPlan, apply_repeats, plan_repeats
from rewriter.install.fx_routed import BlockPlan, Routed, plan_block
from rewriter.install.fx_store import ModuleStore, ProgramStore
from rewriter.install.kept import Kept
from rewriter.module_modes import evaluating

Decide = Callable[[Flow, Matches], Sequence[Replacement]]
"""Called with what was found; returns what to install (nothing, to leave the graph alone)."""

DecideBlocks = Callable[[], Sequence[BlockReplacement]]
"""Called behind that; returns what to install in feed-forward blocks' places."""

Kind = TypeVar("Kind", GraphModule, ExportedProgram)


@dataclass(frozen=True)
class GraphRewrite(Generic[Kind]):
    """A rewritten graph and what was done.

    Attributes:
        model: of the kind that was given; the very object if nothing was installed.
        flow, matches: what was captured and found.
        replacements: what was installed.
        refused: (site name, reason) for replacements that this door could not install.
        kept: sites that keep the attention they had, on repeated heads.
        blocks: what was installed in feed-forward blocks' places.
        notes: for the report, by site.
    """

    model: Kind
    flow: Flow
    matches: Matches
    replacements: tuple[Replacement, ...]
    refused: tuple[tuple[str, str], ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict)
    blocks: tuple[BlockReplacement, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether nothing that was installed loses anything."""
        return all(r.exact for r in self.replacements) and all(b.exact for b in self.blocks)


def rewrite_exported_program(
    program: ExportedProgram,
    decide: Decide,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    blocks: DecideBlocks = tuple,
    *,
    hidden_biases: bool = False,
) -> GraphRewrite[ExportedProgram]:
    """Rewrite an exported program; its call, inputs and dynamic shapes stay as they are.

    Args:
        args, kwargs: what to record values on; the program's own example inputs if both are None.
        hidden_biases: as in `find_attention`.

    Raises:
        UsageError: if there are no example inputs, or they do not fit the program.
        UnsupportedModel: if what was decided cannot be installed at any site, or fails its check.
    """
    if args is None and kwargs is None:
        if program.example_inputs is None:
            raise UsageError("the exported program carries no example inputs", hint="pass example inputs")
        args, kwargs = program.example_inputs
    program = opened(program)
    args, kwargs = _as_exported(program.call_spec.in_spec, args or (), kwargs or {})
    view = view_program(program, args, kwargs)
    matches = find_attention(view.flow, hidden_biases=hidden_biases)
    chosen = decide(view.flow, matches)
    for_blocks = blocks()

    def edited(why: str | None) -> GraphRewrite[ExportedProgram]:
        store = ProgramStore(program)
        done = _edit(Editor(view, store), chosen, for_blocks, matches.refusals, why)
        if not done.replacements and not done.blocks:
            return GraphRewrite(program, view.flow, matches, (), done.refused)
        result = store.finish()
        parameters = {**result.state_dict, **result.constants}
        keys = {s.arg.name: s.target for s in result.graph_signature.input_specs if s.target is not None}
        bound = {n: parameters[keys[n]] if n in keys else view.bound[n] for n in _placeholders(result.graph_module)}
        require_equal(view, result.graph_module, bound, done.replacements, done.attended, done.apart, done.routed)
        return done.as_result(result, view.flow, matches)

    return _proved(edited)


def rewrite_graph_module(
    module: GraphModule,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    decide: Decide,
    blocks: DecideBlocks = tuple,
    *,
    hidden_biases: bool = False,
) -> GraphRewrite[GraphModule]:
    """Rewrite a graph module, recorded on these inputs; the result is called the same way.

    A graph of aten operators is edited as it is. Any other (from symbolic tracing, say, or one that writes into slices)
    is exported first, for inference, with dimensions of size 2 and more dynamic where torch.export accepts that.
    `hidden_biases` is as in `find_attention`.

    Raises:
        UsageError: if the inputs do not fit the graph.
        UnsupportedModel: if the graph cannot be exported, or what was decided cannot be installed at any site or fails
            its check.
    """
    plain = is_flat(module) and is_functional(module.graph) and not hides_attention(module)
    flat = module if plain else _exported(module, args, kwargs)
    view = view_graph_module(flat, _bound(flat, args, kwargs))
    matches = find_attention(view.flow, hidden_biases=hidden_biases)
    chosen = decide(view.flow, matches)
    for_blocks = blocks()

    def edited(why: str | None) -> GraphRewrite[GraphModule]:
        store = ModuleStore(flat)
        done = _edit(Editor(view, store), chosen, for_blocks, matches.refusals, why)
        if not done.replacements and not done.blocks:
            return GraphRewrite(module, view.flow, matches, (), done.refused)
        result = store.finish()
        require_equal(view, result, view.bound, done.replacements, done.attended, done.apart, done.routed)
        return done.as_result(result, view.flow, matches)

    return _proved(edited)


def is_flat(module: GraphModule) -> bool:
    """Whether a graph consists of aten operators (and arithmetic on sizes) and reads its weights by get_attr."""
    return all(_is_flat_node(n) for n in module.graph.nodes)


def _is_flat_node(node: FxNode) -> bool:
    if node.op == "call_function":
        module = getattr(node.target, "__module__", "")
        symbolic = getattr(node.target, "__name__", "").lstrip("_").startswith("sym_")
        overload = isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
        return overload or module in {operator.add.__module__, "math"} or symbolic or is_mapped(node)
    if node.op == "call_module":
        return not node.users  # a check of the inputs, as exported graph modules have
    return node.op != "call_method"


# ------------------------------------------------------------ the edit


def _proved(edited: Callable[[str | None], GraphRewrite[Kind]]) -> GraphRewrite[Kind]:
    """With attentions written anew; where that does not compute what it should, with those that were there kept.

    `edited` takes why all are to be kept, None to write anew what can be.
    """
    try:
        return edited(None)
    except UnsupportedModel as error:
        try:
            return edited(f"written anew it is not what it was: {first_line(error)}")
        except UnsupportedModel:
            raise error from None


@dataclass(frozen=True)
class _Edited:
    replacements: tuple[Replacement, ...]
    refused: tuple[tuple[str, str], ...]
    kept: Mapping[str, Kept]
    attended: Mapping[str, str]
    apart: frozenset[str]
    blocks: tuple[BlockReplacement, ...] = ()
    routed: tuple[Routed, ...] = ()

    def as_result(self, model: Kind, flow: Flow, matches: Matches) -> GraphRewrite[Kind]:
        notes = {r.replacement.site.name: r.note for r in self.routed if r.note}
        return GraphRewrite(model, flow, matches, self.replacements, self.refused, self.kept, self.blocks, notes)


def _edit(
    editor: Editor,
    replacements: Sequence[Replacement],
    blocks: Sequence[BlockReplacement],
    refusals: Sequence[Refusal],
    why: str | None = None,
) -> _Edited:
    """`why` is a reason to write no attention anew."""
    plans, repeats, refused = _plan(editor, replacements, refusals, why)
    block_plans, unplanned = _plan_blocks(editor, blocks)
    refused |= unplanned
    planned = {p.replacement.site.name for p in plans} | {p.replacement.site.name for p in repeats}
    if (replacements or blocks) and not planned and not block_plans:
        raise UnsupportedModel("; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3]))
    for plan in (*plans, *block_plans):
        editor.apply(plan)
    apply_repeats(editor, repeats)
    repeated = {p.replacement.site.name: p.replacement for p in repeats}
    done = tuple(repeated.get(r.site.name, r) for r in replacements if r.site.name in planned)
    replaced = tuple(p.replacement for p in block_plans)
    if done or replaced:
        editor.finish([*(r.site for r in done), *(b.site for b in replaced)])
    attended = {name: node.name for name, node in editor.attended.items()}
    kept = {p.replacement.site.name: Kept(False, True, p.why) for p in repeats}
    apart = frozenset(p.replacement.site.name for p in plans if isinstance(p, SitePlan) and p.apart)
    return _Edited(done, tuple(refused.items()), kept, attended, apart, replaced, tuple(editor.routed))


def _plan_blocks(editor: Editor, replacements: Sequence[BlockReplacement]) -> tuple[list[BlockPlan], dict[str, str]]:
    """Blocks to be replaced, and reasons by site for the rest."""
    plans: list[BlockPlan] = []
    refused: dict[str, str] = {}
    for replacement in replacements:
        try:
            plans.append(plan_block(editor, replacement))
        except UnsupportedModel as error:
            refused[replacement.site.name] = str(error)
    return plans, refused


def _plan(
    editor: Editor, replacements: Sequence[Replacement], refusals: Sequence[Refusal], why: str | None
) -> tuple[list[SitePlan | MixPlan], list[RepeatPlan], dict[str, str]]:
    """Sites to be written anew, sites to be repeated, and reasons by site for the rest.

    Sites that share a weight are edited together and in the same way, or not at all.
    """
    plans: list[SitePlan | MixPlan] = []
    others = refused_readers(editor.flow, (r.site for r in replacements), refusals)
    failed: dict[str, str] = {}
    for replacement in replacements:
        if why is not None:
            failed[replacement.site.name] = why
            continue
        try:
            plans.append(editor.plan(replacement.together(), apart=replacement.site.name in others))
        except (UnsupportedModel, ValueError) as error:
            failed[replacement.site.name] = str(error)
    failed = _spread_over_shared(replacements, failed, "it shares its weights with {}, which cannot be written anew")
    repeats: list[RepeatPlan] = []
    refused: dict[str, str] = {}
    for replacement in replacements:
        name = replacement.site.name
        other = replacement.mixing or replacement.linear or replacement.decoupled or replacement.pattern
        if name in failed and name in others:
            refused[name] = f"{failed[name]}; {others[name]}, which is not rewritten, reads the same keys or values"
        elif name in failed and other:
            refused[name] = failed[name]
        elif name in failed:
            try:
                repeats.append(_repeat(editor, replacement, failed[name]))
            except UnsupportedModel as error:
                refused[name] = f"{failed[name]}; {error}"
    refused = _spread_over_shared(replacements, refused, "it shares its weights with {}, which cannot be rewritten")
    plans = [p for p in plans if p.replacement.site.name not in failed]
    return plans, [p for p in repeats if p.replacement.site.name not in refused], refused


def _repeat(editor: Editor, replacement: Replacement, why: str) -> RepeatPlan:
    """Heads are averaged where queries or output cannot follow a merge that nobody asked for."""
    try:
        return plan_repeats(editor, replacement, why)
    except UnsupportedModel as error:
        if not (replacement.turned and replacement.may_average):
            raise
        return plan_repeats(editor, averaged(editor.flow, replacement, str(error)), why)


def _spread_over_shared(
    replacements: Sequence[Replacement], reasons: Mapping[str, str], because: str
) -> dict[str, str]:
    """`reasons` by site, and one for each further site that shares a weight with such a site."""
    found = dict(reasons)
    while True:
        shared = {w: r.site.name for r in replacements if r.site.name in found for w in _weights(r)}
        more = {
            r.site.name: because.format(next(shared[w] for w in _weights(r) if w in shared))
            for r in replacements
            if r.site.name not in found and _weights(r) & set(shared)
        }
        if not more:
            return found
        found |= more


def _weights(replacement: Replacement) -> set[str]:
    return {operand.projection.weight for _, operand in replacement.site.shared}


# ------------------------------------------------------------ inputs


def _placeholders(module: GraphModule) -> list[str]:
    return [n.name for n in module.graph.nodes if n.op == "placeholder"]


def _as_exported(
    spec: pytree.TreeSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs with keywords in the order in which the program was exported."""
    wanted_args, wanted = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    if len(args) != len(wanted_args) or set(kwargs) != set(wanted):
        raise UsageError(
            f"the program takes {len(wanted_args)} positional inputs and the keywords {sorted(wanted)}, "
            f"not {len(args)} and {sorted(kwargs)}",
            hint="pass inputs the way the program was exported",
        )
    ordered = {name: kwargs[name] for name in wanted}
    if len(pytree.tree_leaves((args, ordered))) != spec.num_leaves:
        raise UsageError("the inputs are nested otherwise than those the program was exported with")
    return args, ordered


def _bound(module: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What each placeholder holds in a call with these inputs."""
    names = _placeholders(module)
    spec = getattr(module, "_in_spec", None)
    if spec is not None:
        leaves = pytree.tree_leaves(_as_exported(spec, args, kwargs))
        return dict(zip(names, leaves, strict=True))
    given = _call(module, args, kwargs)
    given.apply_defaults()
    targets = {n.name: str(n.target).lstrip("*") for n in module.graph.nodes if n.op == "placeholder"}
    return {name: given.arguments[targets[name]] for name in names}


def _call(module: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    try:
        return inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"the inputs do not fit the graph: {error}", hint="pass example inputs") from error


# ------------------------------------------------------------ symbolic traces


def _exported(module: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphModule:
    """A traced graph as one of aten operators, with the trace's signature."""
    call = _call(module, args, kwargs)
    dynamic = {name: pytree.tree_map(_dimensions, value) for name, value in call.arguments.items()}
    with evaluating(module):
        program = _try_export(module, call, dynamic) or _try_export(module, call, None)
    assert program is not None
    return _with_signature(program, list(call.arguments))


def _dimensions(leaf: Any) -> dict[int, Any] | None:
    # torch.export fixes dimensions of size 0 and 1
    return {a: Dim.AUTO for a, n in enumerate(leaf.shape) if n > 1} if isinstance(leaf, torch.Tensor) else None


def _try_export(module: GraphModule, call: inspect.BoundArguments, dynamic: Any) -> ExportedProgram | None:
    """None if it fails with dynamic shapes; without, that is an error."""
    try:
        with torch.no_grad():
            program = torch.export.export(module, call.args, call.kwargs, dynamic_shapes=dynamic, strict=False)
            return with_linear_maps(opened(program))
    except Exception as error:  # torch.export raises many unrelated types
        if dynamic is not None:
            return None
        raise UnsupportedModel(
            f"torch.export could not take the graph: {first_line(error)}",
            hint="pass example inputs that the graph accepts",
        ) from error


def _with_signature(program: ExportedProgram, names: list[str]) -> GraphModule:
    """The program as a graph module with a plain signature (positional or keyword) and the trace's output."""
    module = program.module()
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    output = next(n for n in module.graph.nodes if n.op == "output")
    if [h.target for h in holders] != names or not isinstance(output.args[0], (tuple, list)):
        return module  # nested inputs keep torch.export's calling convention
    result = pytree.tree_unflatten(list(output.args[0]), program.call_spec.out_spec)
    output.args = (result,)
    graph = module.graph
    graph.set_codegen(CodeGen())
    return GraphModule(module, graph)
