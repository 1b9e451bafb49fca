"""Low-rank adapters that were not merged: attentions are read with them, and only what is rewritten takes them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import rewriter
from tests.targets.lossless_twin import distance, run_file

WIDTH, HEADS, DIM, RANK = 32, 4, 8, 3
EXACT, MOVED = 1e-4, 1e-3
KINDS = ["lora", "dora", "vera", "two", "wide"]


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, in the spelling of Hugging Face's PEFT.

    Args:
        kind: "lora", "dora" (each feature then has a length of its own), "vera" (vectors between and behind the two
            products), "two" (one of two adapters has biases; a weight says how strong they are), "wide" (its numbers
            are of twice the bits, as PEFT keeps float32 beside a layer in bfloat16).
    """

    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        self.base_layer, self.kind = base, kind
        self.lora_A = nn.ModuleList(nn.Linear(WIDTH, RANK, bias=n > 0) for n in range(1 + (kind == "two")))
        self.lora_B = nn.ModuleList(nn.Linear(RANK, WIDTH, bias=n > 0) for n in range(1 + (kind == "two")))
        self.dropout = nn.Dropout(0.1)
        self.strength = nn.Parameter(torch.tensor(2.0))
        self.magnitude = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.between, self.behind = nn.Parameter(torch.randn(RANK)), nn.Parameter(torch.randn(WIDTH))
        if kind == "wide":
            self.lora_A.double(), self.lora_B.double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        for down, up in zip(self.lora_A, self.lora_B, strict=True):
            if self.kind == "vera":
                result = result + self.behind * up(self.between * down(self.dropout(x)))
            elif self.kind == "dora":
                norm = (self.base_layer.weight + 2.0 * up.weight @ down.weight).norm(dim=1)
                scale = (self.magnitude / norm).view(1, -1)
                added = up(down(self.dropout(x)))
                bare = result if self.base_layer.bias is None else result - self.base_layer.bias
                result = result + (scale - 1) * bare + scale * added * 2.0
            elif self.kind == "wide":
                result = (result + up(down(self.dropout(x.to(down.weight.dtype)))) * 2.0).to(result.dtype)
            else:
                result = result + up(down(self.dropout(x))) * (2.0 if self.kind == "lora" else self.strength)
        return result


