"""Inputs to capture a PyTorch model with: the caller's, or defaults read off the model's own interface."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rewriter.errors import UsageError
from rewriter.placement import device_of, moved, without_numbers

Call = tuple[tuple[Any, ...], dict[str, Any]]

BATCH, LENGTH, FRAMES = 2, 11, 96
"""Sizes of default inputs; small, different from each other and from common head counts."""


def prepare(module: torch.nn.Module, example_inputs: Any = None) -> Call:
    """(args, kwargs) for one forward call.

    `example_inputs` is a mapping of keyword tensors, a tensor, or a sequence of positional arguments; None asks
    for defaults, which models with a Hugging Face style ``config`` and ``main_input_name`` have, and those that prepare
    texts themselves. Tensors are brought to the module's device.
    Raises UsageError when there are none.
    """
    chosen = (_features(module) or default_inputs(module)) if example_inputs is None else example_inputs
    given = as_call(chosen)
    for tensor in pytree.tree_leaves(given):
        if isinstance(tensor, torch.Tensor) and (hidden := without_numbers(tensor)) is not None:
            raise UsageError(f"an example input is {hidden}", hint="pass ordinary tensors: the model is run on them")
    args, kwargs = moved(given, device_of(module))
    return args, {**kwargs, **_without_cache(module, kwargs)}


def as_call(example_inputs: Any) -> Call:
    """(args, kwargs) for a mapping of keyword tensors, a tensor, or a sequence of positional arguments.

    Raises UsageError for anything else.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise UsageError(
        f"example_inputs is a {type(example_inputs).__name__}",
        hint="pass a dict of keyword tensors, a tensor, or a tuple of positional arguments",
    )


def _parameters(module: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _without_cache(module: torch.nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """A cache object in the output cannot be exported, and says nothing about the layout."""
    names, config = _parameters(module), getattr(module, "config", None)
    takes = "use_cache" in names or getattr(config, "use_cache", False)
    if not takes and any(p.kind is p.VAR_KEYWORD for p in names.values()):  # and hands on to a model of text inside
        takes = getattr(_text_config(config), "use_cache", False)
    return {"use_cache": False} if takes and "use_cache" not in given else {}


def default_inputs(module: torch.nn.Module, batch: int = BATCH, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Random small inputs by the names that the module's forward takes."""
    config = getattr(module, "config", None)
    main = getattr(module, "main_input_name", None)
    if config is None or not isinstance(main, str):
        raise UsageError(
            f"no default inputs for a {type(module).__name__}",
            hint="pass example_inputs=(tensor, ...) or a dict of keyword tensors",
        )
    generator = torch.Generator().manual_seed(0)
    names = _parameters(module)
    inputs: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        inputs["input_ids"] = _token_ids(config, batch, length, generator)
        if "attention_mask" in names:
            inputs["attention_mask"] = _padded_mask(batch, length)
    elif main in {"pixel_values", "pixel_values_videos"}:
        inputs[main] = _pixels(config, batch, generator).to(module.dtype)  # type: ignore[arg-type]
    elif main == "input_values":
        inputs["input_values"] = torch.randn(batch, 4000, generator=generator).to(module.dtype)  # type: ignore[arg-type]
        if (bins := getattr(config, "num_mel_bins", None)) is not None and not _runs(module, inputs):
            frames = int(getattr(config, "max_length", FRAMES))
            inputs["input_values"] = torch.randn(batch, frames, int(bins), generator=generator).to(module.dtype)  # type: ignore[arg-type]
    elif main == "input_features":
        inputs["input_features"] = _spectrogram(config, batch, generator).to(module.dtype)  # type: ignore[arg-type]
    else:
        raise UsageError(f"no default for the input {main!r}", hint="pass example_inputs as a dict of keyword tensors")
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _token_ids(config, batch, max(2, length - 4), generator)
    if main == "input_ids" and "pixel_values" in names and _has_own_vision(config) and not _runs(module, inputs):
        inputs["pixel_values"] = _pixels(config, batch, generator).to(module.dtype)  # type: ignore[arg-type]
    return inputs


def _features(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor]] | None:
    """Two texts as a model prepares them that has a tokenizer of its own, and takes what that makes as one mapping (as
    sentence-transformers do); None of other models."""
    prepared = getattr(module, "preprocess", None) or getattr(module, "tokenize", None)
    if isinstance(getattr(module, "main_input_name", None), str) or not callable(prepared):
        return None
    try:
        made = prepared(["What did the attention cost?", "Less than before."])
    except Exception:  # whatever a stranger's method by that name raises for texts
        return None
    features = {n: t for n, t in made.items() if isinstance(t, torch.Tensor)} if isinstance(made, Mapping) else {}
    return (features,) if features else None


def takes_a_mapping(module: torch.nn.Module) -> bool:
    """Whether a model says that its first argument is a mapping, of all its inputs by name."""
    first = next(iter(_parameters(module).values()), None)
    said = "" if first is None or first.annotation is first.empty else str(first.annotation)
    return re.search(r"\b(dict|mapping)\b", said, re.IGNORECASE) is not None


def _has_own_vision(config: Any) -> bool:
    """A tower for images, or images as a modality beside text."""
    return hasattr(config, "vision_config") or hasattr(config, "image_size")


def _runs(module: torch.nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Models of text and images either need both, or have text alone as their usual input: that only a run can tell."""
    try:
        with torch.no_grad():
            module(**inputs, **_without_cache(module, inputs))
    except Exception:  # whatever a model raises without images
        return False
    return True


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # several, of which none is the model's own
        return config


def _token_ids(config: Any, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Ids that are no special tokens where the vocabulary leaves room."""
    size = int(getattr(_text_config(config), "vocab_size", 32))
    special = [t for t in (getattr(config, n, None) for n in ("pad_token_id", "eos_token_id", "bos_token_id")) if t]
    ids = torch.randint(0, size, (batch, length), generator=generator)
    reserved = torch.tensor([t for entry in special for t in (entry if isinstance(entry, list) else [entry])] or [-1])
    return torch.where(torch.isin(ids, reserved), (ids + size // 2) % size, ids)


def _padded_mask(batch: int, length: int) -> torch.Tensor:
    """Ones with the end of every odd row masked: a mask that hides nothing would hide mistakes."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1::2, length - 3 :] = 0
    return mask


def _pixels(config: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    """[batch, channels, height, width]; [batch, frames, channels, height, width] where the config counts frames."""
    vision = getattr(config, "vision_config", config)
    size = _first(vision, ("image_size", "crop_size"), 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    frames = _first(vision, ("num_frames", "frames_per_clip"), None)
    lead = (batch,) if frames is None else (batch, int(frames))
    return torch.randn(*lead, int(_first(vision, ("num_channels", "in_chans"), 3)), height, width, generator=generator)


def _spectrogram(config: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    """[batch, bins, frames] where the config counts bins and positions, of two frames each; else frames come first."""
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if bins is not None and positions is not None:
        return torch.randn(batch, int(bins), 2 * int(positions), generator=generator)
    bins = _first(config, ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"), 80)
    return torch.randn(batch, FRAMES, int(bins), generator=generator)


def _first(config: Any, names: Sequence[str], default: Any) -> Any:
    """The first of these attributes that there is."""
    return next((v for n in names if (v := getattr(config, n, None)) is not None), default)
