"""Saving and loading rewritten torch models: safetensors and JSON, never pickle.

Where the config tells all, a rewritten model is an ordinary checkpoint. Elsewhere the folder holds the weights under
a name of their own, rewrite.json (how to rebuild the modules on the original architecture), and a config.json that
makes a plain from_pretrained stop with an explanation instead of filling gaps with random weights.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.drafts import require_place
from rewriter.errors import InvalidModelFile, RewriteError, UnsupportedModel, UsageError, first_line
from rewriter.install import (
    conditional_block,
    expert_mixer,
    huggingface,
    repeated_projection,
    token_mixer,
    unit_block,
)
from rewriter.install.checkpoint_files import is_own, require_own_files
from rewriter.install.conditional_block import conditional_blocks
from rewriter.install.expert_mixer import expert_mixers
from rewriter.install.mixer import rebuild
from rewriter.install.proportion import in_proportion, require_sane_counts
from rewriter.install.shared_cache import share, sharers
from rewriter.install.token_mixer import Absorbed, absorbed, token_mixers
from rewriter.install.torch_module import mixers, place
from rewriter.install.unit_block import follow, unit_blocks
from rewriter.json_files import read_object
from rewriter.report import stored
from rewriter.report.rewrite_report import RewriteReport
from rewriter.whole_file import write_whole
from rewriter.whole_folder import whole_folder

FORMAT = 1
SAVE_AGAIN = "download or save it again, as safetensors"
MANIFEST = "rewrite.json"
WEIGHTS = "rewritten.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
EXPLANATION = "this folder holds a rewritten model; load it with rewriter.load(path)"


REPLACED: tuple[Callable[[nn.Module], Mapping[str, Any]], ...] = (
    mixers, token_mixers, expert_mixers, conditional_blocks, unit_blocks,
)  # fmt: skip
"""What finds modules of ours in a model, each kind by dotted path."""

OURS = (MANIFEST, stored.FILE, "rewritten*.safetensors", "model*.safetensors*", "pytorch_model*.bin*")
"""Files of an older checkpoint that a new one takes the place of."""


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    source: Path | None = None,
    **kwargs: Any,
) -> None:
    """Write `model` to the folder `path`, so that `load` (or from_pretrained, where the config suffices) reads it.

    The folder appears whole or not at all, and takes the place of an existing one in one moment; files there that are
    no part of the checkpoint stay.

    Args:
        state_dict: weights to write instead of the model's own, e.g. gathered from several devices.
        source: the folder that the model came from; its side files (tokenizer, ...) go along.
        kwargs: for save_pretrained, where it is used.

    Raises:
        UsageError: if the folder above `path` does not exist, or `path` is a file, or may not be written.
        CannotWrite: if the disk is full.
    """
    target = Path(path)
    if not os.path.isdir(target.absolute().parent):
        raise UsageError(f"{target.absolute().parent} is not a folder", hint="Create it first.")
    require_place(target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file", hint="Give the name of a folder.")
    with whole_folder(target, drop=OURS) as draft:
        _write(model, draft, state_dict, kwargs)
        if source is not None:
            copy_side_files(source, draft, there=target)


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


NOT_COPIED = (
    *(CONFIG, GENERATION, MANIFEST, stored.FILE),
    *("*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx*"),
    *("README.md", ".git*"),
)
"""Files of a checkpoint that describe or hold the weights, and those about it as a repository."""


def copy_side_files(source: Path, target: Path, *, there: Path | None = None) -> None:
    """Copy what else belongs to a checkpoint (tokenizer, preprocessor, licence).

    What `target`, or the folder `there` that it will replace, has already is not copied; links that lead out of the
    checkpoint are not followed.
    """
    for file in sorted(source.iterdir()):
        taken = any((folder / file.name).exists() for folder in (target, there) if folder is not None)
        if not taken and _is_side_file(file):
            shutil.copyfile(file, target / file.name)


def _is_side_file(file: Path) -> bool:
    return file.is_file() and not any(fnmatch.fnmatch(file.name, p) for p in NOT_COPIED) and is_own(file)


# ---------------------------------------------------------------------- writing


def _write(model: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None, kwargs: Mapping[str, Any]) -> None:
    _write_weights_and_config(model, folder, state_dict, kwargs)
    report = getattr(model, "rewrite_report", None)
    if isinstance(report, RewriteReport):
        write_whole(stored.to_text(report) + "\n", folder / stored.FILE)
    else:
        (folder / stored.FILE).unlink(missing_ok=True)


def _write_weights_and_config(
    model: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None, kwargs: Mapping[str, Any]
) -> None:
    replaced = any(of(model) for of in REPLACED)
    plain = not replaced and not repeated_projection.repeated(model)
    if huggingface.is_pretrained(model) and plain and huggingface.config_tells_all(model):
        model_class: Any = type(model)
        model_class.save_pretrained(model, folder, state_dict=state_dict, **kwargs)
        return
    tied = _write_weights(model.state_dict() if state_dict is None else state_dict, folder / WEIGHTS)
    _replace_json(folder / MANIFEST, _manifest(model, WEIGHTS, tied))
    if huggingface.is_pretrained(model):
        _replace_json(folder / CONFIG, _stopping_config(model))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]


def _manifest(model: nn.Module, weights: str, tied: Mapping[str, str]) -> dict[str, Any]:
    owners: dict[str, Any] = {path: {"kind": "mixer", **m.describe()} for path, m in mixers(model).items()}
    owners |= {path: {"kind": "token mixer", **m.describe()} for path, m in token_mixers(model).items()}
    owners |= {path: {"kind": "experts", **m.describe()} for path, m in expert_mixers(model).items()}
    owners |= {path: {"kind": "light and heavy", **m.describe()} for path, m in conditional_blocks(model).items()}
    owners |= {path: {"kind": "unit"} | m.describe() for path, m in unit_blocks(model).items()}
    owners |= {path: {"kind": "absorbed"} for path in absorbed(model)}
    for path, module in huggingface.turned(model).items():
        owners[path] = huggingface.describe(module)
    for path, module in repeated_projection.repeated(model).items():
        owners[path] = repeated_projection.describe(module)
    caches = {path: [hooks.kv_heads, hooks.heads] for path, hooks in sharers(model).items()}
    return {
        "format": FORMAT,
        "rewriter": _version("rewriter"),
        "architecture": _architecture(model),
        "owners": owners,
        "caches": caches,
        "weights": weights,
        "tied": dict(tied),
    }


def _architecture(model: nn.Module) -> dict[str, Any]:
    if not huggingface.is_pretrained(model):
        return {"kind": "module", "class": type(model).__qualname__}
    config: Any = model.config
    return {
        "kind": "transformers",
        "class": type(model).__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": getattr(config, "_attn_implementation", None),
        "transformers": _version("transformers"),
    }


def _stopping_config(model: nn.Module) -> dict[str, Any]:
    # auto classes stop at the model type, concrete ones at the name of the weights, which they print
    return {
        "model_type": "rewriter",
        "architectures": [f"Rewritten{type(model).__name__}"],
        "transformers_weights": f"{MANIFEST} ({EXPLANATION})",
    }


def _write_weights(state: Mapping[str, Tensor], file: Path) -> dict[str, str]:
    """Write every tensor once; returns alias -> name of what is stored under another name."""
    from safetensors.torch import save_file

    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise UsageError(f"{name} is offloaded", hint="Bring the whole model into memory before saving it.")
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in first:
            tied[name] = first[identity]
            continue
        first[identity] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        stored[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    save_file(stored, file, metadata={"format": "pt"})
    return tied


def _replace_json(file: Path, data: Mapping[str, Any]) -> None:
    write_whole(json.dumps(data, indent=1, sort_keys=True) + "\n", file)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------------- reading


def _where_else(folder: Path) -> str:
    """What to give instead of a folder without a config: pipelines of several models hold one in each subfolder."""
    inner = [file.parent.name for file in sorted(folder.glob(f"*/{CONFIG}"))]
    if inner:
        return f"give one of the models in it: {', '.join(inner[:5])}"
    return "give a Hugging Face checkpoint, or a folder that rewriter.save wrote"


@dataclass(frozen=True)
class Checkpoint:
    """An ordinary checkpoint, not loaded.

    Attributes:
        model_class: one of transformers' own. raw: config.json as it is.
    """

    folder: Path
    model_class: Any
    raw: Mapping[str, Any]

    @staticmethod
    def at(folder: Path) -> Checkpoint:
        """Raises InvalidModelFile if the config is missing, broken or asks for code; UsageError for unknown classes;
        UnsupportedModel for an adapter."""
        if (folder / ADAPTER).is_file():
            raise UnsupportedModel(
                f"{folder} holds an adapter that was not merged ({ADAPTER})",
                hint="merge it with peft: AutoPeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)",
            )
        if not (folder / CONFIG).is_file():
            raise InvalidModelFile(f"{folder} has neither {CONFIG} nor {MANIFEST}", hint=_where_else(folder))
        require_own_files(folder)
        raw = read_object(folder / CONFIG)
        names = raw.get("architectures")
        model_class = _model_class(str(names[0]) if isinstance(names, list) and names else "")
        _refuse_code(raw, folder / CONFIG)
        require_sane_counts(raw, folder / CONFIG)
        return Checkpoint(folder, model_class, raw)

    def config(self) -> Any:
        """The config as transformers understands it. Raises InvalidModelFile if it does not."""
        try:
            return self.model_class.config_class.from_dict(dict(self.raw))
        except Exception as error:  # each architecture checks its config in its own way
            raise InvalidModelFile(
                f"{self.folder / CONFIG} cannot be read: {first_line(error)}", hint="download it again"
            ) from error

    def refuse_quantised(self, why: str = "") -> None:
        """Raises UnsupportedModel if the config says that weights are stored in a library's own quantised format."""
        inner = [value for value in self.raw.values() if isinstance(value, Mapping)]
        said = next((q for c in (self.raw, *inner) if isinstance(q := c.get("quantization_config"), Mapping)), None)
        if said:
            method = str(said.get("quant_method", ""))
            by = f" by {method}" if method.replace("-", "").isalnum() else ""
            raise UnsupportedModel(
                f"the weights of {self.folder} are quantised{by}, says its config{why}",
                hint="rewrite the float or bfloat16 checkpoint that it was made from, and quantise what comes out",
            )


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
        checkpoint.refuse_quantised(f": {_reason(error)}")
        raise InvalidModelFile(f"{folder} cannot be read: {_reason(error)}", hint=SAVE_AGAIN) from error
    missing = sorted(set(found["missing_keys"]) & {name for name, _ in loaded.named_parameters()})
    if missing:
        raise InvalidModelFile(
            f"{folder} lacks {len(missing)} tensors that its architecture has, the first of them {missing[0]}; "
            "they would be random",
            hint=f"{SAVE_AGAIN}, or load the model yourself and pass it as an object",
        )
    return loaded


