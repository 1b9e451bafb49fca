"""Whether what stands for a fused operator computes what the operator computes: both run on recorded inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from passes.dataflow import Array
from passes.match.attention import Matches
from passes.replay import TOLERANCES, relative
from passes.site import Refusal
from rewriter.capture.fused.written_out import WrittenOut
from rewriter.capture.onnx_file import OnnxCapture
from rewriter.capture.onnx_session import open_session
from rewriter.errors import first_line


def without_unfaithful(capture: OnnxCapture, matches: Matches) -> Matches:
    """`matches` with sites refused whose fused operator gives something else than what stands for it."""
    reasons = {scope: reason for scope, w in capture.written_out.items() if (reason := _difference(capture, w))}
    bad = [s for s in matches.sites if s.owner in reasons]
    refusals = [Refusal.of(s, reasons[s.owner]) for s in bad]
    return replace(
        matches,
        sites=tuple(s for s in matches.sites if s not in bad),
        refusals=tuple(sorted((*matches.refusals, *refusals), key=lambda r: r.anchor)),
    )


def _difference(capture: OnnxCapture, written: WrittenOut) -> str | None:
    """Why the two are not the same; None if they are."""
    name = f"{written.node.domain or 'ai.onnx'}::{written.node.op_type}"
    try:
        given = _run(capture, written)
    except Exception as error:  # onnxruntime raises unrelated types
        cause = str(error).rpartition("Status Message:")[2].strip()
        return f"the operator {name} does not run on the CPU: {cause[:200] or first_line(error)}"
    for output, array in given.items():
        worst = relative(np.asarray(capture.flow.value(output), np.float64), array)
        if not worst <= TOLERANCES[capture.flow.dtype]:
            return f"the operator {name} computes something else than it is documented to (off by {worst:.1e})"
    return None


def _run(capture: OnnxCapture, written: WrittenOut) -> dict[str, Array]:
    """Outputs by name, float64, of the operator alone on the recorded inputs."""
    feeds: dict[str, Array] = {}
    inputs: list[onnx.ValueInfoProto] = []
    for value in written.inputs:
        if value is None or not value.name or value.name in feeds:
            continue
        array, dtype = capture.flow.value(value.name), _dtype(capture, value)
        feeds[value.name] = array if dtype is None else array.astype(dtype.numpy())
        kind = int(dtype or ir.DataType.from_numpy(array.dtype))
        inputs.append(onnx.helper.make_tensor_value_info(value.name, kind, list(array.shape)))
    wanted = [name for name in written.outputs if name]
    node = onnx.NodeProto(op_type=written.node.op_type, domain=written.node.domain)
    node.input.extend((v.name or "") if v is not None else "" for v in written.inputs)
    node.output.extend(written.outputs)
    node.attribute.extend(ir.serde.serialize_attribute(a) for a in written.node.attributes.values())
    outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([node], "operator", inputs, outputs),
        opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in capture.model.opset_imports.items()],
        ir_version=capture.model.ir_version,
    )
    arrays = open_session(proto, None, optimise=False).run(wanted, feeds)
    return {name: np.asarray(a, np.float64) for name, a in zip(wanted, arrays, strict=True)}


def _dtype(capture: OnnxCapture, value: ir.Value) -> ir.DataType | None:
    """The type the program has there; recordings of half precision are widened."""
    held = value.const_value
    return held.dtype if held is not None else value.dtype or capture.element_type(value.name or "")
