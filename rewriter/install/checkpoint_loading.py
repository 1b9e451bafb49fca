"""Loads what `checkpoint_saving` wrote, or a Hugging Face checkpoint of safetensors; never a pickle."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewriter.errors import InvalidModelFile, RewriteError, UsageError, first_line
from rewriter.install import (
    conditional_block,
    expert_mixer,
    huggingface,
    repeated_projection,
    token_mixer,
    unit_block,
)
from rewriter.install.checkpoint_files import require_own_files
from rewriter.install.checkpoint_folder import (
    FORMAT,
    GENERATION,
    MANIFEST,
    REPLACED,
    SAVE_AGAIN,
    Checkpoint,
    class_called,
    load_reason,
    refuse_code,
)
from rewriter.install.mixer import rebuild
from rewriter.install.proportion import in_proportion, require_sane_counts
from rewriter.install.shared_cache import share
from rewriter.install.token_mixer import Absorbed
from rewriter.install.torch_module import place
from rewriter.install.unit_block import follow
from rewriter.json_files import read_object
from rewriter.report import stored


def load(path: str | os.PathLike[str], *, module: nn.Module | None = None) -> nn.Module:
    """Read what `save` wrote.

    Args:
        module: for a model that is not one of transformers' own: a freshly built one of the original architecture,
            which is rewritten in place and returned. Others are built here and returned in eval mode.

    Raises:
        UsageError: if there is no such folder, or a module is needed and missing.
        InvalidModelFile: if the folder is broken, of an unknown format, or does not fit the module.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is not a folder", hint="Give the folder that rewriter.save wrote.")
    found = _load(folder, module)
    report = stored.from_text((folder / stored.FILE).read_text("utf-8", "replace")) if _has_report(folder) else None
    if report is not None:
        found.rewrite_report = report  # type: ignore[assignment]
    return found


def _has_report(folder: Path) -> bool:
    return (folder / stored.FILE).is_file()


