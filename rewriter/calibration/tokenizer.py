"""The tokenizer that lies beside a model, if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "vocab.json")


def tokenizer_beside(folder: Path) -> Any:
    """The Hugging Face tokenizer in `folder` or its folder "tokenizer"; None if there is none or it cannot be read."""
    for place in (folder, folder / "tokenizer"):
        if any((place / name).is_file() for name in FILES):
            try:
                from transformers import AutoTokenizer

                return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
            except (ImportError, OSError, ValueError):
                return None
    return None
