"""Calibration text that the model writes itself: of its own distribution, the same each time, and refused elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rewriter
from passes.targets import GroupedQuery
from rewriter.calibration import sampled
from rewriter.calibration.batches import SAMPLED, batches
from rewriter.calibration.sampled import sampled_text
from rewriter.errors import UnsupportedModel, UsageError
from tests.zoo.models import ZOO

LENGTH = 24


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    """Sharp enough that what follows a token is told by it."""
    model: Any = ZOO["llama-sdpa"].build().eval()
    with torch.no_grad():
        model.lm_head.weight *= 10.0
    yield model


def test_text_is_of_the_models_own_distribution(llama: Any) -> None:
    ids = sampled_text(llama, sequences=32, length=LENGTH)
    assert (ids.shape, ids.dtype) == ((32, LENGTH), torch.int64)
    assert len(set(ids[:, 0].tolist())) > 5  # any token may be the first

    def surprise(rows: torch.Tensor) -> float:
        with torch.no_grad():
            return float(llama(rows, labels=rows).loss)

    shuffled = ids[:, torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        chances = llama(ids).logits[:, :-1].log_softmax(-1)
    entropy = float(-(chances.exp() * chances).sum(-1).mean())
    assert surprise(ids) == pytest.approx(entropy, rel=0.1)  # as surprising as the model says
    assert surprise(shuffled) > 1.5 * surprise(ids)  # control


def test_sequences_are_pieces_with_beginnings_of_their_own(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a piece is any, and the others follow from it."""

    def begins_anew() -> float:
        """How much more surprising tokens 8 and 16 are than the others."""
        ids = sampled_text(llama, sequences=32, length=22)
        assert ids.shape == (32, 22)
        with torch.no_grad():
            chances = llama(ids).logits[:, :-1].log_softmax(-1)
        surprise = -chances.gather(-1, ids[:, 1:, None])[..., 0].mean(dim=0)  # of tokens 1 to 21
        begins = torch.isin(torch.arange(1, 22), torch.tensor([8, 16]))
        return float(surprise[begins].mean() / surprise[~begins].mean())

    assert begins_anew() < 1.2  # control: one piece
    monkeypatch.setattr(sampled, "PIECE", 8)
    monkeypatch.setattr(sampled, "_TOGETHER", 50)  # divides neither pieces nor sequences
    assert begins_anew() > 1.5


def test_it_is_the_same_each_time_and_leaves_no_trace(llama: Any) -> None:
    llama.train()
    state = torch.random.get_rng_state()
    first, again, other = (sampled_text(llama, sequences=2, length=LENGTH, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state()) and llama.training
    llama.eval()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_models_are_calibrated_on_what_they_write(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import rewriter.torch_rewrite

    short = sampled_text(llama, sequences=4, length=LENGTH)
    monkeypatch.setattr(rewriter.torch_rewrite, "sampled_text", lambda model: short)
    asked = rewriter.optimize(llama, GroupedQuery(1), layers="0", calibration=SAMPLED, verify=False)
    given = rewriter.optimize(llama, GroupedQuery(1), layers="0", calibration=short, verify=False)
    assert asked.rewrite_report.sites[0].merge == "joint"
    for ours, theirs in zip(asked.parameters(), given.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_writes_no_text_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="does not write text") as error:
        rewriter.optimize(ZOO["bert-sdpa"].build().eval(), "mqa", calibration=SAMPLED)
    assert error.value.hint
    with pytest.raises(UnsupportedModel, match="does not write text"):
        sampled_text(ZOO["t5-sdpa"].build().eval())
    with pytest.raises(UsageError, match="do not write"):
        batches(SAMPLED, causal=True)


def test_the_command_line_knows_the_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.cli.arguments import calibration_of

    monkeypatch.chdir(tmp_path)
    assert calibration_of(Path(SAMPLED)) == SAMPLED
    (tmp_path / SAMPLED).write_bytes(b"")  # a file of that name is a file
    with pytest.raises(UsageError):
        calibration_of(Path(SAMPLED))
    np.save("ids.npy", np.arange(5))
    assert calibration_of(Path("ids.npy")).tolist() == [0, 1, 2, 3, 4]
