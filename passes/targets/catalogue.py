"""The targets by the names that a person types, in one list."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from codegen.spec import FeatureMap, Structure
from passes.targets.auto import Auto
from passes.targets.colt5 import EVERY, Colt5, colt5
from passes.targets.conditional_attention import ConditionalHeads
from passes.targets.decoupled import DecoupledHeads
from passes.targets.fourier import HYBRID, Fourier
from passes.targets.gated_pair import GatedPair, gated_pair
from passes.targets.gated_unit import CHUNK, GatedUnit
from passes.targets.grouped_query import GroupedQuery
from passes.targets.linear_attention import CHUNK as LINEAR_CHUNK
from passes.targets.linear_attention import LinearHeads
from passes.targets.linear_mixing import LONGEST, NAMES, LinearMixer
from passes.targets.sparse import FORMS, SparseFixed, SparseStrided, Window
from passes.targets.sparse_mixer import SparseMixer, sparse_mixer

Mixer = Fourier | LinearMixer | GatedUnit | ConditionalHeads
"""Targets of which one computation takes the place of an attention with all its projections."""

AttentionTarget = GroupedQuery | DecoupledHeads | Mixer | Window | SparseFixed | SparseStrided | LinearHeads
"""What an attention can become."""

Layered = SparseMixer | Colt5 | GatedPair
"""Targets for attentions and feed-forward blocks together."""

Target = AttentionTarget | Layered
"""Every kind of target there is."""


_STRUCTURE = "no training-free conversion of a trained model is known"


@dataclass(frozen=True)
class Entry:
    """One line of ``rewriter targets``. `parse` returns the target for a name, or None if the name is another's."""

    name: str
    summary: str
    paper: str
    rewrites: str
    needs: str
    parse: Callable[[str], Target | Auto | None]

    def to_dict(self) -> dict[str, str]:
        keys = ("name", "summary", "paper", "rewrites", "needs")
        return {key: str(getattr(self, key)) for key in keys}


def _parse_mqa(name: str) -> Target | None:
    return GroupedQuery(1) if name == "mqa" else None


def _parse_gqa(name: str) -> Target | None:
    found = re.fullmatch(r"gqa(\d{1,6})", name)
    return GroupedQuery(int(found.group(1))) if found and int(found.group(1)) else None


def _parse_dha(name: str) -> Target | None:
    found = re.fullmatch(r"dha(?::(\d{1,6}),(\d{1,6}))?", name)
    if found is None:
        return None
    if found.group(1) is None:
        return DecoupledHeads()
    keys, values = int(found.group(1)), int(found.group(2))
    return DecoupledHeads(keys, values) if keys and values else None


def _parse_fnet(name: str) -> Target | None:
    return Fourier() if name == "fnet" else None


def _parse_hybrid(name: str) -> Target | None:
    found = re.fullmatch(r"fnet-hybrid(?::(\d{1,6}))?", name)
    keep = int(found.group(1) or HYBRID) if found else 0
    return Fourier(keep=keep) if keep else None


def _parse_hartley(name: str) -> Target | None:
    return Fourier(hartley=True) if name == "hartley" else None


def _parse_sparse_mixer(fast: bool) -> Callable[[str], Target | None]:
    wanted = sparse_mixer(fast=fast)
    return lambda name: wanted if name == wanted.name else None


def _parse_linear(structure: Structure) -> Callable[[str], Target | None]:
    def parse(name: str) -> Target | None:
        found = re.fullmatch(NAMES[structure] + r"(?::(\d{1,6}))?", name)
        tokens = int(found.group(1) or LONGEST) if found else 0
        return LinearMixer(structure, tokens) if tokens else None

    return parse


def _parse_gau(name: str) -> Target | None:
    if name == "gau:pair":
        return gated_pair("gau")
    return GatedUnit("gau") if name == "gau" else None


def _parse_quad(name: str) -> Target | None:
    if name == "flash-quad:pair":
        return gated_pair("flash-quad")
    return GatedUnit("flash-quad") if name == "flash-quad" else None


def _parse_flash(name: str) -> Target | None:
    found = re.fullmatch(r"flash(?::(?:(\d{1,6})|(?:(\d{1,6}),)?(pair)))?", name)
    if found is None:
        return None
    chunk = int(found.group(1) or found.group(2) or CHUNK)
    if not chunk:
        return None
    return gated_pair("flash", chunk) if found.group(3) else GatedUnit("flash", chunk)


