"""The tokenizer that lies beside a model, or in it, if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewriter.install.checkpoint_files import require_own

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "vocab.json")
_MORE = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model",
         "chat_template.jinja", "config.json")  # fmt: skip
"""What is read along with them."""


def tokenizer_in(model: Any) -> Any:
    """The tokenizer that a model carries (sentence-transformers); None if there is none, or a layer by that name."""
    found = getattr(model, "tokenizer", None)
    return found if callable(found) and not hasattr(found, "forward") else None


def tokenizer_beside(folder: Path) -> Any:
    """The Hugging Face tokenizer in `folder` or its folder "tokenizer"; None if there is none or it cannot be read.

    Raises InvalidModelFile if one of its files is a link that leads elsewhere.
    """
    for place in (folder, folder / "tokenizer"):
        if any((place / name).is_file() for name in FILES):
            for name in (*FILES, *_MORE):
                require_own(place / name)
            try:
                from transformers import AutoTokenizer

                found = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
                for options in ({}, {"truncation": True, "max_length": 8}):  # some only fail when they are used
                    found(["a text"], verbose=False, **options)
                return found
            except MemoryError:
                raise
            except Exception:  # each kind of tokenizer fails in its own way on files that are broken
                return None
    return None
