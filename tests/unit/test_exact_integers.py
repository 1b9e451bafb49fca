"""Integer products of a recording: the numbers that the file says, where the processor's own would overflow too."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from rewriter.capture.exact_integers import with_unsigned_weights

CODES = np.random.default_rng(0).choice(np.array([-128, 127, 5], np.int8), (64, 6))
POINTS = {"none": None, "one": np.array(-3, np.int8), "per-column": np.arange(-3, 3, dtype=np.int8)}


@pytest.mark.parametrize("points", POINTS)
def test_signed_weights_become_unsigned_ones_of_the_same_product(points: str) -> None:
    stored = {"w": CODES, "x_point": np.array(7, np.uint8)} | ({} if points == "none" else {"w_point": POINTS[points]})
    more = [] if points == "none" else ["x_point", "w_point"]
    nodes = [helper.make_node("MatMulInteger", ["x", "w", *more], [name]) for name in ("y", "z")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [5, 64])],
        [helper.make_tensor_value_info(name, TensorProto.INT32, [5, 6]) for name in ("y", "z")],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with_unsigned_weights(model)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds[model.graph.node[0].input[1]] == TensorProto.UINT8 and kinds["w"] == TensorProto.INT8
    assert model.graph.node[0].input[1] == model.graph.node[1].input[1], "one copy for both readers"
    onnx.checker.check_model(model)
    x = np.full((5, 64), 255, np.uint8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x})
    offset = 0 if points == "none" else stored["w_point"].astype(int)
    expected = (x.astype(int) - (0 if points == "none" else 7)) @ (CODES.astype(int) - offset)
    assert all(np.array_equal(y, expected) for y in got)