def _parse_colt5(name: str) -> Target | None:
    found = re.fullmatch(r"colt5(?::(\d{1,6}))?", name)
    every = int(found.group(1) or EVERY) if found else 0
    return colt5(every) if every else None


def _parse_window(name: str) -> Target | None:
    return _made(Window, "window", name, 2)


def _parse_fixed(name: str) -> Target | None:
    return _made(SparseFixed, "sparse-fixed", name, 2)


def _parse_strided(name: str) -> Target | None:
    return _made(SparseStrided, "sparse-strided", name, 1)


def _parse_heads(name: str) -> Target | None:
    words = "|".join(re.escape(f.value) for f in FeatureMap)
    found = re.fullmatch(rf"linear(?::(\d{{1,6}})?,?({words})?)?", name)
    if found is None or name.endswith((":", ",")) or name.startswith("linear:,"):
        return None
    chunk = int(found.group(1) or LINEAR_CHUNK)
    return LinearHeads(chunk, FeatureMap(found.group(2) or FeatureMap.LEARNED)) if chunk else None


def _made(kind: Callable[..., Target], stem: str, name: str, most: int) -> Target | None:
    """Out of ``stem[:number,...][,form]``; None if the name is another's, or says what cannot be."""
    found = re.fullmatch(rf"{stem}(?::(\d{{1,9}}(?:,\d{{1,9}})*)?,?({'|'.join(FORMS)})?)?", name)
    if found is None or name.endswith((":", ",")):
        return None
    numbers = [int(n) for n in (found.group(1) or "").split(",") if n]
    form = {"form": found.group(2)} if found.group(2) else {}
    try:
        return kind(*numbers, **form) if len(numbers) <= most else None
    except (TypeError, ValueError):  # no such form here, or numbers that do not fit
        return None


def _parse_auto(name: str) -> Auto | None:
    found = re.fullmatch(r"auto(?::(.+))?", name)
    if found is None:
        return None
    candidates: list[AttentionTarget] = []
    for part in found.group(1).split("+") if found.group(1) else []:
        candidate = find(part)
        if candidate is None or isinstance(candidate, (Auto, Layered, LinearHeads, DecoupledHeads)):
            return None
        candidates.append(candidate)
    return Auto(candidates=tuple(candidates))


