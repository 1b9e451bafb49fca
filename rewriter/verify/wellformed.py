"""Is a model well-formed? onnx's checker and strict shape inference, without reading the weights."""

from __future__ import annotations

import onnx_ir as ir

from rewriter.errors import first_line
from rewriter.install.onnx_write import skeleton


def checker_complaint(model: ir.Model) -> str | None:
    """What onnx's checker or its strict, type-checking shape inference says against `model`; None if nothing.

    Large initializers are declared as inputs for this, so that models of any size can be checked.
    """
    import onnx
    from onnx import helper

    proto, placed = skeleton(model, "weights", nested=False)
    large = {item.name for item in placed}
    small = [tensor for tensor in proto.graph.initializer if tensor.name not in large]
    undeclared = large - {value.name for value in proto.graph.input}
    proto.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in proto.graph.initializer
        if tensor.name in undeclared
    )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    try:
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # the checker's errors are of many kinds, some of them from C++
        return first_line(error)
    return None
