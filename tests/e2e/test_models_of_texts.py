"""Models that prepare texts themselves and write what they compute into the mapping that they are given.

Sentence-transformers' are of this kind; this is a small one in their spelling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.install.torch_module import mixers
from tests.targets.lossless_twin import distance

WIDTH, HEADS = 16, 4
TEXTS = [f"{word} attention {word}s {word} key and value" for word in ("an", "some", "no", "every")] * 4


class Letters:
    """A tokenizer: one token for each letter."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        rows = [[ord(c) % 30 + 1 for c in text] for text in texts]
        if options.get("return_tensors") is None:
            return {"input_ids": rows}
        longest = max(map(len, rows))
        ids = np.array([row + [0] * (longest - len(row)) for row in rows])
        made = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
        return made if options["return_tensors"] == "np" else {n: torch.from_numpy(a) for n, a in made.items()}

    def pad(self, rows: Any, **options: Any) -> Any:
        raise NotImplementedError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        out: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return out


class Encoder(nn.Module):
    """Like a sentence encoder: features in, the same dict with embeddings out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Letters()
        self.embed, self.attention = nn.Embedding(32, WIDTH), Attention()

    def preprocess(self, texts: list[str]) -> dict[str, Any]:
        return self.tokenizer(texts, return_tensors="pt")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.embed(features["input_ids"])
        features["token_embeddings"] = x + self.attention(x, features["attention_mask"])
        return features


def encoder(*, tied: bool) -> Encoder:
    torch.manual_seed(0)
    model = Encoder().eval()
    for projection in (model.attention.k, model.attention.v) if tied else ():
        for tensor in projection.parameters():
            heads = tensor.data.view(HEADS, -1, *tensor.shape[1:])
            heads[1::2] = heads[::2].clone()
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_dict_that_is_written_into_is_no_input_of_the_next_call(tied: bool) -> None:
    model = encoder(tied=tied)
    given = model.preprocess(TEXTS[:3])
    for inputs in (None, (given,)):
        new: Any = rewriter.optimize(model, "gqa2", example_inputs=inputs)
        assert [*mixers(new)] == ["attention"] and [row.exact for row in new.rewrite_report.sites] == [tied]
        drift = new.rewrite_report.fidelity.max_abs
        assert drift < 1e-5 if tied else drift > 1e-3  # one dict for both, and nothing would seem to move
        with torch.no_grad():
            found = [m(m.preprocess(TEXTS[:2]))["token_embeddings"] for m in (new, model)]
        assert distance(*found) < 1e-5 if tied else distance(*found) > 1e-3
    assert set(given) == {"input_ids", "attention_mask"}


def test_texts_calibrate_and_train_them_by_their_own_tokenizer() -> None:
    model = encoder(tied=False)
    mean, fitted = (
        rewriter.optimize(model, "gqa2", calibration=given).rewrite_report.sites[0] for given in (None, TEXTS)
    )
    assert fitted.merge == "joint" and fitted.error < mean.error
    student: Any = rewriter.optimize(model, "gqa2")
    done = rewriter.uptrain(student, model, TEXTS, steps=20, validation=TEXTS[:4])
    assert done.after.cosine > done.before.cosine
