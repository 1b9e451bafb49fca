"""The exporter's tables are shared by opset, and what is added to one is in no other."""

from __future__ import annotations

from typing import Any

import torch

from tests.shared_registries import ONNXRegistry, Registries


def _relu(x: Any) -> Any:
    return x


def test_one_table_for_an_opset() -> None:
    made: list[int] = []

    def make(opset_version: int) -> ONNXRegistry:
        made.append(opset_version)
        registry = ONNXRegistry()
        registry._opset_version = opset_version
        registry.register_op(torch.ops.aten.relu.default, _relu)
        return registry

    tables = Registries(make)
    first, again, other = tables.shared(18), tables.shared(opset_version=18), tables.shared(23)
    assert made == [18, 23] and (first.opset_version, again.opset_version, other.opset_version) == (18, 18, 23)
    assert first.functions == again.functions and first.functions["aten::relu"]
    first.register_op(torch.ops.aten.relu.default, _relu)
    assert [len(t.functions["aten::relu"]) for t in (first, again, tables.shared(18))] == [2, 1, 1]


def test_exports_take_them() -> None:
    one, two = ONNXRegistry.from_torchlib(opset_version=18), ONNXRegistry.from_torchlib(opset_version=18)
    assert one is not two and one.functions == two.functions and len(one.functions) > 400
    assert one.functions is not two.functions
    assert all(two.functions[k][0] is v[0] for k, v in one.functions.items()), "made once"
