"""Inputs made up for models that are given none: images where text alone is not enough."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rewriter.capture.example_inputs import default_inputs


class _TextAndImages(nn.Module):
    """A model of two towers, or one that takes images beside text if there are any."""

    main_input_name = "input_ids"
    dtype = torch.float32

    def __init__(self, *, needs: bool, tower: bool = True) -> None:
        super().__init__()
        self.needs = needs
        vision = {"vision_config": SimpleNamespace(image_size=(6, 4), num_channels=3)} if tower else {}
        self.config = SimpleNamespace(vocab_size=20, **vision)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        if pixel_values is None:
            if self.needs:
                raise ValueError("You have to specify pixel_values")
            return input_ids * attention_mask
        assert len(pixel_values) == len(input_ids)
        return pixel_values.mean() * input_ids


def test_a_model_that_needs_images_gets_them() -> None:
    model = _TextAndImages(needs=True)
    inputs = default_inputs(model, batch=3)
    assert inputs["pixel_values"].shape == (3, 3, 6, 4)
    assert model(**inputs).shape == inputs["input_ids"].shape


@pytest.mark.parametrize("needs", [pytest.param(False, id="text-is-enough"), pytest.param(True, id="no-tower")])
def test_one_that_does_not_or_says_nothing_of_images_gets_none(needs: bool) -> None:
    assert "pixel_values" not in default_inputs(_TextAndImages(needs=needs, tower=not needs))