CATALOGUE: tuple[Entry, ...] = (
    Entry(
        "mqa",
        "all query heads share one key/value head",
        "arXiv 1911.02150",
        "key and value projections to one head (merge: mean, aligned, joint)",
        "attention whose score bias comes from masks and positions only",
        _parse_mqa,
    ),
    Entry(
        "gqaN",
        "query heads share N key/value heads",
        "arXiv 2305.13245",
        "key and value projections to N heads, contiguous groups (merge: mean, aligned, joint)",
        "N divides the query heads and the present key/value heads",
        _parse_gqa,
    ),
    Entry(
        "dha[:k,v]",
        "k heads of keys and v heads of values (a quarter and half of the present ones)",
        "arXiv 2406.06567",
        "key and value projections, by groups of a size of their own (merge: mean, aligned, joint)",
        "torch modules; k and v as N of gqaN",
        _parse_dha,
    ),
    Entry(
        "fnet",
        "a Fourier transform over tokens and features mixes instead of attention",
        "arXiv 2105.03824",
        "the attention with all its projections; with calibration a factor and a constant per feature are fitted",
        "bidirectional self-attention without a cache; pre-trained so or uptrained: " + _STRUCTURE,
        _parse_fnet,
    ),
    Entry(
        "fnet-hybrid[:k]",
        "as fnet, and the top k attentions stay (k = 2)",
        "arXiv 2105.03824",
        "all but the top k attentions of each stack of layers",
        "as fnet",
        _parse_hybrid,
    ),
    Entry(
        "hartley",
        "as fnet, by the Hartley transform",
        "arXiv 2205.12399",
        "as fnet",
        "as fnet",
        _parse_hartley,
    ),
    Entry(
        "linear-mixer[:n]",
        "one learned matrix over tokens and one over features, for up to n tokens (n = 512)",
        "arXiv 2205.12399",
        "the attention with all its projections; with calibration both matrices are fitted, without they are random",
        "as fnet, and sequences of at most n tokens",
        _parse_linear(Structure.DENSE),
    ),
    Entry(
        "circulant[:n]",
        "as linear-mixer, by circulant matrices: one vector each",
        "arXiv 2205.12399",
        "as linear-mixer",
        "as linear-mixer",
        _parse_linear(Structure.CIRCULANT),
    ),
    Entry(
        "toeplitz[:n]",
        "as linear-mixer, by Toeplitz matrices: one number for each distance",
        "arXiv 2205.12399",
        "as linear-mixer",
        "as linear-mixer",
        _parse_linear(Structure.TOEPLITZ),
    ),
    Entry(
        "sparse-mixer",
        "mixing below, attention in the top 4 layers, mixtures of experts in the middle 4 feed-forward blocks",
        "arXiv 2205.12399",
        "attentions as linear-mixer; feed-forward blocks split into 16 experts that do half of their work",
        "as linear-mixer; hidden features in multiples of 16",
        _parse_sparse_mixer(fast=False),
    ),
    Entry(
        "fast-sparse-mixer",
        "as sparse-mixer, with half of its experts' work",
        "arXiv 2205.12399",
        "as sparse-mixer; a quarter of the blocks' work",
        "as sparse-mixer",
        _parse_sparse_mixer(fast=True),
    ),
    Entry(
        "colt5[:n]",
        "light branches for all tokens, heavy ones for one in n that routers choose (n = 16)",
        "arXiv 2303.09752",
        "encoders' attentions (light heads near, heavy heads between routed tokens) and feed-forward blocks (half as "
        "wide, all of it for routed tokens); cross-attention as mqa",
        "encoder attention without rotation, biases by distance in buckets; pre-trained so or uptrained: " + _STRUCTURE,
        _parse_colt5,
    ),
    Entry(
        "gau[:pair]",
        "one gated attention unit with one score for all heads, fitted to their mean; of a pair, another one behind it",
        "arXiv 2202.10447",
        "the attention with all its projections; with calibration the output projection is refitted; of a pair, "
        "feed-forward blocks too, which the second unit computes as they were",
        "self-attention without a cache, causal or not; pre-trained so or uptrained: " + _STRUCTURE,
        _parse_gau,
    ),
    Entry("flash-quad[:pair]", "as gau, by the name of its model", "arXiv 2202.10447", "as gau", "as gau", _parse_quad),
    Entry(
        "flash[:chunk,pair]",
        "as gau, in linear time: quadratic within chunks (of 256 tokens), a sum between them",
        "arXiv 2202.10447",
        "as gau",
        "as gau",
        _parse_flash,
    ),
    Entry(
        "window[:w,sinks]",
        "queries see the w nearest keys and the first ones (w = 128, sinks = 4)",
        "arXiv 2309.17453, 2004.05150",
        "which keys a query sees; no weight changes",
        "self-attention, causal or bidirectional",
        _parse_window,
    ),
    Entry(
        "sparse-fixed[:l,c,form]",
        "queries see their block of l tokens and the last c of every block (l = 128, c = 8)",
        "arXiv 1904.10509",
        "as window; form is merged, alternating (by layer) or heads",
        "as window",
        _parse_fixed,
    ),
    Entry(
        "sparse-strided[:l,form]",
        "queries see the last l tokens and every l-th before (l = 128)",
        "arXiv 1904.10509",
        "as sparse-fixed; for data with a period, not for text",
        "as window",
        _parse_strided,
    ),
    Entry(
        "linear[:chunk,features]",
        "softmax in chunks of 64 tokens and their neighbours, a product of features beyond; linear time",
        "arXiv 2410.10254, 2402.04347",
        "what far keys weigh; heads keep their projections; features are learned, elu1 or favor+",
        "self-attention, causal or bidirectional; uptraining, which trains the features",
        _parse_heads,
    ),
    Entry(
        "auto",
        "each site gets what keeps the answer best under a budget (kv=0.5, speed=1.3, drift=0.02)",
        "ours",
        "sites that a mixed-integer program picks by measured sensitivity; of every gqaN, or of auto:gqa4+fnet",
        "a budget, calibration, and SciPy (the extra `auto`)",
        _parse_auto,
    ),
)


def find(name: str) -> Target | Auto | None:
    """The target of this name, None if there is none."""
    if not name.isascii():  # digits of other scripts are digits, to a pattern and to int()
        return None
    return next((t for e in CATALOGUE if (t := e.parse(name.strip().lower())) is not None), None)
