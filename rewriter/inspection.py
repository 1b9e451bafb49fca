"""`rewriter.inspect`: what is in a model, site by site, and why what cannot be rewritten cannot."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from codegen.spec import Structure
from passes.dataflow import Flow
from passes.feed_forward_site import FeedForwardSite
from passes.match.attention import Matches
from passes.match.feed_forward import FeedForwards, find_feed_forward
from passes.match.names import layer_of
from passes.picture import Picture, feed_forward_picture, refusal_picture, site_picture
from passes.refused_readers import ALSO_READ, refused_readers
from passes.site import AttentionSite, NotAttention, Refusal
from passes.sublayer import NoSublayer, sublayer
from passes.targets.block import surroundings
from passes.targets.catalogue import CATALOGUE, Layered
from passes.targets.colt5 import Colt5
from passes.targets.decoupled import DecoupledHeads
from passes.targets.fourier import HYBRID, Fourier
from passes.targets.gated_pair import gated_pair
from passes.targets.gated_unit import Form, GatedUnit
from passes.targets.grouped_query import GroupedQuery
from passes.targets.linear_attention import LinearHeads
from passes.targets.linear_mixing import LinearMixer
from passes.targets.sparse import SparseFixed, SparseStrided, Window
from passes.targets.sparse_mixer import sparse_mixer
from rewriter.decision import BLOCKS_IN_GRAPHS, OF_GRAPHS
from rewriter.errors import NotExportable, RewriteError, UnsupportedModel, UsageError
from rewriter.given_path import existing
from rewriter.model_kinds import is_onnx, is_torch
from rewriter.report.printable import printable

SPARSE = (sparse_mixer(), sparse_mixer(fast=True))
IN_MODULES_OF_THEIR_OWN = (Window(), SparseFixed(), SparseStrided(), LinearHeads())
"""What torch modules do in a generated module only, since their own forward attends to all keys."""
PAIRS = tuple(gated_pair(form) for form in get_args(Form))
_WHOLE: tuple[Layered, ...] = (*SPARSE, *PAIRS, Colt5())
_KEEPING = ((Fourier(keep=HYBRID).name, Fourier(keep=HYBRID)), *((t.name, t.mixing) for t in SPARSE))
"""What targets that keep some attentions do to the others, by the target's name."""
NOT_IN_GRAPHS = frozenset({*(t.name for t in _WHOLE), *get_args(Form)})
"""Names of what flat graphs are not rewritten to: feed-forward blocks, and attentions of several parts."""

Kind = Literal["file", "module", "graph"]
"""What targets depend on beside the sites themselves."""


