"""Saving and loading rewritten torch models: safetensors and JSON, never pickle.

Where the config tells all, a rewritten model is an ordinary checkpoint. Elsewhere the folder holds the weights under
a name of their own, rewrite.json (how to rebuild the modules on the original architecture), and a config.json that
makes a plain from_pretrained stop with an explanation instead of filling gaps with random weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.drafts import require_place
from rewriter.errors import UsageError
from rewriter.install import (
    huggingface,
    repeated_projection,
)
from rewriter.install.checkpoint_folder import (
    CONFIG,
    EXPLANATION,
    FORMAT,
    MANIFEST,
    OURS,
    REPLACED,
    WEIGHTS,
    copy_side_files,
    package_version,
)
from rewriter.install.conditional_block import conditional_blocks
from rewriter.install.expert_mixer import expert_mixers
from rewriter.install.shared_cache import sharers
from rewriter.install.token_mixer import absorbed, token_mixers
from rewriter.install.torch_module import mixers
from rewriter.install.unit_block import unit_blocks
from rewriter.report import stored
from rewriter.report.rewrite_report import RewriteReport
from rewriter.whole_file import write_whole
from rewriter.whole_folder import whole_folder


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
        "rewriter": package_version("rewriter"),
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
        "transformers": package_version("transformers"),
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
