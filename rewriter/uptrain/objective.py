"""What the student is trained on: its blocks' outputs on the original's inputs first, then what the model puts out.

All of it is a mean over tokens, weighted by what part of the whole step the tokens at hand are, so that a step means
the same however many processes and accumulated parts it is spread over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewriter.errors import UnsupportedModel, UsageError, first_line
from rewriter.uptrain.batch import Batch, Caller
from rewriter.uptrain.divergence import kl_divergence
from rewriter.uptrain.observe import Call, first_tensor, forced, observing
from rewriter.uptrain.pairs import block_around, outwards, paired_modules
from rewriter.uptrain.recipe import Recipe
from rewriter.verify.torch_pair import main_tensor

LEAST = 0.1
"""Part of a typical token's magnitude by which errors are measured at least: some tokens' outputs are almost zero."""


POOLED = 4.0
"""Weight of sentence embeddings beside the states that they are means of."""


class Phase(Enum):
    """LAYERS: blocks, each on the original's input. OUTPUT: the whole model."""

    LAYERS = "layers"
    OUTPUT = "output"


@dataclass(frozen=True)
class Share:
    """What part of the whole step a batch is, times the number of processes, whose gradients are averaged."""

    tokens: float
    rows: float


WHOLE = Share(1.0, 1.0)


@dataclass(frozen=True)
class Targets:
    """What the teacher did on one batch: its main output, calls of paired modules, outputs of whole blocks."""

    output: Tensor
    calls: Mapping[str, Sequence[Call]]
    blocks: Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Attributes:
        pairs: modules that hold what was rewritten in each block.
        blocks: the blocks around them, whose outputs are the states that the next block reads.
        logits: the main output holds logits; else features.
        causal: earlier outputs do not depend on later tokens.
        scales: typical mean square of a token's features, by path; "" is the main output.
    """

    pairs: tuple[str, ...]
    blocks: tuple[str, ...]
    logits: bool
    causal: bool
    scales: Mapping[str, float]


class Teacher:
    """The original, run for what it does on a batch; never trained."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self._plan, self._caller = model, plan, Caller(model)

    @torch.no_grad()
    def targets(self, batch: Batch, phase: Phase, *, blocks: bool = True) -> Targets:
        """Only what the phase compares is kept."""
        pairs = self._plan.pairs if phase is Phase.LAYERS else ()
        around = self._plan.blocks if phase is Phase.OUTPUT and blocks else ()
        args, kwargs = self._caller.arguments(batch)
        with observing(self._model, sorted({*pairs, *around})) as calls:
            output = self._model(*args, **kwargs)
        return Targets(
            require_main(output, "teacher"),
            {path: [_detached(c) for c in calls[path]] for path in pairs},
            {path: [c.output.detach() for c in calls[path]] for path in around},
        )


