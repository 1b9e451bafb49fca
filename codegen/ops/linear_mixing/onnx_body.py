"""Linear mixing as a model-local ONNX function over standard operators, valid at any opset from 12 on.

Matrices with a structure are written out inside, by index: a runtime folds those over features, and where a file fixes
the length those over tokens too. A sequence that is longer than the matrix reaches beyond it in the node that
`longest` names, and so ends in that runtime's own error.

Shape legend: B batch, S tokens, D features, N the longest sequence, P what the matrix over tokens is made of.
"""

from __future__ import annotations

import onnx_ir as ir

from codegen.ops.function_body import FunctionBody
from codegen.render import fingerprint
from codegen.spec import LinearMixing, Structure

DOMAIN = "rewriter.ops"

NAMES = {Structure.DENSE: "LinearMixing", Structure.CIRCULANT: "CirculantMixing", Structure.TOEPLITZ: "ToeplitzMixing"}


def function_name(spec: LinearMixing) -> str:
    """The structure, a word if there is a bias, and a hash of the spec, whose sizes stand in the body."""
    return f"{NAMES[spec.structure]}{'Bias' * spec.bias}_{fingerprint(spec)[:8]}"


def attributes(spec: LinearMixing) -> list[ir.Attr]:
    """Attributes of a call: the number of features, and of the tokens that there may be."""
    return [ir.AttrInt64("hidden_size", spec.hidden), ir.AttrInt64("max_tokens", spec.tokens)]


def longest(spec: LinearMixing) -> str:
    """The name of the node that fails if there are more tokens."""
    return f"at_most_{spec.tokens}_tokens"


def function(spec: LinearMixing, opset: int) -> ir.Function:
    """Inputs x [B, S, D] and the parameters of `LinearMixing.shapes` in order; the output is [B, S, D]."""
    body = FunctionBody()
    x, sequence, features = (ir.Value(name=n) for n in ("x_BSD", "sequence_P", "features"))
    bias = ir.Value(name="bias_D") if spec.bias else None
    tokens = body.take(body.op("Shape", [x], "shape"), [1])
    over_tokens = _over_tokens(body, spec, sequence, tokens)
    over_features = features
    if spec.structure is not Structure.DENSE:
        over_features = _written_out(body, spec, features, body.ints([spec.hidden]), spec.hidden, turned=True)
    inner = body.op("MatMul", [x, over_features], "features_BSD")
    mixed = body.op("MatMul", [over_tokens, inner], "mixed_BSD")
    if spec.structure is Structure.DENSE:
        body.nodes[-1].name = longest(spec)
    if bias is not None:
        mixed = body.op("Add", [mixed, bias], "shifted_BSD")
    inputs = [x, sequence, features, *([] if bias is None else [bias])]
    graph = ir.Graph(inputs, [mixed], nodes=body.nodes, opset_imports={"": opset})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in ("hidden_size", "max_tokens")]
    return ir.Function(DOMAIN, function_name(spec), graph=graph, attributes=declared)


def _over_tokens(body: FunctionBody, spec: LinearMixing, sequence: ir.Value, tokens: ir.Value) -> ir.Value:
    """[S, S]; of a dense matrix that is too small, all of it, which the next product does not take."""
    if spec.structure is Structure.DENSE:
        ends = [body.ints([0, 0]), body.concat([tokens, tokens]), body.ints([0, 1])]
        return body.op("Slice", [sequence, *ends], "matrix_SS")
    matrix = _written_out(body, spec, sequence, tokens, spec.tokens, turned=False)
    body.nodes[-1].name = longest(spec)
    return matrix


def _written_out(
    body: FunctionBody, spec: LinearMixing, stored: ir.Value, count: ir.Value, size: int, *, turned: bool
) -> ir.Value:
    """[count, count], the first rows and columns of the matrix of this size, or of its transpose."""
    if spec.structure is Structure.CIRCULANT:  # as the Toeplitz matrix that it is
        around = [*range(size - 1, -1, -1), *range(size - 1, 0, -1)]
        stored = body.op("Gather", [stored, body.ints(around)], "diagonals")
    number = _counted(body, count)
    other = body.op("Reshape", [number, body.ints([-1, 1])], "column")
    row, column = (number, other) if turned else (other, number)
    distance = body.op("Sub", [column, row], "distance")
    return body.op("Gather", [stored, body.op("Add", [distance, body.ints([size - 1])], "index")], "matrix")


def _counted(body: FunctionBody, size: ir.Value) -> ir.Value:
    """0, 1, ... size - 1, for a size of shape [1]."""
    return body.op("Range", [body.scalar(0), body.op("Squeeze", [size], "limit"), body.scalar(1)], "numbers")