def _reason(error: Exception) -> str:
    return "tensors have other shapes than its config says" if "mismatched_sizes" in str(error) else first_line(error)


ATTENTION = ("attn_implementation", "_attn_implementation")


def _refuse_code(config: Any, file: Path) -> None:
    """A config may name a repository to fetch its attention from, which is code; names of torch's own are words."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            asked = [] if key not in ATTENTION else list(value.values()) if isinstance(value, Mapping) else [value]
            if any(name is not None and not str(name).replace("_", "").isalnum() for name in asked):
                raise InvalidModelFile(
                    f"{file} is unsafe: it asks for code from elsewhere ({key}: {str(value)[:80]!r})",
                    hint="remove that entry",
                )
            _refuse_code(value, file)
    elif isinstance(config, list):
        for value in config:
            _refuse_code(value, file)


def _build(manifest: Mapping[str, Any], folder: Path) -> nn.Module:
    architecture = manifest.get("architecture") or {}
    if not isinstance(architecture, Mapping):
        raise InvalidModelFile(f"{folder / MANIFEST} does not say what the model is")
    require_sane_counts(architecture, folder / MANIFEST)
    _refuse_code({"attn_implementation": architecture.get("attention"), **architecture}, folder / MANIFEST)
    if architecture.get("kind") != "transformers":
        raise UsageError(
            f"{folder} holds a {architecture.get('class', 'module')}, which has to be built by you",
            hint="Pass a fresh one: rewriter.load(path, module=...).",
        )
    model_class = _model_class(str(architecture["class"]))
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


def _model_class(name: str) -> Any:
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError("loading this model needs transformers", hint="pip install rewriter[hub]") from error
    found = getattr(library, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, library.PreTrainedModel)):
        raise UsageError(
            f"{name!r} is no model class of transformers",
            hint="Pass a freshly built model: rewriter.load(path, module=...).",
        )
    return found


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