class Distillation(nn.Module):
    """The student with its loss as one module, so that data-parallel and sharding wrappers see whole steps.

    Wrappers that shard parameters gather them again in the backward pass when a gradient reaches what a layer put out.
    With `sharded`, one of zero always does, also where the loss is about values inside layers.
    """

    def __init__(self, student: nn.Module, plan: Plan, recipe: Recipe, *, sharded: bool = False) -> None:
        super().__init__()
        self._sharded = sharded
        self.student = student
        self._plan, self._recipe, self._caller = plan, recipe, Caller(student)

    def forward(
        self, batch: Batch, targets: Targets | None = None, phase: Phase = Phase.OUTPUT, share: Share = WHOLE
    ) -> Any:
        """(this batch's part of the step's loss, and of each of its terms, unweighted and detached).

        Without targets: the student's main output, in the parameters' own precision.
        """
        args, kwargs = self._caller.arguments(batch)
        if targets is None:
            with torch.autocast(next(iter(batch.inputs.values())).device.type, enabled=False):
                return require_main(self.student(*args, **kwargs), "student")
        if phase is Phase.LAYERS:
            with forced(self.student, targets.calls) as outputs, _activations_kept(self.student):
                output = require_main(self.student(*args, **kwargs), "student")
            pairs = ((p, [c.output for c in targets.calls[p]], outputs[p]) for p in self._plan.pairs)
            terms = {"layers": (1.0, self._states(pairs, batch, share))}
        else:
            wanted = self._plan.blocks if self._recipe.hidden else ()
            with observing(self.student, wanted) as calls:
                output = require_main(self.student(*args, **kwargs), "student")
            terms = self._output_terms(batch, targets.output, output, share)
            if wanted:
                found = ((p, targets.blocks[p], [c.output for c in calls[p]]) for p in wanted)
                terms["hidden"] = (self._recipe.hidden, self._states(found, batch, share))
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        if self._sharded:
            loss = loss + 0.0 * output.float().mean()
        return loss, {name: term.detach() for name, (_, term) in terms.items()}

    def _states(self, triples: Any, batch: Batch, share: Share) -> Tensor:
        """Mean over modules of the relative square error of their outputs."""
        found = [
            relative_error(old, new, batch, share, self._plan.scales[path])
            for path, olds, news in triples
            for old, new in zip(olds, news, strict=True)
        ]
        return torch.stack(found).mean()

    def _output_terms(self, batch: Batch, old: Tensor, new: Tensor, share: Share) -> dict[str, tuple[float, Tensor]]:
        recipe = self._recipe
        if not self._plan.logits:
            terms = {"output": (recipe.distillation, relative_error(old, new, batch, share, self._plan.scales[""]))}
            if new.dim() == 3:
                terms["pooled"] = (POOLED * recipe.distillation, pooled_distance(old, new, batch) * share.rows)
            return terms
        rows, part = counted(old, new, batch)
        divergence = kl_divergence(*rows, recipe.temperature).mean() * (share.tokens if part else share.rows)
        terms = {"kl": (recipe.distillation, divergence)}
        if recipe.language_model:
            loss = next_token_loss(new, batch) * share.tokens
            terms["language_model"] = (recipe.language_model, loss)
        return terms


@contextlib.contextmanager
def _activations_kept(model: nn.Module) -> Iterator[None]:
    """No activations are computed anew: that would happen in the backward pass, with the modules' own inputs. Where
    each module gets the original's input, what lies between them is dropped as it is computed, so there is no need."""
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    for module in checkpointed:
        module.training = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.training = True


# ------------------------------------------------------------------ distances


def counted(old: Tensor, new: Tensor, batch: Batch) -> tuple[tuple[Tensor, Tensor], bool]:
    """Both as rows of features, [N, D], without padding; and whether rows are tokens of the batch."""
    ids = batch.inputs.get("input_ids")
    tokens = ids is not None and old.shape[:2] == ids.shape[:2] and old.dim() >= 3
    flat = tuple(t.flatten(2).flatten(0, 1) if tokens else t.reshape(-1, t.shape[-1]) for t in (old, new))
    if tokens and batch.valid is not None:
        keep = batch.valid.flatten()
        flat = tuple(t[keep] for t in flat)
    return (flat[0], flat[1]), tokens


def relative_error(old: Tensor, new: Tensor, batch: Batch, share: Share, scale: float) -> Tensor:
    """Mean over tokens of |new - old|² / |old|², with at least `LEAST` * `scale` below the line."""
    (a, b), tokens = counted(old, new, batch)
    a, b = a.float(), b.float()
    found = (b - a).square().mean(-1) / (a.square().mean(-1) + LEAST * scale)
    return found.mean() * (share.tokens if tokens else share.rows)


def pooled_distance(old: Tensor, new: Tensor, batch: Batch) -> Tensor:
    """1 - cosine of the mean over each row's tokens: what sentence embeddings are made of."""
    pair = []
    for states in (old.float(), new.float()):
        if batch.valid is not None and batch.valid.shape == states.shape[:2]:
            states = states * batch.valid[..., None]
        pair.append(states.sum(1))
    return (1 - functional.cosine_similarity(pair[0], pair[1], dim=-1)).mean()


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the data's own next tokens, nats."""
    ids = batch.inputs["input_ids"][:, 1:]
    if batch.valid is not None:
        ids = ids.masked_fill(~batch.valid[:, 1:], -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids.flatten(), ignore_index=-100)


# ------------------------------------------------------------------ planning