class Attention(nn.Module):
    """Attention over tokens [B, S, 32] with an adapter beside each projection."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Adapted(nn.Linear(WIDTH, WIDTH, bias=kind != "dora"), kind))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return out


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention = Attention(kind)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(x)
        return out


def twin(kind: str, *, told_apart: bool = False) -> Model:
    """Keys and values of two heads at a time are equal; `told_apart`: but for what an adapter adds to one head."""
    model = Model(kind).eval()
    with torch.no_grad():
        for part in (model.attention.k_proj, model.attention.v_proj):
            for name, tensor in part.named_parameters():
                if tensor.dim() and tensor.shape[0] == WIDTH and "lora_A" not in name:
                    heads = tensor.view(HEADS, DIM, *tensor.shape[1:])
                    heads[1::2] = heads[::2].clone()
            if told_apart:
                part.lora_B[0].weight[-DIM:] += 0.2
    return model


def tokens(seed: int, length: int = 7) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def rewritten(model: Model, door: str, folder: Path) -> tuple[Any, Any]:
    """(what `optimize` gave, a function of tokens)."""
    if door == "module":
        new = rewriter.optimize(model, "gqa2", example_inputs=(tokens(0),))
        return new, new
    if door == "file":
        old, out = folder / "old.onnx", folder / "new.onnx"
        shapes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
        torch.onnx.export(model, (tokens(0),), str(old), dynamo=True, dynamic_shapes=shapes, verbose=False)
        done = rewriter.optimize(old, "gqa2")
        done.save(out)
        onnx.checker.check_model(out, full_check=True)
        return done, lambda x: run_file(out, {"x": x})
    program = torch.export.export(model, (tokens(0),), strict=False)
    new = rewriter.optimize(program if door == "program" else program.module(), "gqa2", example_inputs=(tokens(0),))
    return new, new.module() if door == "program" else new


@pytest.mark.parametrize(
    ("kind", "door"),
    [
        *((kind, "module") for kind in KINDS),
        *(("lora", "program"), ("two", "program"), ("wide", "program"), ("vera", "graph module")),
        *((kind, "file") for kind in ("two", "vera", "wide")),
    ],
)
def test_heads_are_shared_with_what_adapters_add_to_them(kind: str, door: str, tmp_path: Path) -> None:
    for told_apart in (False, True):
        model = twin(kind, told_apart=told_apart)
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        new, run = rewritten(model, door, tmp_path)
        assert [row.exact for row in new.rewrite_report.sites] == [not told_apart]
        with torch.no_grad():
            error = distance(run(tokens(1)), model(tokens(1)))
        assert error > MOVED if told_apart else error < EXACT
        assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_the_output_keeps_its_adapter_in_modules_and_in_graphs() -> None:
    model = twin("lora")
    new: Any = rewriter.optimize(model, "gqa2", example_inputs=(tokens(0),))
    assert isinstance(new.attention.out_proj, Adapted) and not any("q_proj.lora" in n for n in new.state_dict())
    program = torch.export.export(model, (tokens(0),), strict=False)
    keys = {*rewriter.optimize(program, "gqa2").state_dict}
    assert {f"attention.out_proj.lora_{x}.0.weight" for x in "AB"} <= keys
    assert not any("lora" in key for key in keys if "out_proj" not in key)
    assert "attention.q_proj.base_layer.merged_weight" in keys


def test_a_weight_that_two_layers_share_is_merged_with_each_ones_adapter() -> None:
    first, second = twin("lora"), Model("lora").eval()
    with torch.no_grad():
        for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
            theirs.copy_(mine)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(second.attention, name).base_layer = getattr(first.attention, name).base_layer
        second.attention.q_proj.lora_B[0].weight.mul_(-3)
    model = nn.Sequential(first, second)
    new = rewriter.optimize(torch.export.export(model, (tokens(0),), strict=False), "gqa2")
    assert [row.exact for row in new.rewrite_report.sites] == [True, True]
    with torch.no_grad():
        assert distance(new.module()(tokens(1)), model(tokens(1))) < EXACT
        first.attention.q_proj.lora_B[0].weight.mul_(-3)  # the control
        assert distance(new.module()(tokens(1)), model(tokens(1))) > MOVED


def test_a_file_loses_the_products_of_what_was_merged(tmp_path: Path) -> None:
    rewritten(twin("two"), "file", tmp_path)
    before, after = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("old", "new"))
    products = [sum(n.op_type in {"MatMul", "Gemm"} for n in g.node) for g in (before, after)]
    # two adapters of two products each, for queries, keys and values, and the two of attention, in a function now
    assert products[0] - products[1] == 3 * 4 + 2
    read = {name for node in after.node for name in node.input}
    assert not {t.name for t in after.initializer} - read


def test_sums_of_maps_of_different_inputs_stay_sums() -> None:
    """Two embeddings, each projected: no matrix of one input is their sum."""
    from rewriter.capture.folded_adapters import fold_adapters

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.first(x) + self.second(y)
            return out

    for same in (False, True):
        program = torch.export.export(Both(), (tokens(0), tokens(1)), strict=False)
        inputs = {s.arg.name for s in program.graph_signature.input_specs if s.target is None}
        x, y = (n for n in program.graph.nodes if n.name in inputs)
        if same:
            y.replace_all_uses_with(x)
        assert fold_adapters(program.graph, inputs) is same


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_numbers_with_more_axes_than_what_they_scale_are_not_merged(axes: int) -> None:
    """The sum of x @ w [t, 4] and of that times numbers [1, 1, 4] is of shape [1, t, 4], which no matrix gives."""
    import onnx_ir

    from rewriter.capture.folded_adapters import fold_adapters
    from rewriter.capture.onnx_adapters import adapted_sums

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.behind = nn.Linear(4, 4), nn.Parameter(torch.ones(*[1] * (axes - 1), 4))

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.base(x) * self.behind
            return scaled + scaled

    program = torch.export.export(Scaled(), (torch.ones(3, 4),), strict=False)
    inputs = {s.arg.name for s in program.graph_signature.input_specs if s.target is None}
    assert fold_adapters(program.graph, inputs) is (axes < 3)
    shape, numbers = "1, " * (axes - 1), ", ".join("1" * 4)
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]> g (float[t, 4] x) => (float y)
        <float[4, 4] w = {{{", ".join("1" * 16)}}}, float[{shape}4] b = {{{numbers}}}>
        {{ p = MatMul(x, w)  q = Mul(p, b)  s = Add(p, q)  y = Identity(s) }}""")
    graph = onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model)).graph
    assert bool([*adapted_sums(graph)]) is (axes < 3)
