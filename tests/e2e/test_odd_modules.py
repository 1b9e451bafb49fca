"""Modules in states that nobody plans for end in an error that says what to do, or in the right result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

import rewriter
from rewriter.errors import UnsupportedModel, UsageError, VerificationFailed
from tests.targets.lossless_twin import run_file

WIDTH, HEADS = 16, 4


class Layer(nn.Module):
    """Attention whose key/value heads are equal, so that sharing them changes nothing, behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        for shared in (self.k, self.v):
            heads = shared.weight.data.unflatten(0, (HEADS, -1))
            heads.copy_(heads[:1].clone().expand_as(heads))

    def forward(self, x: Tensor) -> Any:
        x = self.before(x)
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        out = (q @ k.mT / 2).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


def given() -> Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


def rewritten(model: nn.Module, x: Any, **options: Any) -> Any:
    return rewriter.optimize(model, "mqa", example_inputs=(x,), **options)


class Variadic(nn.Module):
    """Takes whatever it is given, as wrappers that only add a norm do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), Layer()
        self.q, self.k, self.v, self.o = (getattr(self.layer, name) for name in "qkvo")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert args == (2,)
        q, k, v = (p(self.norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(((q @ k.mT / args[0]).softmax(-1) @ v).transpose(1, 2).flatten(2))


class CallsVariadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Variadic()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, 2)


def test_a_module_of_any_number_of_arguments_keeps_its_forward() -> None:
    module = CallsVariadic().eval()
    small = rewritten(module, given())
    assert [r.exact for r in small.rewrite_report.sites] == [True]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        assert torch.allclose(small(given()), module(given()), atol=1e-6)


class Counting(nn.Sequential):
    """Says something else in every call."""

    def __init__(self) -> None:
        super().__init__(Layer())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = super().forward(x) + self.calls
        return found


class Silent(Layer):
    def forward(self, x: Tensor) -> None:
        super().forward(x)


def _fake() -> Layer:
    with FakeTensorMode():
        return Layer().eval()


def _changed(change: Callable[[Layer], object]) -> Callable[[], Layer]:
    def made() -> Layer:
        model = Layer().eval()
        change(model)
        return model

    return made


def _sparse(model: Layer) -> None:
    model.k.weight = nn.Parameter(model.k.weight.data.to_sparse())


def _no_leaf(model: Layer) -> None:
    weight = nn.Parameter(model.k.weight.data)
    del model.k.weight
    model.k.weight = weight * 2


MODELS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "fake": (_fake, UnsupportedModel, "is a fake tensor"),
    "sparse": (_changed(_sparse), UnsupportedModel, "k.weight is stored as sparse_coo"),
    "compiled": (lambda: torch.compile(Layer().eval()), UnsupportedModel, "compiled by torch.compile"),  # type: ignore[dict-item, return-value]
    "lock": (_changed(lambda m: setattr(m, "lock", threading.Lock())), UnsupportedModel, "cannot be copied"),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(Layer()).eval(), {nn.Linear}),
        UnsupportedModel,
        "0.before.0 is quantised by torch",
    ),
    "counting": (lambda: Counting().eval(), VerificationFailed, "check 'exact'"),
    "silent": (lambda: Silent().eval(), VerificationFailed, "check 'runs'"),
}


def _pruned(model: Layer) -> None:
    for projection in (model.q, model.k, model.v, model.o):
        prune.custom_from_mask(projection, "weight", (torch.arange(WIDTH) % 3 > 0).expand(WIDTH, WIDTH))


def _normed(model: Layer) -> None:
    for projection in (model.q, model.k, model.v, model.o):
        torch.nn.utils.weight_norm(projection)


def _marked(model: Layer) -> None:
    model.register_buffer("aligned", torch.eye(2).to_sparse(), persistent=False)


@pytest.mark.parametrize("change", [_no_leaf, _pruned, _normed, _marked])
def test_weights_that_are_computed_and_kept_as_attributes(change: Callable[[Layer], object]) -> None:
    """Python copies no tensor that was computed of parameters; a sparse mark that no forward reads hinders nothing."""
    layer, x = Layer(), given()
    layer.before = nn.Sequential()
    change(layer)
    model = nn.Sequential(layer).eval()
    with torch.no_grad():
        before = model(x)
    new = rewritten(model, x)
    assert [row.exact for row in new.rewrite_report.sites] == [True] and not new.rewrite_report.refused
    with torch.no_grad():
        assert torch.allclose(new(x), before, atol=1e-5) and torch.equal(model(x), before)
        next(layer.v.parameters())[0].mul_(-3)
    with torch.no_grad():
        assert not torch.allclose(rewritten(model, x)(x), model(x), atol=1e-3), "the control"


@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_be_rewritten_is_told(name: str) -> None:
    made, kind, words = MODELS[name]
    with pytest.raises(kind, match=words) as caught:
        rewritten(made(), given())
    assert getattr(caught.value, "hint", "")


@pytest.mark.parametrize("name", ["meta", "fake"])
def test_inputs_without_numbers_are_refused(name: str) -> None:
    if name == "meta":
        x = given().to("meta")
    else:
        with FakeTensorMode():
            x = torch.randn(2, 7, WIDTH)
    with pytest.raises(UsageError, match="an example input is") as caught:
        rewritten(Layer().eval(), x)
    assert caught.value.hint


def test_what_cannot_be_copied_can_be_edited() -> None:
    model = MODELS["lock"][0]()
    x = given()
    with torch.no_grad():
        before = model(x)
        assert torch.allclose(rewritten(model, x, inplace=True)(x), before, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in Layer().parameters())


@pytest.mark.parametrize("wrapped", [False, True], ids=["frozen", "wrapper"])
def test_each_module_keeps_its_mode(wrapped: bool) -> None:
    """Parts in eval mode inside of something that trains: a frozen encoder, a wrapper that was made afterwards."""
    inner = Layer().eval()
    model: nn.Module = nn.Sequential(inner) if wrapped else inner
    model.training = True
    modes = {name: m.training for name, m in model.named_modules() if "before" in name or not name}
    assert set(modes.values()) == {True, False}
    x = given()
    after = rewritten(model, x)
    assert {name: m.training for name, m in after.named_modules() if name in modes} == modes
    assert {name: m.training for name, m in model.named_modules() if name in modes} == modes
    with torch.no_grad():
        assert torch.allclose(after(x), model(x), atol=1e-5), "dropout stays off"
        model.train()
        assert not torch.allclose(after(x), model(x), atol=1e-5), "the control"


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal", "hook", "inference"])
def test_weights_that_are_computed(name: str) -> None:
    model = Layer().eval()
    if name == "hook":
        model.k.register_forward_hook(lambda module, args, output: output * 2)
    elif name == "inference":
        with torch.inference_mode():
            model = Layer().eval()
    elif name == "orthogonal":
        nn.utils.parametrizations.orthogonal(model.q)
    else:
        getattr(nn.utils.parametrizations, name)(model.o)
    model.eval()
    x = given()
    with torch.no_grad():
        assert torch.allclose(rewritten(model, x)(x), model(x), atol=1e-5)


def test_heads_that_differ_are_seen() -> None:
    """The control: where heads are not equal, sharing them shows."""
    model, x = Layer().eval(), given()
    with torch.no_grad():
        model.v.weight += 0.2 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(rewritten(model, x)(x), model(x), atol=1e-3)


class PooledByVector(nn.Module):
    """Tokens are weighed by their product with one stored vector, which has no rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.query = Layer(), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * (y @ self.query).softmax(-1).unsqueeze(-1)


@pytest.mark.parametrize("door", ["module", "file"])
def test_products_with_a_vector_stand_beside_attention(door: str, tmp_path: Path) -> None:
    model, x = PooledByVector().eval(), given()
    with torch.no_grad():
        expected = model(x)
    if door == "module":
        new = rewritten(model, x)
        with torch.no_grad():
            found = new(x)
    else:
        torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=True, input_names=["x"], verbose=False)
        new = rewriter.optimize(tmp_path / "m.onnx", "mqa")
        new.save(tmp_path / "new.onnx")
        found = torch.from_numpy(run_file(tmp_path / "new.onnx", {"x": x}))
    assert [row.exact for row in new.rewrite_report.sites] == [True]
    assert torch.allclose(found, expected, atol=1e-5)