def _load(folder: Path, module: nn.Module | None) -> nn.Module:
    require_own_files(folder)
    if not (folder / MANIFEST).is_file():
        return _load_plain(folder, module)
    manifest = read_object(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InvalidModelFile(
            f"{folder / MANIFEST} has format {manifest.get('format')!r}, this version reads {FORMAT}",
            hint="Load it with the version of rewriter that wrote it, or a newer one.",
        )
    with _fitting(folder / MANIFEST), in_proportion(folder):
        built = _build(manifest, folder) if module is None else module
        _rewrite(built, manifest["owners"])
        _require_plain(built)
        follow(built)
        _share(built, manifest.get("caches", {}))
        _fill(built, folder / Path(str(manifest["weights"])).name, manifest["tied"])
    return built.eval() if module is None else built


@contextmanager
def _fitting(file: Path) -> Iterator[None]:
    """Whatever building by a stranger's numbers raises says that they do not fit."""
    try:
        yield
    except RewriteError:
        raise
    except (KeyError, IndexError) as error:
        raise InvalidModelFile(f"{file} does not fit the model: it lacks {error}") from error
    except Exception as error:  # torch, transformers and the modules themselves check in ways of their own
        raise InvalidModelFile(f"{file} does not fit the model: {first_line(error)}") from error


def _load_plain(folder: Path, module: nn.Module | None) -> nn.Module:
    if module is not None:
        raise InvalidModelFile(f"{folder} has no {MANIFEST}", hint="Give a folder that rewriter.save wrote.")
    checkpoint = Checkpoint.at(folder)
    model_class = checkpoint.model_class
    loaded: nn.Module
    try:
        with in_proportion(folder):
            # weights_only: where there are no safetensors, the unpickler must make nothing but tensors
            loaded, found = model_class.from_pretrained(
                folder, weights_only=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever its parts raise on broken configs, cut-off weights and forbidden pickles
        if isinstance(error, MemoryError | RewriteError):
            raise
        checkpoint.refuse_quantised(f": {load_reason(error)}")
        raise InvalidModelFile(f"{folder} cannot be read: {load_reason(error)}", hint=SAVE_AGAIN) from error
    missing = sorted(set(found["missing_keys"]) & {name for name, _ in loaded.named_parameters()})
    if missing:
        raise InvalidModelFile(
            f"{folder} lacks {len(missing)} tensors that its architecture has, the first of them {missing[0]}; "
            "they would be random",
            hint=f"{SAVE_AGAIN}, or load the model yourself and pass it as an object",
        )
    return loaded


def _build(manifest: Mapping[str, Any], folder: Path) -> nn.Module:
    architecture = manifest.get("architecture") or {}
    if not isinstance(architecture, Mapping):
        raise InvalidModelFile(f"{folder / MANIFEST} does not say what the model is")
    require_sane_counts(architecture, folder / MANIFEST)
    refuse_code({"attn_implementation": architecture.get("attention"), **architecture}, folder / MANIFEST)
    if architecture.get("kind") != "transformers":
        raise UsageError(
            f"{folder} holds a {architecture.get('class', 'module')}, which has to be built by you",
            hint="Pass a fresh one: rewriter.load(path, module=...).",
        )
    model_class = class_called(str(architecture["class"]))
    config = model_class.config_class.from_dict(architecture["config"])
    attention = architecture.get("attention")
    built: nn.Module
    with _without_initialisation():
        built = model_class._from_config(config, **({} if attention is None else {"attn_implementation": attention}))
    built.tie_weights()  # type: ignore[operator]
    if (folder / GENERATION).is_file() and built.can_generate():  # type: ignore[operator]
        library: Any = importlib.import_module("transformers")
        built.generation_config = library.GenerationConfig.from_pretrained(folder)
    return built


def _without_initialisation() -> Any:
    """Skips random initialisation where this version of transformers offers that: all weights are read."""
    from contextlib import nullcontext

    try:
        return importlib.import_module("transformers.initialization").no_init_weights()
    except (ImportError, AttributeError):
        return nullcontext()


def _rewrite(model: nn.Module, owners: Mapping[str, Any]) -> None:
    for path, description in owners.items():
        original = model.get_submodule(path)
        if description["kind"] == "knob":
            huggingface.rebuild(original, description)
            huggingface.guard_saving(model, path)
        elif description["kind"] in ("repeated", "spread"):
            repeated_projection.rebuild(model, path, description)
            huggingface.guard_saving(model, path)
        elif description["kind"] == "absorbed":
            place(model, path, Absorbed())
        elif description["kind"] == "token mixer":
            place(model, path, token_mixer.rebuild(description, original))
        elif description["kind"] == "experts":
            place(model, path, expert_mixer.rebuild(description, original))
        elif description["kind"] == "light and heavy":
            place(model, path, conditional_block.rebuild(description, original))
        elif description["kind"] == "unit":
            place(model, path, unit_block.rebuild(description, original))
        elif description["kind"] == "mixer":
            details = {name: value for name, value in description.items() if name != "kind"}
            place(model, path, rebuild(details, original))
        else:
            raise ValueError(f"{description['kind']!r} is no kind of rewrite")


def _require_plain(model: nn.Module) -> None:
    """Specs are what kernels are chosen and made by: numbers, flags and enums, whatever a manifest says.

    Raises TypeError or UnsafeInput for anything else.
    """
    from codegen.render import numbers

    modules = [m for of in REPLACED for m in of(model).values()]
    for spec in (module.spec for module in modules):
        hash(spec)
        numbers(spec)


def _share(model: nn.Module, caches: Mapping[str, Any]) -> None:
    for owner, (kv_heads, heads) in caches.items():
        share(model.get_submodule(owner), int(kv_heads), None if heads is None else int(heads))


def _fill(model: nn.Module, file: Path, tied: Mapping[str, str]) -> None:
    """Put the stored tensors into the model, one by one; parameters keep their identity, so ties stay tied."""
    from safetensors import SafetensorError, safe_open

    slots = model.state_dict(keep_vars=True)
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            _same_names(names | set(tied), set(slots), file)
            for name in names:
                _put(slots[name], stored.get_tensor(name), name, file)
    except (OSError, SafetensorError) as error:
        raise InvalidModelFile(f"{file} cannot be read: {error}") from error
    for alias, name in tied.items():
        if slots[alias] is not slots[name]:
            _put(slots[alias], slots[name].detach(), alias, file)


def _same_names(stored: set[str], expected: set[str], file: Path) -> None:
    for names, what in ((expected - stored, "lacks"), (stored - expected, "holds unknown")):
        if names:
            raise InvalidModelFile(f"{file} {what} {len(names)} tensors, the first of them {min(names)}")


def _put(slot: Tensor, tensor: Tensor, name: str, file: Path) -> None:
    if slot.shape != tensor.shape:
        raise InvalidModelFile(f"{file}: {name} is {list(tensor.shape)}, the model has {list(slot.shape)}")
    slot.data = tensor.to(slot.device)
