"""Products of unsigned activations with signed weights, computed exactly whatever the processor.

Without VNNI, onnxruntime (1.31) adds pairs of such products in 16 bits, which overflows, so that a recording would
differ from what the file says. With unsigned weights it does not; 128 more in weights and zero points changes nothing
else.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

_WEIGHT_AND_ZERO_POINT = {"MatMulInteger": (1, 3), "DynamicQuantizeMatMul": (1, 3), "MatMulIntegerToFloat": (1, 5)}


def with_unsigned_weights(proto: onnx.ModelProto) -> None:
    """Give integer products of the main graph weights of their own, unsigned; those stored outside the file stay."""
    stored = {t.name: t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
    made: dict[tuple[str, str], tuple[str, str]] = {}
    for node in proto.graph.node:
        weight, point = _WEIGHT_AND_ZERO_POINT.get(node.op_type, (-1, -1))
        if not 0 <= weight < len(node.input):
            continue
        named = node.input[weight], node.input[point] if point < len(node.input) else ""
        if any(name and name not in stored for name in named) or stored[named[0]].data_type != onnx.TensorProto.INT8:
            continue
        if named not in made:
            made[named] = f"{named[0]}/unsigned", f"{named[0]}/{named[1]}/unsigned"
            zero = numpy_helper.to_array(stored[named[1]]) if named[1] else np.zeros((), np.int8)
            for array, name in zip((numpy_helper.to_array(stored[named[0]]), zero), made[named], strict=True):
                if name not in stored:
                    stored[name] = numpy_helper.from_array((array.astype(np.int16) + 128).astype(np.uint8), name)
                    proto.graph.initializer.append(stored[name])
        node.input.extend([""] * (point + 1 - len(node.input)))
        node.input[weight], node.input[point] = made[named]