@dataclass(frozen=True, repr=False)
class Inspection:
    """What matching found in one model. ``print`` shows it as the command line does.

    Attributes:
        model: its path or class.
        format: "onnx" or "torch".
        opset, producer: of an ONNX file; None for torch.
        sites: rewritable attentions, in execution order.
        refusals: attentions that cannot be rewritten, each with its reason.
        feed_forward: feed-forward blocks that are understood, and those that are not, with reasons.
        not_attention: softmaxes that are something else.
        pictures: the subgraph of every site, every refused attention and every block that is understood, in
            execution order; see `save_graph`.
        targets: by site name, the targets that would change the site.
    """

    model: str
    format: str
    opset: int | None
    producer: str | None
    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    not_attention: tuple[NotAttention, ...]
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    feed_forward: FeedForwards = field(default_factory=FeedForwards)

    def save_graph(self, path: str | Path, *, site: str | None = None) -> None:
        """Draw the matched subgraphs: an .html page with every site, or an .svg of one.

        Args:
            path: the file; its ending says which.
            site: the name of one site; without it a page shows all of them, an SVG the first.

        Raises UsageError for another ending, an unknown site, or a model without sites.
        """
        from rewriter.report.site_drawing import write

        write(Path(path), self.model, self.pictures, site)

    def __repr__(self) -> str:
        blocks = self.feed_forward
        refused = len(self.refusals) + len(blocks.refusals)
        counts = f"{len(self.sites)} attentions, {len(blocks.sites)} feed-forward blocks, {refused} refused"
        return f"<Inspection of {printable(self.model)}: {counts}>"

    def __str__(self) -> str:
        from rewriter.report.tables import inspection, plain

        return plain(inspection(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``rewriter inspect``."""
        rows = [(s.anchor, _site_row(s, self.targets.get(s.name, ()))) for s in self.sites] + [
            (r.anchor, _refusal_row(r, "attention")) for r in self.refusals
        ]
        rows += [(f.anchor, _feed_forward_row(f, self.targets.get(f.name, ()))) for f in self.feed_forward.sites]
        rows += [(r.anchor, _refusal_row(r, "feed_forward")) for r in self.feed_forward.refusals]
        return {
            "model": self.model,
            "format": self.format,
            "opset": self.opset,
            "producer": self.producer,
            "sites": [row for _, row in sorted(rows, key=lambda pair: pair[0])],
            "not_attention": [{"name": n.name, "reason": n.reason} for n in self.not_attention],
        }


def inspect(model: Any, *, example_inputs: Any = None) -> Inspection:
    """Find every attention and every feed-forward block of a model without changing it.

    Args:
        model: as for `optimize`: a torch module or exported program, an ONNX model, or a path.
        example_inputs: a dict of keyword tensors or a tuple; Hugging Face models have defaults. ONNX needs none.

    Never raises for lack of sites. In a torch module that cannot be captured, whatever looks like attention is refused
    with the exporter's reason. Raises UnsupportedModel if nothing does, UsageError for a missing file, InvalidModelFile
    for a broken one.
    """
    if isinstance(model, (str, Path)):
        path = existing(model)
        if path.is_dir():
            from rewriter.install.persistence import load

            return _inspect_torch(load(path), example_inputs, str(model))
        from rewriter.capture.onnx_load import load as load_onnx

        return _inspect_onnx(load_onnx(path), str(model))
    if is_onnx(model):
        import onnx_ir

        from rewriter.capture.onnx_load import from_proto, to_proto

        proto = to_proto(model) if isinstance(model, onnx_ir.Model) else model
        return _inspect_onnx(from_proto(proto), "onnx model")
    if is_torch(model):
        return _inspect_torch(model, example_inputs, type(model).__name__)
    raise UsageError(f"cannot inspect a {type(model).__name__}", hint="pass a torch module, an ONNX model or a path")


def pictures_of(model: str | Path) -> Sequence[Picture]:
    """Drawings of the sites of a model; none where it can be run and not be read."""
    try:
        return inspect(str(model)).pictures
    except RewriteError:
        return ()


def _inspect_onnx(model: Any, name: str) -> Inspection:
    from rewriter.onnx_rewrite import match_feed_forward, match_onnx

    producer = " ".join(p for p in (model.producer_name, model.producer_version) if p) or None
    opset = model.opset_imports.get("")
    captured, matches = match_onnx(model)
    blocks = match_feed_forward(captured, matches)
    return _inspection(name, "onnx", opset, producer, captured.flow, matches, blocks)


def _inspect_torch(model: Any, example_inputs: Any, name: str) -> Inspection:
    import torch

    if isinstance(model, torch.export.ExportedProgram):
        from passes.match.attention import find_attention
        from rewriter.capture.torch_export import opened, view
        from rewriter.install.fx_projections import with_linear_projections

        args, kwargs = model.example_inputs
        flow = view(with_linear_projections(opened(model)), args, kwargs).flow
        matches = _tried(model, None, flow, find_attention(flow))
        return _inspection(name, "torch", None, None, flow, matches, find_feed_forward(flow, matches.names), of="graph")
    from rewriter.placement import on_processor
    from rewriter.torch_rewrite import match_torch

    with on_processor(model):
        try:
            captured, matches, call = match_torch(model, example_inputs)
        except NotExportable as error:
            reason = f"{error}; {error.hint}" if error.hint else str(error)
            refusals = tuple(_unexportable(model, reason))
            if not refusals:
                raise
            return Inspection(name, "torch", None, None, (), refusals, ())
        matches = _tried(model, example_inputs, captured.flow, matches)
        blocks = find_feed_forward(captured.flow, matches.names)
        more = (*_uncalled(model, captured.flow), *_without_scores(model, captured.flow, matches))
        matches = replace(matches, refusals=(*matches.refusals, *more))
        of: Kind = "graph" if isinstance(model, torch.fx.GraphModule) else "module"
        limits = _limits(model, captured.flow, matches, blocks, call) if of == "module" else {}
        return _inspection(name, "torch", None, None, captured.flow, matches, blocks, of=of, limits=limits)


def _limits(
    model: Any, flow: Flow, matches: Matches, blocks: FeedForwards, call: tuple[Sequence[Any], Mapping[str, Any]]
) -> dict[str, Callable[[str], bool]]:
    """Which targets are left to attentions whose module no other can be called in the place of, to those that hand on
    attention weights, and to feed-forward blocks that have no module; by name. What has no limits is left out."""
    from rewriter.install.expert_mixing import block_modules
    from rewriter.install.own_module import read_calls

    try:
        placed = block_modules(model, flow, blocks.sites, *call)
        read, unread = read_calls(model, flow, matches.sites, *call)
    except UnsupportedModel:
        return dict.fromkeys([*(s.name for s in matches.sites), *(b.name for b in blocks.sites)], _shares_heads)
    limits: dict[str, Callable[[str], bool]] = dict.fromkeys(unread, _shares_heads)
    limits |= dict.fromkeys([b.name for b in blocks.sites if b.name not in placed], _shares_heads)
    weighed = [name for name, protocol in read.items() if "weights" in protocol.returns]
    return limits | dict.fromkeys(weighed, lambda name: name != LinearHeads().name)


def _tried(model: Any, example_inputs: Any, flow: Flow, matches: Matches) -> Matches:
    """Sites whose keys or values a refused attention reads are sites where heads can be shared in them alone, which
    only trying tells."""
    from rewriter.optimize import optimize

    readers = refused_readers(flow, matches.sites, matches.refusals)
    doubtful = {s.name: ALSO_READ.format(readers[s.name]) for s in matches.sites if s.name in readers}
    if not doubtful:
        return matches
    names = "|".join(re.escape(name) for name in doubtful)
    try:
        made = optimize(model, "mqa", layers=f"^({names})$", example_inputs=example_inputs, verify=False)
        refused = {r.name: r.reason for r in made.rewrite_report.refused}
    except RewriteError:
        refused = doubtful
    failed = [s for s in matches.sites if s.name in doubtful and s.name in refused]
    more = [Refusal(s.name, s.layer, refused[s.name], s.anchor, s.owner, s.heads, s.head_dim) for s in failed]
    kept = tuple(s for s in matches.sites if s not in failed)
    return replace(matches, sites=kept, refusals=tuple(sorted((*matches.refusals, *more), key=lambda r: r.anchor)))


def _unexportable(model: Any, reason: str) -> Iterator[Refusal]:
    """Attentions of a model that cannot be seen through."""
    for number, path in enumerate(_like_attention(model)):
        yield Refusal(path, number, reason, -1, path)


def _uncalled(model: Any, flow: Flow) -> Iterator[Refusal]:
    """Attentions of which the recorded call ran no node and read no weight."""
    reason = (
        "it was not called with these inputs; pass example_inputs that use it "
        "(a decoder's cross-attention needs encoder_hidden_states)"
    )
    seen = {n.owner for n in flow.nodes} | {w.name for w in flow.weights.values() if w.readers}
    for path in _like_attention(model):
        if path and not any(s == path or s.startswith(f"{path}.") for s in seen):
            yield Refusal(path, layer_of(path, 0), reason, -1, path)


def _without_scores(model: Any, flow: Flow, matches: Matches) -> Iterator[Refusal]:
    """Attentions that were called and hold nothing that matching looks at."""
    reason = (
        "it is called an attention, yet no scores of queries with keys weigh values in it (additive attention, a gate "
        "or a recurrence, say), so it has no heads to share; leave it as it is"
    )
    found: list[AttentionSite | Refusal | NotAttention] = [*matches.sites, *matches.refusals, *matches.not_attention]
    held = {flow.nodes[f.anchor].owner for f in found if f.anchor >= 0} | {f.name.partition("#")[0] for f in found}
    called = {n.owner for n in flow.nodes}
    for path in _like_attention(model):
        inside = [names for names in (called, held) if any(n == path or n.startswith(f"{path}.") for n in names)]
        if path and inside == [called]:
            yield Refusal(path, layer_of(path, 0), reason, -1, path)


def _like_attention(model: Any) -> Iterator[str]:
    """Paths of modules that are called attention and project at least queries, keys and values."""
    import torch

    for path, module in model.named_modules():
        projections = [c for c in module.children() if isinstance(c, torch.nn.Linear)]
        packed = getattr(module, "in_proj_weight", None) is not None
        if "attention" in type(module).__name__.lower() and (len(projections) >= 3 or packed):
            yield path


def _inspection(
    name: str,
    kind: str,
    opset: int | None,
    producer: str | None,
    flow: Flow,
    matches: Matches,
    blocks: FeedForwards,
    *,
    of: Kind = "file",
    limits: Mapping[str, Callable[[str], bool]] = MappingProxyType({}),
) -> Inspection:
    choices = _without_idle(matches.sites, {s.name: _targets(flow, matches, s) for s in matches.sites})
    if of == "module":
        choices = _of_modules(flow, matches, choices)
    reasons = {s.name: GroupedQuery(1).refuses(s) for s in matches.sites}
    choices |= {f.name: _block_targets(flow, matches, f) for f in blocks.sites}
    choices = {s: tuple(n for n in names if s not in limits or limits[s](n)) for s, names in choices.items()}
    read = blocks.sites
    if of == "graph":
        choices = {site: tuple(n for n in names if n not in NOT_IN_GRAPHS) for site, names in choices.items()}
        why = f"{BLOCKS_IN_GRAPHS}; {OF_GRAPHS}"
        refused = tuple(Refusal(f.name, f.layer, why, f.anchor, f.owner) for f in blocks.sites)
        blocks = replace(blocks, sites=(), refusals=(*blocks.refusals, *refused))
    good = tuple(s for s in matches.sites if choices[s.name] or reasons[s.name] is None)
    bad = tuple(
        Refusal(s.name, s.layer, reason, s.anchor, s.owner, s.heads, s.head_dim)
        for s in matches.sites
        if s not in good and (reason := reasons[s.name]) is not None
    )
    refusals = (*matches.refusals, *bad)
    drawn = [(s.anchor, site_picture(flow, s)) for s in good]
    drawn += [(r.anchor, refusal_picture(flow, r)) for r in refusals if r.anchor >= 0]  # others lie in control flow
    drawn += [(f.anchor, feed_forward_picture(flow, f)) for f in read]
    pictures = tuple(picture for _, picture in sorted(drawn, key=lambda pair: pair[0]))
    return Inspection(name, kind, opset, producer, good, refusals, matches.not_attention, pictures, choices, blocks)


def _site_row(site: AttentionSite, choices: Sequence[str]) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": "attention",
        "layer": site.layer,
        "status": "rewritable",
        "reason": None,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "causal": site.causal,
        "cross": site.cross,
        "cached": site.cached,
        "rotary": site.k.rotary.kind if site.k.rotary is not None else None,
        "qk_norm": site.qk_norm,
        "score_modifiers": [m.kind for m in site.modifiers],
        "layout": _layout(site),
        "replay_error": site.replay_error,
        "targets": list(choices),
    }


def _targets(flow: Flow, matches: Matches, site: AttentionSite) -> tuple[str, ...]:
    """Names of the targets that would change this site."""
    names: list[str] = []
    if GroupedQuery(1).refuses(site) is None:
        names += [GroupedQuery(n).name for n in GroupedQuery(1).legal(site) if n < site.kv_heads]
    if Fourier().refuses(site) is None:
        with contextlib.suppress(NoSublayer):
            sublayer(flow, site, matches.evidence[site.name])
            names += [t.name for t in (Fourier(), Fourier(keep=HYBRID), Fourier(hartley=True))]
            names += [LinearMixer(structure).name for structure in Structure]
            names += [t.name for t in SPARSE]
    if GatedUnit().refuses(site) is None:
        with contextlib.suppress(NoSublayer):
            sublayer(flow, site, matches.evidence[site.name])
            names += [GatedUnit(form).name for form in get_args(Form)]
    names += _conditional(flow, matches, site)
    names += [t.name for t in IN_MODULES_OF_THEIR_OWN if t.refuses(site) is None]
    return tuple(names)


def _without_idle(sites: Sequence[AttentionSite], choices: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Without targets that keep the top attentions of a model, where these are all that it has."""
    idle: set[str] = set()
    for name, target in _KEEPING:
        asked = [s for s in sites if name in choices[s.name]]
        if len(target.keeps(asked)) == len(asked):
            idle.add(name)
    return {site: tuple(n for n in names if n not in idle) for site, names in choices.items()}


def _of_modules(flow: Flow, matches: Matches, choices: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """With those that only modules can be rewritten to, and without those that need one that cannot be generated."""
    from rewriter.install.own_module import obstacles

    apart = DecoupledHeads()
    kept = obstacles(flow, matches.sites)
    without = {t.name for t in IN_MODULES_OF_THEIR_OWN}
    found: dict[str, tuple[str, ...]] = {}
    for site in matches.sites:
        names = choices[site.name]
        if site.name in kept:
            found[site.name] = tuple(n for n in names if n not in without)
        else:
            able = apart.refuses(site) is None and apart.idle(site) is None
            found[site.name] = (*names, apart.name) if able else names
    return found


def _shares_heads(name: str) -> bool:
    """Whether a target is one that a module's own forward can compute."""
    return name == "mqa" or name.startswith("gqa")


def _conditional(flow: Flow, matches: Matches, site: AttentionSite) -> tuple[str, ...]:
    target = Colt5()
    if site.cross:
        able = target.crossing.refuses(site) is None and target.crossing.idle(site) is None
        return (target.name,) if able else ()
    if target.mixing.refuses(site) is None:
        with contextlib.suppress(NoSublayer):
            target.mixing.transform(flow, site, matches.evidence[site.name])
            return (target.name,)
    return ()


def _block_targets(flow: Flow, matches: Matches, site: FeedForwardSite) -> tuple[str, ...]:
    around = surroundings(flow, matches, site)
    return tuple(t.name for t in _WHOLE if t.blocks.refuses(site, around) is None)


def _layout(site: AttentionSite) -> str:
    """Which projections feed the site and how heads lie in them."""
    nodes = {site.q.projection.node, site.k.projection.node, site.v.projection.node}
    fused = {1: "fused qkv", 2: "two projections share q, k, v", 3: "separate q, k, v"}[len(nodes)]
    keys = f"keys {' '.join(site.k.seam_axes)}" if site.k.seam else "keys repeated before they are rotated"
    joined = f", tokens of {len(site.k.parts)} streams joined" if site.joined else ""
    return f"{fused}, {keys}{joined}"


def _feed_forward_row(site: FeedForwardSite, choices: Sequence[str]) -> dict[str, Any]:
    activation = site.activation.name or "an activation without a name"
    shape = f"{site.width} → {site.hidden} → {site.width}"
    described = {"layer": site.layer, "layout": f"{site.style}, {activation}, {shape}"}
    measured = {"replay_error": site.replay_error, "targets": list(choices)}
    return {**_blank_row(site.name, "feed_forward"), "status": "rewritable", **described, **measured}


def _refusal_row(refusal: Refusal, kind: str) -> dict[str, Any]:
    seen = {"heads": refusal.heads, "head_dim": refusal.head_dim}
    why = {"layer": refusal.layer, "status": "refused", "reason": refusal.reason}
    return {**_blank_row(refusal.name, kind), **why, **seen}


def _blank_row(name: str, kind: str) -> dict[str, Any]:
    """The keys of every row, empty: what has no meaning for a site, or is not known of it, stays so."""
    return {
        "name": name,
        "kind": kind,
        "layer": None,
        "status": "",
        "reason": None,
        "heads": None,
        "kv_heads": None,
        "head_dim": None,
        "causal": None,
        "cross": None,
        "cached": None,
        "rotary": None,
        "qk_norm": None,
        "score_modifiers": [],
        "layout": "",
        "replay_error": None,
        "targets": [],
    }


def targets() -> list[dict[str, str]]:
    """Every target: name, summary, paper, what it rewrites, what it needs."""
    return [entry.to_dict() for entry in CATALOGUE]
