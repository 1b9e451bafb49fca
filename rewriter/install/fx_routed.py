"""What routes tokens in a flat aten graph: light and heavy branches in an attention's or a feed-forward block's place,
and experts. Each is its torch body, exported by itself and copied node by node.

Shape legend: B batch, S tokens, H features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from codegen.conditional import ConditionalAttention, ConditionalFeedForward
from codegen.ops.conditional_attention import torch_body as attention
from codegen.ops.conditional_feed_forward import torch_body as branches
from codegen.ops.mixture_of_experts import torch_body as experts
from codegen.spec import MixtureOfExperts
from passes.dataflow import Value
from passes.hidden_keys import padding_obstacle
from passes.targets.block import BlockReplacement, given_to
from passes.targets.replacement import Replacement
from rewriter.decision import OF_GRAPHS
from rewriter.errors import UnsupportedModel
from rewriter.install.fx_body import copied, exported_body
from rewriter.install.fx_emit import HINT, aten
from rewriter.install.fx_padding import shown_tokens

if TYPE_CHECKING:
    from rewriter.install.fx_editor import Editor

BATCH, TOKENS = 3, 37
"""Sizes to export at; any would do."""

ONE_GROUP = "the graph leaves sizes open, so all tokens of a call are one group, however many"

RoutedSpec = ConditionalAttention | ConditionalFeedForward | MixtureOfExperts


@dataclass(frozen=True)
class BlockPlan:
    """A block whose input and output are nodes of the graph."""

    replacement: BlockReplacement
    input: Value


@dataclass(frozen=True)
class Routed:
    """What was written at one place, for its proof.

    Attributes:
        value: of the original, whose place `result` takes.
        given: hidden states that it reads.
        note: for the report.
    """

    replacement: Replacement | BlockReplacement
    value: Value
    given: FxNode
    result: FxNode
    note: str = ""

    def expected(self, given: Tensor, like: Tensor) -> Tensor:
        """What the torch body, run as it is, makes of these hidden states, laid out and stored like `like`."""
        spec, r = self.replacement.spec, self.replacement
        assert isinstance(spec, RoutedSpec)
        held = {name: torch.from_numpy(np.array(r.tensors[name])).to(given.device) for name in spec.shapes}
        wide = torch.promote_types(given.dtype, torch.float32)
        if isinstance(r, Replacement):
            batch_first = r.around.batch_first
            shown = None if r.shown is None else torch.from_numpy(np.ascontiguousarray(r.shown)).to(given.device)
        else:
            batch_first, shown = r.batch_first or isinstance(spec, MixtureOfExperts), None
        x = given.to(wide).reshape(1, *given.shape) if given.dim() == 2 else given.to(wide)
        ordered = x if batch_first else x.transpose(0, 1)
        held = {name: tensor.to(wide) for name, tensor in held.items()}
        groups = 1 if self.note else _groups(spec, (x.shape[0], x.shape[1]))
        found: Tensor = _Body(spec, groups)(ordered, tuple(held.values()), shown, None)
        return (found if batch_first else found.transpose(0, 1)).reshape(like.shape).to(like.dtype)


def require_padding_told(editor: Editor, replacement: Replacement) -> None:
    """Raises UnsupportedModel where conditional attention cannot tell which tokens are padding."""
    reason = padding_obstacle(editor.flow, replacement.site)
    if reason is not None:
        raise UnsupportedModel(reason, hint=HINT)


def conditional_attention(editor: Editor, like: FxNode, replacement: Replacement, wide: FxNode) -> FxNode:
    """Of hidden states [B, S, H] or [S, B, H] in float32 at least; laid out alike."""
    spec, call, first = replacement.spec, editor.emitter.call, replacement.around.batch_first
    assert isinstance(spec, ConditionalAttention)
    ordered = wide if first else call(like, aten.transpose.int, wide, 0, 1)
    shown = shown_tokens(editor, like, replacement.site, ordered)
    held = [editor.parameters.of_mix(replacement, name) for name in spec.shapes]
    table = editor.parameters.table(replacement.site.name, attention.numbers_of(spec)) if spec.buckets else None
    dtype = editor.view.tensors[replacement.around.input].dtype
    body = _body(spec, torch.promote_types(dtype, torch.float32), None, shown is not None)
    operands = [ordered, *held, *(n for n in (shown, table) if n is not None)]
    found = copied(editor.emitter, like, body, operands)
    return found if first else call(like, aten.contiguous.default, call(like, aten.transpose.int, found, 0, 1))


def plan_block(editor: Editor, replacement: BlockReplacement) -> BlockPlan:
    """Raises UnsupportedModel where a wrapped region hides the block's input or output, and for gated units."""
    spec, site, flow = replacement.spec, replacement.site, editor.flow
    if not isinstance(spec, (ConditionalFeedForward, MixtureOfExperts)):
        raise UnsupportedModel(f"gated attention units are not written into graphs; {OF_GRAPHS}")
    given = Value(site.up.projection.input) if isinstance(spec, MixtureOfExperts) else given_to(flow, site)
    for value in (given, site.output):
        editor.node(value)
        if len(flow.shape(value)) not in (2, 3):
            raise UnsupportedModel("its tokens run over more axes than a batch and a sequence", hint=HINT)
    return BlockPlan(replacement, given)


