"""Inputs made up for models that are given none: images where text alone is not enough."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rewriter.capture.example_inputs import default_inputs, prepare


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


class _Features(nn.Module):
    """Only its main input, config and forward are looked at."""

    dtype = torch.float32

    def __init__(self, main: str, **config: object) -> None:
        super().__init__()
        self.main_input_name, self.config = main, SimpleNamespace(**config)


@pytest.mark.parametrize(
    ("main", "config", "shape"),
    [
        pytest.param("pixel_values", {"image_size": 8, "num_channels": 1}, (2, 1, 8, 8), id="image"),
        pytest.param("pixel_values", {"image_size": 8, "num_frames": 4}, (2, 4, 3, 8, 8), id="frames"),
        pytest.param("pixel_values_videos", {"crop_size": 8, "frames_per_clip": 2}, (2, 2, 3, 8, 8), id="clip"),
        pytest.param("input_features", {"num_mel_bins": 16, "max_source_positions": 10}, (2, 16, 20), id="positions"),
        pytest.param("input_features", {"num_mel_bins": 16}, (2, 96, 16), id="frames-first"),
        pytest.param(
            "input_features", {"input_feat_per_channel": 12, "max_source_positions": 600}, (2, 96, 12), id="s2t"
        ),
        pytest.param("input_features", {"feature_projection_input_dim": 20}, (2, 96, 20), id="projected"),
    ],
)
def test_shapes_follow_what_the_config_says(main: str, config: dict[str, object], shape: tuple[int, ...]) -> None:
    assert default_inputs(_Features(main, **config))[main].shape == shape


class _Spectrogram(_Features):
    """Its main input has the name that waveforms have."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        return input_values.transpose(1, 2)


@pytest.mark.parametrize(("config", "shape"), [({"num_mel_bins": 16, "max_length": 12}, (2, 12, 16)), ({}, (2, 4000))])
def test_values_are_a_spectrogram_where_a_waveform_does_not_run(
    config: dict[str, object], shape: tuple[int, ...]
) -> None:
    assert default_inputs(_Spectrogram("input_values", **config))["input_values"].shape == shape


class _HandsOn(nn.Module):
    """A model around one of text, whose config alone says that it keeps a cache."""

    def __init__(self, text: dict[str, object]) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**text))

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        return x


@pytest.mark.parametrize("text", [{"use_cache": True}, {"use_cache": False}, {}])
def test_a_model_of_text_inside_another_is_run_without_its_cache(text: dict[str, object]) -> None:
    _, kwargs = prepare(_HandsOn(text), (torch.ones(1),))
    assert kwargs == ({"use_cache": False} if text.get("use_cache") else {})
