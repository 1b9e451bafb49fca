"""A folder with a checkpoint: which files are whose, and what a plain or quantised one needs to be read."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rewriter.errors import InvalidModelFile, UnsupportedModel, UsageError, first_line
from rewriter.install.checkpoint_files import is_own, require_own_files
from rewriter.install.conditional_block import conditional_blocks
from rewriter.install.expert_mixer import expert_mixers
from rewriter.install.proportion import require_sane_counts
from rewriter.install.token_mixer import token_mixers
from rewriter.install.torch_module import mixers
from rewriter.install.unit_block import unit_blocks
from rewriter.json_files import read_object
from rewriter.report import stored

FORMAT = 1
SAVE_AGAIN = "download or save it again, as safetensors"
MANIFEST = "rewrite.json"
WEIGHTS = "rewritten.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
EXPLANATION = "this folder holds a rewritten model; load it with rewriter.load(path)"
ATTENTION = ("attn_implementation", "_attn_implementation")

REPLACED: tuple[Callable[[nn.Module], Mapping[str, Any]], ...] = (
    mixers, token_mixers, expert_mixers, conditional_blocks, unit_blocks,
)  # fmt: skip
"""What finds modules of ours in a model, each kind by dotted path."""

OURS = (MANIFEST, stored.FILE, "rewritten*.safetensors", "model*.safetensors*", "pytorch_model*.bin*")
"""Files of an older checkpoint that a new one takes the place of."""

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
            raise InvalidModelFile(f"{folder} has neither {CONFIG} nor {MANIFEST}", hint=where_else(folder))
        require_own_files(folder)
        raw = read_object(folder / CONFIG)
        names = raw.get("architectures")
        model_class = class_called(str(names[0]) if isinstance(names, list) and names else "")
        refuse_code(raw, folder / CONFIG)
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


def where_else(folder: Path) -> str:
    """What to give instead of a folder without a config: pipelines of several models hold one in each subfolder."""
    inner = [file.parent.name for file in sorted(folder.glob(f"*/{CONFIG}"))]
    if inner:
        return f"give one of the models in it: {', '.join(inner[:5])}"
    return "give a Hugging Face checkpoint, or a folder that rewriter.save wrote"


def load_reason(error: Exception) -> str:
    return "tensors have other shapes than its config says" if "mismatched_sizes" in str(error) else first_line(error)


def refuse_code(config: Any, file: Path) -> None:
    """A config may name a repository to fetch its attention from, which is code; names of torch's own are words."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            asked = [] if key not in ATTENTION else list(value.values()) if isinstance(value, Mapping) else [value]
            if any(name is not None and not str(name).replace("_", "").isalnum() for name in asked):
                raise InvalidModelFile(
                    f"{file} is unsafe: it asks for code from elsewhere ({key}: {str(value)[:80]!r})",
                    hint="remove that entry",
                )
            refuse_code(value, file)
    elif isinstance(config, list):
        for value in config:
            refuse_code(value, file)


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def class_called(name: str) -> Any:
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
