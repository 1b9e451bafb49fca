"""`rewriter.inspect`: what is in a model, site by site, and why what cannot be rewritten cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from passes.dataflow import Flow
from passes.match.attention import Matches
from passes.match.feed_forward import FeedForwards, find_feed_forward
from passes.picture import Picture, feed_forward_picture, refusal_picture, site_picture
from passes.refused_readers import ALSO_READ, refused_readers
from passes.site import AttentionSite, NotAttention, Refusal
from passes.targets.catalogue import CATALOGUE
from passes.targets.grouped_query import GroupedQuery
from rewriter.errors import NotExportable, RewriteError, UnsupportedModel, UsageError
from rewriter.given_path import existing
from rewriter.model_kinds import is_onnx, is_torch
from rewriter.offers import Kind, Limit, limits_of_modules, offers, shares_heads
from rewriter.overlooked import not_called, not_captured, without_scores
from rewriter.report.inspection_rows import feed_forward_row, refusal_row, site_row
from rewriter.report.printable import printable


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
        rows = [(s.anchor, site_row(s, self.targets.get(s.name, ()))) for s in self.sites] + [
            (r.anchor, refusal_row(r, "attention")) for r in self.refusals
        ]
        rows += [(f.anchor, feed_forward_row(f, self.targets.get(f.name, ()))) for f in self.feed_forward.sites]
        rows += [(r.anchor, refusal_row(r, "feed_forward")) for r in self.feed_forward.refusals]
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
            from rewriter.install.checkpoint_loading import load

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
    from rewriter.onnx_rewrite import match_feed_forward, match_onnx, only_in_bodies, unshared

    producer = " ".join(p for p in (model.producer_name, model.producer_version) if p) or None
    opset = model.opset_imports.get("")
    try:
        captured, matches = match_onnx(model)
    except UnsupportedModel:
        if not (hidden := only_in_bodies(model)):
            raise
        return Inspection(name, "onnx", opset, producer, (), hidden, ())
    blocks = match_feed_forward(captured, matches)
    whole = unshared(captured, matches)
    return _inspection(name, "onnx", opset, producer, captured.flow, matches, blocks, whole=whole)


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
            refusals = tuple(not_captured(model, reason))
            if not refusals:
                raise
            return Inspection(name, "torch", None, None, (), refusals, ())
        matches = _tried(model, example_inputs, captured.flow, matches)
        blocks = find_feed_forward(captured.flow, matches.names)
        more = (*not_called(model, captured.flow), *without_scores(model, captured.flow, matches))
        matches = replace(matches, refusals=(*matches.refusals, *more))
        of: Kind = "graph" if isinstance(model, torch.fx.GraphModule) else "module"
        limits = limits_of_modules(model, captured.flow, matches, blocks, call) if of == "module" else {}
        return _inspection(name, "torch", None, None, captured.flow, matches, blocks, of=of, limits=limits)


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
    more = [Refusal.of(s, refused[s.name]) for s in failed]
    kept = tuple(s for s in matches.sites if s not in failed)
    return replace(matches, sites=kept, refusals=tuple(sorted((*matches.refusals, *more), key=lambda r: r.anchor)))


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
    limits: Mapping[str, Limit] = MappingProxyType({}),
    whole: Mapping[str, str] = MappingProxyType({}),
) -> Inspection:
    """`whole` says of some sites, by name, why they cannot have fewer heads."""
    limits = {**dict.fromkeys(whole, lambda target: not shares_heads(target)), **limits}
    choices = offers(flow, matches, blocks, of, limits)
    reasons = {s.name: whole.get(s.name) or GroupedQuery(1).refuses(s) for s in matches.sites}
    read = blocks.sites
    good = tuple(s for s in matches.sites if choices[s.name] or reasons[s.name] is None)
    bad = tuple(
        Refusal.of(s, reason) for s in matches.sites if s not in good and (reason := reasons[s.name]) is not None
    )
    refusals = (*matches.refusals, *bad)
    drawn = [(s.anchor, site_picture(flow, s)) for s in good]
    drawn += [(r.anchor, refusal_picture(flow, r)) for r in refusals if r.anchor >= 0]  # others lie in control flow
    drawn += [(f.anchor, feed_forward_picture(flow, f)) for f in read]
    pictures = tuple(picture for _, picture in sorted(drawn, key=lambda pair: pair[0]))
    return Inspection(name, kind, opset, producer, good, refusals, matches.not_attention, pictures, choices, blocks)


def targets() -> list[dict[str, str]]:
    """Every target: name, summary, paper, what it rewrites, what it needs."""
    return [entry.to_dict() for entry in CATALOGUE]
