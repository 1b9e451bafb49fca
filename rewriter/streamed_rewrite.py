"""The pipeline for Hugging Face folders that are larger than memory: match a narrow model, then stream the weights.

capture → match → plan → transform → install run on a model with the checkpoint's architecture and all its layers and
heads, and hardly any width (rewriter/capture/narrowed.py). What they changed there is then proved to be the mean of
whole heads in certain stored tensors, bit for bit, and a number in the config. That is done to the checkpoint's tensors
of the same names, one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.targets.grouped_query import GroupedQuery
from passes.weights.pooling import mean_pool, ties
from rewriter import progress
from rewriter.capture.narrowed import HINT, narrowed
from rewriter.decision import Stopwatch, assignment
from rewriter.errors import UnsupportedModel
from rewriter.install import huggingface, safetensors_stream
from rewriter.install.checkpoint_files import shards
from rewriter.install.checkpoint_folder import CONFIG, GENERATION, OURS, Checkpoint, copy_side_files
from rewriter.install.proportion import in_proportion
from rewriter.install.safetensors_stream import Stored
from rewriter.json_files import read_object
from rewriter.report.rewrite_report import Change, RewriteReport
from rewriter.whole_folder import whole_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NOTE = "streamed: how far it moves the output was not measured"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StreamedCheckpoint:
    """A checkpoint on disk and what is to become of it; `write` streams it.

    Attributes:
        pooled: heads before and after, by the names of the tensors that change.
        config: of the rewritten checkpoint.
    """

    source: Path
    files: tuple[Path, ...]
    pooled: Mapping[str, tuple[int, int]]
    config: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write the rewritten checkpoint to a folder, which appears whole or not at all; other files go along.

        Raises UsageError or CannotWrite as `rewriter.save` does, InvalidModelFile if a file is broken.
        """
        with whole_folder(path, drop=OURS) as draft:
            total, places = self._write_tensors(draft)
            if len(self.files) > 1:
                _write_json(
                    draft / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
                )
            _write_json(draft / CONFIG, self.config)
            generation = self.source / GENERATION
            if generation.is_file():
                _write_json(draft / GENERATION, read_object(generation))
            copy_side_files(self.source, draft, there=path)

    def _write_tensors(self, draft: Path) -> tuple[int, dict[str, str]]:
        """(bytes of all tensors, the file that each is in)"""
        total, places, done = 0, dict[str, str](), 0
        with progress.task("writing", sum(file.stat().st_size for file in self.files), "B") as advance:
            for file in self.files:
                before = safetensors_stream.stored(file)
                changes, told = self._changes(before), partial(_advance, advance, done)
                total += safetensors_stream.rewrite(file, draft / file.name, changes, told)
                places.update(dict.fromkeys(before, file.name))
                done += file.stat().st_size
        return total, places

    def _changes(self, before: Mapping[str, Stored]) -> dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]:
        found: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {}
        for name in before.keys() & self.pooled.keys():
            heads, groups = self.pooled[name]
            rows, *columns = before[name].shape
            found[name] = ((rows // heads * groups, *columns), partial(_pool, heads=heads, groups=groups))
        return found


def _advance(advance: progress.Advance, done: int, read: float) -> None:
    advance(done + read)


def _pool(tensor: Tensor, *, heads: int, groups: int) -> Tensor:
    """As the pipeline does it: sums in float64, rounded to float32 and then to the checkpoint's dtype."""
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return torch.from_numpy(mean_pool(wide.numpy(), heads, groups)).to(tensor.dtype)


def rewrite_streamed(folder: Path, target: Any, *, layers: str | None) -> tuple[StreamedCheckpoint, RewriteReport]:
    """Plan the rewrite of a checkpoint without loading it; `StreamedCheckpoint.write` does it.

    Its key/value heads are averaged, in all layers. Of the real weights, only whether heads are equal is looked at.

    Raises:
        UnsupportedModel: another target, selected layers, quantised weights, no safetensors, or an architecture whose
            config does not set the number of key/value heads.
        UsageError, UnknownTarget, NothingToRewrite, InvalidModelFile: as `optimize`.
    """
    from rewriter.torch_rewrite import rewrite_torch

    _require_plain_target(target, layers)
    watch = Stopwatch()
    with watch.stage("capture"):
        checkpoint = Checkpoint.at(folder)
        checkpoint.refuse_quantised()
        files = _files(folder)
        tensors = {name: tensor for file in files for name, tensor in safetensors_stream.stored(file).items()}
        with in_proportion(folder):
            model = narrowed(checkpoint.model_class, checkpoint.config())
        before, config = _state(model), model.config.to_dict()  # type: ignore[operator, union-attr]
    model, summary = rewrite_torch(
        model, target, layers=layers, example_inputs=None, inplace=True, verify=True, kernels="off"
    )
    with watch.stage("transform"):
        pooled = dict(_pooled(before, _state(model), model))
        edits = list(_differences(config, model.config.to_dict()))  # type: ignore[operator, union-attr]
        _require_whole(model, summary, pooled, edits, tensors)
        exact = {name: _tied(name, tensors[name], *heads) for name, heads in pooled.items()}
    return (
        StreamedCheckpoint(folder, files, pooled, _edited(checkpoint.raw, edits)),
        _report(summary, model, pooled, tensors, exact, watch),
    )


def _require_plain_target(target: Any, layers: str | None) -> None:
    _, by_selector = assignment(target, layers)
    plain = all(isinstance(t, GroupedQuery) and t.merge in (None, "mean") for t in by_selector.values())
    if not plain or set(by_selector) != {"all"}:
        raise UnsupportedModel(
            "a streamed checkpoint is given fewer key/value heads by their mean and in all layers, nothing else",
            hint=f"use gqaN or mqa without --layers and --merge, or {HINT}",
        )


def _files(folder: Path) -> tuple[Path, ...]:
    """The shards, by the index if there is one; its names stay inside the folder."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return (folder / SINGLE,)
        raise UnsupportedModel(f"{folder} holds no safetensors", hint=f"convert it, or {HINT}")
    return tuple(folder / name for name in shards(index))


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _pooled(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], model: torch.nn.Module
) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (heads before, heads after)) of every tensor that the rewrite changed; proves that it is their mean."""
    if before.keys() != after.keys():
        raise UnsupportedModel("the rewrite changes more than the sizes of stored tensors", hint=HINT)
    owners = huggingface.turned(model)
    for name, old in before.items():
        new = after[name]
        if old.shape == new.shape and torch.equal(old, new):
            continue
        owner = next((path for path in owners if name.startswith(f"{path}.")), None)
        groups = 0 if owner is None else huggingface.heads_of(owners[owner])
        heads = groups * old.shape[0] // max(new.shape[0], 1)
        if not groups or new.shape[0] * heads != old.shape[0] * groups or not _is_mean(old, new, heads, groups):
            raise UnsupportedModel(f"{name} becomes something else than a mean of heads", hint=HINT)
        yield name, (heads, groups)


def _is_mean(old: Tensor, new: Tensor, heads: int, groups: int) -> bool:
    return torch.equal(torch.from_numpy(mean_pool(old.numpy(), heads, groups)), new)


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[Any, Any]]:
    """(path, new value) of each entry that differs, inner configs entered."""
    for key, value in new.items():
        was = old.get(key)
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            yield from _differences(was, value, (*path, key))
        elif was != value:
            yield (*path, key), value


def _edited(raw: Mapping[str, Any], edits: list[tuple[Any, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(raw))
    for path, value in edits:
        place = made
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return made


def _require_whole(
    model: torch.nn.Module,
    summary: RewriteReport,
    pooled: Mapping[str, tuple[int, int]],
    edits: list[tuple[Any, Any]],
    tensors: Mapping[str, Stored],
) -> None:
    """The config must say all, and the checkpoint hold what the narrow model has, at its own width."""
    if not huggingface.config_tells_all(model) or summary.refused or not pooled or not edits:
        reason = f": {summary.refused[0].reason}" if summary.refused else ""
        raise UnsupportedModel(f"the config alone cannot say what was rewritten{reason}", hint=HINT)
    narrow = model.state_dict()
    for name, (heads, _) in pooled.items():
        found = tensors.get(name)
        if found is None:
            raise UnsupportedModel(f"the checkpoint has no tensor {name}", hint=HINT)
        if found.dtype not in _FLOATS or len(found.shape) != narrow[name].dim() or found.shape[0] % heads:
            raise UnsupportedModel(
                f"{name} is {found.dtype} {list(found.shape)}, no {heads} heads of floats", hint=HINT
            )


def _tied(name: str, tensor: Stored, heads: int, groups: int) -> bool:
    found = safetensors_stream.read(tensor, name)
    return ties(found.view(torch.uint8).reshape(found.shape[0], -1).numpy(), heads, groups)


def _report(
    summary: RewriteReport,
    model: torch.nn.Module,
    pooled: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, Stored],
    exact: Mapping[str, bool],
    watch: Stopwatch,
) -> RewriteReport:
    """The narrow model's report with the checkpoint's figures; what cannot be told without running it is left out."""
    narrow = dict(model.named_parameters())
    name = max(pooled, key=lambda n: len(tensors[n].shape))
    heads, groups = pooled[name]
    wider = tensors[name].shape[0] * groups / (heads * narrow[name].shape[0])
    scale = wider * _FLOATS[tensors[name].dtype] / narrow[name].element_size()
    cache = Change(*(round(n * scale) for n in (summary.kv_bytes_per_token.before, summary.kv_bytes_per_token.after)))
    before = sum(t.count for t in tensors.values())
    gone = sum(tensors[n].count - tensors[n].count // h * g for n, (h, g) in pooled.items())
    owners = list(huggingface.turned(model))
    rows = []
    for row in summary.sites:
        inside = [
            n for o in owners if o == row.name or row.name.startswith(f"{o}.") for n in pooled if n.startswith(f"{o}.")
        ]
        tied = all(exact[n] for n in inside) if inside else all(exact.values())
        rows.append(replace(row, exact=tied, error=None, floor=None, notes=(*row.notes, NOTE)))
    seconds = {**summary.seconds}
    for stage, value in watch.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + value
    return replace(
        summary, sites=tuple(rows), parameters=Change(before, before - gone), kv_bytes_per_token=cache, flops=None,
        fidelity=None, seconds=seconds, arithmetic=None, drawings=(),
    )  # fmt: skip


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
