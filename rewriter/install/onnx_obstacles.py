"""What keeps the ONNX door from writing a matched site anew; asked before anything is edited."""

from __future__ import annotations

from codegen.conditional import ConditionalAttention
from codegen.sight import Pattern, Sight
from codegen.spec import MixtureOfExperts
from passes.dataflow import Flow, Value, unflattened
from passes.hidden_keys import padding_obstacle
from passes.site import AttentionSite, Operand
from passes.targets.block import BlockReplacement
from passes.targets.replacement import Replacement
from passes.token_blocks import PARTED, parted_behind
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.install.onnx_linear import linear_obstacle

_WRITABLE = frozenset({("bh", "s", "d"), ("hb", "s", "d"), ("b", "s", "hd")})
MODULES = "is installed in torch modules only: rewrite the module the file was exported from"
_STAYS = (
    "{}, so it could only stay as it is and repeat shared heads behind its projections; that is done where these are "
    "plain products that nothing else reads, without caches and fused operators"
)
OLDEST_OPSET = 12
HEADS_IN_BATCH = frozenset({("bh", "s", "d"), ("bh", "d", "s"), ("hb", "s", "d"), ("hb", "d", "s")})


def obstacle(capture: OnnxCapture, replacement: Replacement) -> str | None:
    """Why this site cannot be installed, None if it can."""
    site = replacement.site
    opset = capture.model.opset_imports.get("", 1)
    if too_old(capture):
        return (
            f"the file's opset is {opset}, and functions for what replaces attention need {OLDEST_OPSET} or later; "
            f"convert it first (onnx.version_converter.convert_version(model, {OLDEST_OPSET}))"
        )
    if site.by_blocks:
        return f"its blocks of tokens have an axis of their own, and attention like that {MODULES}"
    if replacement.linear is not None:
        return laid_otherwise(site) or linear_obstacle(capture, replacement)
    if isinstance(replacement.spec, ConditionalAttention):
        return padding_obstacle(capture.flow, site)
    if replacement.decoupled is not None:
        return f"attention with different numbers of key and value heads {MODULES}"
    if replacement.pattern:
        return _sparse_obstacle(capture, replacement)
    if replacement.mixing is not None:  # it has been seen to be a map of hidden states, and nothing is laid out anew
        return None
    if site.joined and site.owner in capture.written_out:
        return "tokens of several projections are joined in front of a fused operator, which is not written anew"
    if site.stays:
        return stays_because(site)
    queries = [("query", operand) for _, operand in fed_queries(replacement)]
    keys_values = [(role, part) for role, o in (("key", site.k), ("value", site.v)) for part in o.parts]
    for role, operand in (*keys_values, *queries):
        projected = unflattened_input(capture, operand)
        if projected is None:
            return f"the {role} projection reads flattened tokens, and where batch and tokens were apart is not found"
        if parted_behind(capture.flow, operand, projected):
            return f"{PARTED.format(role)}, or rewrite the module the file was exported from"
        split = role != "query" and "g" in operand.stem_axes
        if split or (not writable_stem(capture.flow, operand) and not laid_freely(operand)):
            return f"{role} heads laid out as {operand.stem_axes} cannot be written with fewer heads"
    fed = (("keys", site.k), ("values", site.v), *((("queries", site.q),) if feeds_queries(replacement) else ()))
    places = [(what, operand.seam_axes) for what, operand in fed if not laid_freely(operand)]
    places += [
        ("the output", site.output_axes),
        *(() if feeds_queries(replacement) else (("queries", site.q.seam_axes),)),
    ]
    for what, axes in places:
        apart = heads_apart(axes) and (what == "queries" or "g" not in axes)
        if not writable(axes) and not apart:
            return f"{what} laid out as {axes} cannot be rewritten"
    return _sinks_obstacle(capture, site)


def too_old(capture: OnnxCapture) -> bool:
    """Whether the file's operators are older than any function body."""
    return capture.model.opset_imports.get("", 1) < OLDEST_OPSET


def stays_because(site: AttentionSite) -> str:
    """Why an attention cannot be written anew, and when it can be rewritten as it stands."""
    otherwise = ""
    if site.weights_read:
        otherwise = "; else export the model without these weights (output_attentions=False, say)"
    elif site.scores_rounded:
        otherwise = "; else quantise again, with masks that add no more than -100, or without quantised scores"
    return _STAYS.format(site.stays) + otherwise


def block_obstacle(capture: OnnxCapture, replacement: BlockReplacement) -> str | None:
    """The same of a feed-forward block."""
    opset = capture.model.opset_imports.get("", 1)
    by_sequence = not isinstance(replacement.spec, MixtureOfExperts)
    if by_sequence and not replacement.batch_first:
        return "its sequences do not come one after the other"
    if by_sequence and opset < OLDEST_OPSET:
        return f"the file's opset is {opset}, and functions for what replaces it need {OLDEST_OPSET} or later"
    return None


def _sinks_obstacle(capture: OnnxCapture, site: AttentionSite) -> str | None:
    sinks = (m for m in site.modifiers if m.kind == "sinks")
    if any(len(capture.flow.shape(m.value or "")) != (4 if m.apart is None else 5) for m in sinks):
        return "its attention sinks are not laid out by batch, head and query"
    return None


