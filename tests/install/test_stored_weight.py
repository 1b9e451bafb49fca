"""From a matrix as a projection reads it to the parameter that is stored, through what lies between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewriter.capture.torch_export import capture
from rewriter.install.stored_weight import locate

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda w: w,
    "transposed twice": lambda w: w.t().contiguous().t(),
    "a slice": lambda w: w[6:18],
    "every other row": lambda w: w[1::2],
    "reshaped": lambda w: w.view(2, 12, 5).flatten(0, 1),
}


class Projects(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.packed, self.way = nn.Parameter(torch.randn(24, 5)), way

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.way(self.packed))


def _weight_read(module: Projects) -> tuple[object, str]:
    flow = capture(module.eval(), (torch.randn(2, 3, 5),), {}).flow
    (node,) = [n for n in flow.nodes if n.op == "Linear"]
    return flow, node.inputs[1]


@pytest.mark.parametrize("way", WAYS)
def test_columns_are_found_where_they_are_stored(way: str) -> None:
    module = Projects(WAYS[way])
    flow, value = _weight_read(module)
    place = locate(flow, value, (0,))  # type: ignore[arg-type]
    assert place is not None and (place.key, place.axes, place.features) == ("packed", (0,), 24)
    read = WAYS[way](module.packed)
    assert torch.equal(module.packed[torch.from_numpy(place.positions)], read)
    assert len(np.unique(place.positions)) == len(read)


@pytest.mark.parametrize(
    "way",
    [lambda w: w * 2.0, lambda w: w[torch.zeros(4, dtype=torch.int64)], lambda w: w.view(12, 10)[:, 2:7]],
    ids=["scaled", "a row repeated", "parts of rows"],
)
def test_what_is_computed_or_not_whole_is_not_found(way: Callable[[Tensor], Tensor]) -> None:
    flow, value = _weight_read(Projects(way))
    assert locate(flow, value, (0,)) is None  # type: ignore[arg-type]


def test_some_columns_of_what_is_joined_are_found_where_they_are_stored() -> None:
    module = Projects(lambda w: torch.cat([w[:6], torch.zeros(4, 5), w[12:]]))
    flow, value = _weight_read(module)
    assert locate(flow, value, (0,)) is None  # type: ignore[arg-type]
    assert locate(flow, value, (0,), np.arange(4, 8)) is None  # type: ignore[arg-type]
    place = locate(flow, value, (0,), np.arange(10, 22).reshape(3, 4))  # type: ignore[arg-type]
    assert place is not None and place.key == "packed"
    assert np.array_equal(place.positions, np.arange(12, 24).reshape(3, 4))


@pytest.mark.parametrize("shape", [(20000,), (384, 384)], ids=["a bias", "a matrix"])
def test_every_element_of_many_is_found(shape: tuple[int, ...]) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored = nn.Parameter(torch.zeros(shape))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.stored

    flow = capture(Adds().eval(), (torch.zeros(shape),), {}).flow
    (value,) = [v for v, weight in flow.weights.items() if weight.name == "stored"]
    place = locate(flow, value, ())
    assert place is not None and place.axes == tuple(range(len(shape)))
    assert np.array_equal(place.positions, np.arange(int(np.prod(shape))))