def apply_block(editor: Editor, plan: BlockPlan) -> Routed:
    """Put the new computation in the place of the block's output."""
    replacement, site, call = plan.replacement, plan.replacement.site, editor.emitter.call
    spec = replacement.spec
    assert isinstance(spec, (ConditionalFeedForward, MixtureOfExperts))
    given, output = editor.node(plan.input), editor.node(site.output)
    stored, recorded = editor.view.tensors[site.down.weight].dtype, editor.view.tensors[site.output]
    read = editor.view.tensors[plan.input]
    turned = not replacement.batch_first and not isinstance(spec, MixtureOfExperts) and read.dim() == 3
    held = [editor.parameters.of_block(site.name, site.down.weight, n, replacement.tensors[n]) for n in spec.shapes]
    with editor.graph.inserting_before(output):
        x = given if read.dtype == stored else call(output, aten.to.dtype, given, stored)
        x = call(output, aten.unsqueeze.default, x, 0) if read.dim() == 2 else x
        x = call(output, aten.transpose.int, x, 0, 1) if turned else x
        sizes = _sizes(x)
        body = _body(spec, stored, sizes if sizes and _groups(spec, sizes) > 1 else None, False)
        found = copied(editor.emitter, output, body, [x, *held])
        found = call(output, aten.transpose.int, found, 0, 1) if turned else found
        found = call(output, aten.flatten.using_ints, found, 0, 1) if recorded.dim() == 2 else found
        found = found if recorded.dtype == stored else call(output, aten.to.dtype, found, recorded.dtype)
        found = call(output, aten.contiguous.default, found)  # views may follow
    output.replace_all_uses_with(found)
    editor.replaced.append(output)
    grouped = isinstance(spec, MixtureOfExperts) and sizes is None
    return Routed(replacement, site.output, given, found, ONE_GROUP if grouped else "")


def _sizes(x: FxNode) -> tuple[int, int] | None:
    """Batch and tokens, where the graph has fixed both."""
    value = x.meta.get("val")
    sizes = () if value is None else tuple(value.shape[:2])
    return (sizes[0], sizes[1]) if sizes and all(isinstance(n, int) for n in sizes) else None


def _groups(spec: RoutedSpec, sizes: tuple[int, int]) -> int:
    """In how many groups a mixture of experts takes so many tokens: a number that is found by trying, which graphs of
    open sizes cannot."""
    return spec.groups(sizes[0] * sizes[1]) if isinstance(spec, MixtureOfExperts) else 1


class _Body(nn.Module):
    def __init__(self, spec: RoutedSpec, groups: int = 1) -> None:
        super().__init__()
        self.spec, self.groups = spec, groups

    def forward(self, x: Tensor, held: tuple[Tensor, ...], shown: Tensor | None, numbers: Tensor | None) -> Tensor:
        parameters = dict(zip(self.spec.shapes, held, strict=True))
        if isinstance(self.spec, ConditionalAttention):
            return attention.unguarded(self.spec, x, shown, parameters, numbers=numbers)
        if isinstance(self.spec, ConditionalFeedForward):
            return branches.unguarded(self.spec, x, shown, parameters)
        return experts.unguarded(self.spec, x, parameters, groups=self.groups)


@lru_cache(maxsize=32)
def _body(spec: RoutedSpec, dtype: torch.dtype, fixed: tuple[int, int] | None, shown: bool) -> GraphModule:
    """A graph of x, the parameters, which tokens are shown [B, S], and the buckets of distances."""
    batch, tokens = fixed or (BATCH, TOKENS)
    x = torch.zeros(batch, tokens, spec.hidden, dtype=dtype)
    held = tuple(torch.zeros(shape, dtype=dtype) for shape in spec.shapes.values())
    visible = torch.ones(batch, tokens, dtype=torch.bool) if shown else None
    biased = isinstance(spec, ConditionalAttention) and spec.buckets > 0
    numbers = attention.numbers_of(spec) if biased else None  # type: ignore[arg-type]
    # how many tokens are routed is no number that exporters can bound, so sizes are open without a promise of any
    open_sizes = None if fixed else {0: Dim.AUTO, 1: Dim.AUTO}
    free: dict[str, Any] = {
        "x": open_sizes, "held": tuple(None for _ in held), "shown": open_sizes if shown else None, "numbers": None,
    }  # fmt: skip
    body = _Body(spec, _groups(spec, fixed) if fixed else 1)
    graph = exported_body(body, (x, held, visible, numbers), free)
    sizes = next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"].shape[:2]
    if not fixed and any(isinstance(n, int) for n in sizes):
        raise UnsupportedModel(f"torch.export fixed the sizes {tuple(sizes)} of what routes tokens", hint=HINT)
    return graph