@torch.no_grad()
def plan(student: nn.Module, teacher: nn.Module, changed: Sequence[str], batch: Batch, recipe: Recipe) -> Plan:
    """Work out on one batch what can be compared.

    Raises UsageError where a model does not take the batch, UnsupportedModel where the outputs do not fit.
    """
    paths = paired_modules(student, teacher, list(changed))
    around = {block for path in paths if (block := block_around(teacher, path))}
    everything = sorted({outer for path in paths for outer in outwards(path)} | around)
    observed, outputs = [], []
    for who, model in (("teacher", teacher), ("student", student)):
        with observing(model, everything) as calls:
            outputs.append(require_main(run(model, batch, who), who))
        observed.append({path: [c.output for c in calls[path]] for path in everything})
    old, new = outputs
    _require_same_output(old, new)
    pairs = _comparable(paths, observed)
    blocks = _comparable([b for p in pairs if (b := block_around(teacher, p))] or pairs, observed)
    scales = {p: _scale(observed[0][p][0], batch) for p in {*pairs, *blocks}}
    logits = recipe.output == "logits" or (recipe.output == "auto" and holds_logits(teacher, batch))
    return Plan(tuple(pairs), tuple(blocks), logits, is_causal(teacher, batch), {**scales, "": _scale(old, batch)})


def run(model: nn.Module, batch: Batch, who: str) -> Any:
    """One call; raises UsageError, with what the model said, where it does not take the batch."""
    args, kwargs = Caller(model).arguments(batch)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise UsageError(
            f"the {who} does not take a batch of these data ({', '.join(batch.inputs)}): {first_line(error)}",
            hint="give the data as named inputs of the model, e.g. a list of dicts of tensors",
        ) from error


def require_main(output: Any, who: str) -> Tensor:
    """Logits, the last hidden state, or the first tensor; raises UnsupportedModel if there is none."""
    found = main_tensor(output)
    if found is None:
        raise UnsupportedModel(f"the {who} returns no tensor to compare", hint="wrap it so that it returns one")
    return found


def holds_logits(model: nn.Module, batch: Batch) -> bool:
    return isinstance(getattr(run(model, batch, "teacher"), "logits", None), Tensor)


@torch.no_grad()
def is_causal(model: nn.Module, batch: Batch) -> bool:
    """Tried out: do earlier outputs stay as they are when the last token of each row changes?"""
    ids = batch.inputs.get("input_ids")
    if ids is None or ids.shape[1] < 2:
        return False
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, ids.shape[1] // 2], ids[:, 0])
    changed = Batch({**batch.inputs, "input_ids": other}, batch.valid)
    a, b = (require_main(run(model, x, "teacher"), "teacher") for x in (batch, changed))
    if a.dim() < 3 or a.shape[1] != ids.shape[1]:
        return False
    moved = (a - b).abs().flatten(2).amax((0, 2))
    return bool(moved[-1] > 0) and bool((moved[:-1] <= 1e-3 * moved[-1]).all())


def _comparable(paths: Sequence[str], observed: Sequence[Mapping[str, Sequence[Tensor]]]) -> list[str]:
    """Each path, or the nearest around it, whose outputs have one shape in both models; others are left out."""
    old, new = observed
    found: list[str] = []
    for path in paths:
        for outer in outwards(path):
            shapes = [[t.shape for t in side.get(outer, ())] for side in (old, new)]
            if shapes[0] and shapes[0] == shapes[1]:
                if outer not in found:
                    found.append(outer)
                break
    return found


def _require_same_output(old: Tensor, new: Tensor) -> None:
    if old.shape[:-1] == new.shape[:-1] and old.shape[-1] != new.shape[-1]:
        raise UnsupportedModel(
            f"the teacher puts out {old.shape[-1]} features or tokens of a vocabulary, the student {new.shape[-1]}",
            hint="the student must be rewritten from this teacher",
        )
    if old.shape != new.shape:
        raise UnsupportedModel(
            f"outputs have shapes {list(old.shape)} (teacher) and {list(new.shape)} (student)",
            hint="the student must be rewritten from this teacher, with the same kind of output (logits, states)",
        )


def _scale(old: Tensor, batch: Batch) -> float:
    (rows, _), _ = counted(old, old, batch)
    return float(rows.float().square().mean(-1).median())


def _detached(call: Call) -> Call:
    strip = torch.utils._pytree.tree_map
    plain = strip(lambda a: a.detach() if isinstance(a, Tensor) else a, (call.args, dict(call.kwargs)))
    return Call(plain[0], plain[1], call.output.detach())


__all__ = ["Distillation", "Phase", "Plan", "Share", "Targets", "Teacher", "first_tensor", "plan"]
