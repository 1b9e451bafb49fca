"""What both models of a pair are made to compute: feeds at several sizes, and steps on a growing cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from rewriter.capture.feeds import MaskStyle, candidate_sizes, make_feeds
from rewriter.errors import UnsupportedModel, first_line
from rewriter.verify.kv_cache import Array, CachePorts, Feeds

Outputs = dict[str, Array]
Size = tuple[int, int, int]

DECODE_STEPS = 2


@dataclass(frozen=True)
class Script:
    """One sequence of feeds.

    Attributes:
        label: for people.
        steps: the feeds of each step; from the second step on the cache is the model's own.
        neutral: caches to feed as zeros, which mean the same to any number of heads.
    """

    label: str
    steps: tuple[Feeds, ...]
    neutral: frozenset[str]


def play(session: Any, ports: CachePorts, script: Script, limit: float | None = None) -> list[Outputs]:
    """Run `script` on one model and return each step's outputs by name; `limit` is in seconds for each run.

    Raises RunsTooLong if a run takes longer, and whatever onnxruntime raises.
    """
    from rewriter.capture.bounded_run import run_within

    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    played: list[Outputs] = []
    cache: Feeds = {}
    for feeds in script.steps:
        start = ports.neutral(feeds, script.neutral)
        own = {name: array for name, array in {**start, **cache}.items() if name in wanted}
        played.append(dict(zip(names, run_within(limit, session, None, own), strict=True)))
        cache = ports.next(played[-1], own)
    return played


@dataclass
class Rehearsal:
    """Finds scripts that the original plays, and keeps what it answered.

    Attributes:
        changed: caches that the two models take in different shapes, so that no random one can be fed.
        limit: seconds for each run; None for any time.
        trouble: what the original said to the sizes that it refused.
    """

    model: ir.Model
    session: Any
    ports: CachePorts
    changed: frozenset[str]
    limit: float | None = None
    trouble: list[str] = field(default_factory=list)

    def scripts(self, sizes: Sequence[Size] | None, seeds: Iterable[int]) -> Iterator[tuple[Script, list[Outputs]]]:
        """Each seed at the first size that the original accepts, a second size, and steps on a growing cache."""
        ladder = list(sizes) if sizes is not None else candidate_sizes(self.model)
        accepted: list[Size] = []
        for size in ladder:
            if accepted and size[1] == accepted[0][1]:
                continue
            tried = self._at(size, seeds if not accepted else (0,))
            if tried is None:
                continue
            accepted.append(size)
            yield from tried
            if len(accepted) == 2:
                break
        if accepted and self.ports.open:
            chain = self._chain(accepted[0])
            if chain is not None:
                yield chain

    def _at(self, size: Size, seeds: Iterable[int]) -> list[tuple[Script, list[Outputs]]] | None:
        found: list[tuple[Script, list[Outputs]]] = []
        for seed in seeds:
            feeds = self._feeds(size, seed, "mixed")
            script = Script(f"{_size_name(size)}, seed {seed}", (feeds,), self.changed)
            answer = self._try(script)
            if answer is None:
                return None
            found.append((script, answer))
        return found

    def _chain(self, size: Size) -> tuple[Script, list[Outputs]] | None:
        """Prefill an empty cache, then single tokens; as many steps as the original plays."""
        batch, length, _ = size
        script = Script("prefill", (self._feeds((batch, length, 0), 0, "ones"),), self.changed)
        answer = self._try(script)
        if answer is None:
            return None
        for step in range(DECODE_STEPS):
            cached = self.ports.length(self.ports.next(answer[-1], script.steps[-1]))
            feeds = self._feeds((batch, 1, cached), step + 1, "ones")
            longer = Script(f"prefill and {step + 1} decode steps", (*script.steps, feeds), self.changed)
            played = self._try(longer)
            if played is None:
                break
            script, answer = longer, played
        return script, answer

    def _feeds(self, size: Size, seed: int, mask: MaskStyle) -> Feeds:
        batch, length, past = size
        return make_feeds(self.model, batch=batch, length=length, past=past, seed=seed, mask=mask)

    def _try(self, script: Script) -> list[Outputs] | None:
        try:
            return play(self.session, self.ports, script, self.limit)
        except UnsupportedModel:  # of a run without end: other sizes would take as long
            raise
        except Exception as error:  # onnxruntime's errors share no public base class
            self.trouble.append(f"{script.label}: {first_line(error)}")
            return None


def _size_name(size: Size) -> str:
    batch, length, past = size
    return f"batch {batch}, length {length}" + (f", past {past}" if past else "")