def _sparse_obstacle(capture: OnnxCapture, replacement: Replacement) -> str | None:
    """The projections stay; operands and output are laid out anew around a function call, or an operator is told."""
    site = replacement.site
    written = capture.written_out.get(site.owner)
    if written is not None and written.node.op_type == "GroupQueryAttention":
        if window_size(replacement.pattern) is not None:
            return None
        return (
            "its GroupQueryAttention operator takes a length for each sequence of the batch, and knows no pattern but "
            "a window without sinks: ask for window:128,0"
        )
    return laid_otherwise(site) or _sinks_obstacle(capture, site)


def laid_otherwise(site: AttentionSite) -> str | None:
    """Why operands and output cannot be laid out anew around a function call, None if they can."""
    for what, axes in (("queries", site.q.seam_axes), ("keys", site.k.seam_axes), ("values", site.v.seam_axes)):
        if not writable(axes) and not (heads_apart(axes) and what == "queries"):
            return f"{what} laid out as {axes} cannot be rewritten"
    if not writable(site.output_axes):
        return f"the output laid out as {site.output_axes} cannot be rewritten"
    return None


def window_size(pattern: Pattern) -> int | None:
    """`local_window_size` of com.microsoft's GroupQueryAttention for a pattern, None if it cannot say it."""
    plain = {Sight(reach=sight.reach, ordered=True) == sight for sight in pattern}
    return pattern[0].reach if plain == {True} and len(pattern) == 1 else None


def feeds_queries(replacement: Replacement) -> bool:
    """Whether queries get a projection anew: their weights change, or the projection they come from goes away."""
    return bool(fed_queries(replacement))


def fed_queries(replacement: Replacement) -> tuple[tuple[str, Operand], ...]:
    """Those queries, with a role for each stream of tokens."""
    site = replacement.site
    gone = {operand.projection.node for _, operand in site.shared}
    anew = "q_weight" in replacement.tensors
    parts = ((f"q{number or ''}", part) for number, part in enumerate(site.q.parts))
    return tuple((role, part) for role, part in parts if anew or part.projection.node in gone)


def unflattened_input(capture: OnnxCapture, operand: Operand) -> Value | None:
    """The projection's input with batch and tokens on axes of their own, found above a flattening; None if lost.

    Where there is one sequence and no batch, the input has no axis for it.
    """
    flow, given = capture.flow, operand.projection.input
    for name in (given, *unflattened(flow, given)):
        if flow.shape(name)[-1] != flow.shape(given)[-1]:
            return None
        if len(flow.shape(name)) == 3:
            return name
    return given if len(flow.shape(given)) == 2 and _one_sequence(capture, operand) else None


def _one_sequence(capture: OnnxCapture, operand: Operand) -> bool:
    """Whether the batch is 1 in every recording."""
    axes = operand.stem_axes
    if "bs" in axes:  # no axis of its own
        return True
    recordings = [capture.flow, *([capture.other.flow] if capture.other is not None else [])]
    if axes[0] == "bh":
        return all(flow.shape(operand.stem)[0] == operand.heads for flow in recordings)
    return "b" in axes and all(flow.shape(operand.stem)[axes.index("b")] == 1 for flow in recordings)


def laid_freely(operand: Operand) -> bool:
    """Whether attention alone reads the stem, so that new heads may lie there as it wants them."""
    apart = all(len(a) <= 1 or a in ("bh", "hb") for a in operand.stem_axes)
    return operand.seam == operand.stem and not operand.presents and apart


def writable(axes: tuple[str, ...]) -> bool:
    """Layouts that can be brought to [batch, heads, tokens, features] and back."""
    return (len(axes) == 4 and set(axes) == set("bhsd")) or axes in _WRITABLE


def heads_apart(axes: tuple[str, ...]) -> bool:
    """Whether heads lie along two axes, "h" and "g" (of size 1 where it has no name), and all else has one each."""
    return sorted(a or "g" for a in axes) == sorted("bhgsd")


def writable_stem(flow: Flow, operand: Operand) -> bool:
    """Layouts that a new projection can be given."""
    axes = operand.stem_axes
    plain = len(axes) == 4 and set(axes) == set("bhsd")
    shape = fused_shape(axes, operand.heads, operand.dim, group_size(flow, operand))
    return plain or axes in HEADS_IN_BATCH or shape is not None


def group_size(flow: Flow, operand: Operand) -> int:
    """How many heads the axis "g" of the stem counts, 1 if there is none."""
    return flow.shape(operand.stem)[operand.stem_axes.index("g")] if "g" in operand.stem_axes else 1


def fused_shape(axes: tuple[str, ...], heads: int, dim: int, group: int) -> list[int] | None:
    """Shape to Reshape to where axes hold two of batch, heads, tokens and features, or heads have two.

    `group` is the size of an axis "g". None if two sizes are open.
    """
    if "g" in axes and "hg" not in "".join(axes):
        return None
    sizes = {"h": heads // group, "g": group, "": 1, "d": dim, "hd": heads * dim, "dh": heads * dim}
    # 0 copies the first axis, which is where it was
    shape = [sizes.get(a, 0 if i == 0 and len(a) == 1 else -1) for i, a in enumerate(axes)]
    return shape if shape.count(-1) <= 1 else None
