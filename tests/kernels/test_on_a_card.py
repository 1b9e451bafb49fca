"""Kernels on a graphics card, where there is one: numbers against the oracle, and the ways into the kernel.

Skipped elsewhere, CI included; test_triton_attention.py and test_triton_binaries.py check what needs no card.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import rewriter
from codegen.device import DType
from codegen.launch.fourier_op import mix
from codegen.launch.torch_op import attention, graphics_card
from codegen.launch.triton_op import launch
from codegen.ops.grouped_query_attention import torch_body
from codegen.sight import Sight
from codegen.spec import FourierMixing, GroupedQueryAttention
from tests.kernels import fourier_problems, test_cuda_attention
from tests.kernels.problems import BIASED, CAUSAL, PLAIN, TORCH, K, Operands, operands
from tests.kernels.test_command import Mixer
from tests.kernels.test_triton_attention import SPECS, WEIGHTS, distance
from tests.kernels.test_triton_sparse import SPECS as SPARSE

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no graphics card")

SHAPES = {"prefill": (2, 200, 200), "decode": (2, 1, 3000), "few": (1, 5, 777), "one": (1, 1, 1), "no keys": (1, 3, 0)}


def on_card(spec: GroupedQueryAttention, x: Operands) -> Tensor:
    device, processors = graphics_card(torch.device("cuda"))
    q, k, v, bias, sinks = (None if t is None else t.cuda() for t in (x.q, x.k, x.v, x.bias, x.sinks))
    assert q is not None and k is not None and v is not None
    return launch(spec, q, k, v, bias, sinks, arch=device.arch, processors=processors).cpu()


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.short)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_within_rounding_of_the_oracle(
    spec: GroupedQueryAttention, dtype: DType, shape: tuple[int, int, int]
) -> None:
    x = operands(spec, TORCH[dtype], *shape)
    found = on_card(spec, x)
    assert distance(spec, x, found) < K
    nudged = found.clone()
    nudged[0, -1, -1, -1] += 30 * WEIGHTS[x.q.dtype] * max(1.0, float(x.v.abs().max()) if x.v.numel() else 1.0)
    assert distance(spec, x, nudged) > K, "the control: a small error in one number is seen"


CUDA_SPECS = {"plain": PLAIN, "everything": test_cuda_attention.EVERYTHING,
              "multi-query": GroupedQueryAttention(32, 1, 128, 128, 0.09, causal=True)}  # fmt: skip


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16], ids=lambda d: d.short)
@pytest.mark.parametrize("spec", CUDA_SPECS.values(), ids=CUDA_SPECS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cuda_is_within_rounding_of_the_oracle(
    spec: GroupedQueryAttention, dtype: DType, shape: tuple[int, int, int]
) -> None:
    x = operands(spec, TORCH[dtype], *shape)
    q, k, v, bias, sinks = (None if t is None else t.cuda() for t in (x.q, x.k, x.v, x.bias, x.sinks))
    assert q is not None and k is not None and v is not None
    found = attention(spec, q, k, v, bias, sinks=sinks, kernels="cuda").cpu()
    assert distance(spec, x, found) < K
    nudged = found.clone()
    nudged[0, -1, -1, -1] += 30 * WEIGHTS[x.q.dtype] * max(1.0, float(x.v.abs().max()) if x.v.numel() else 1.0)
    assert distance(spec, x, nudged) > K, "the control: a small error in one number is seen"


def test_cuda_runs_on_the_current_stream_and_in_graphs() -> None:
    x = operands(PLAIN, torch.bfloat16, 2, 1, 3000)
    q, k, v = (t.cuda() for t in (x.q, x.k, x.v))
    attention(PLAIN, q, k, v, kernels="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention(PLAIN, q, k, v, kernels="cuda")
    q.neg_()
    graph.replay()
    assert distance(PLAIN, replace(x, q=-x.q), found.cpu()) < K
    assert distance(PLAIN, x, found.cpu()) > K, "the control: the graph ran again"


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [1, 4, 16])
@pytest.mark.parametrize("shape", [(1, 1000, 1000), (3, 1, 5000), (1, 130, 4000)], ids=["prefill", "decode", "chunk"])
def test_sizes_of_real_models(kv_heads: int, dim: int, shape: tuple[int, int, int]) -> None:
    spec = GroupedQueryAttention(16, kv_heads, dim, dim, dim**-0.5, causal=True)
    x = operands(spec, torch.bfloat16, *shape)
    assert distance(spec, x, on_card(spec, x)) < K


@pytest.mark.parametrize("bias", ["additive", "per head", "boolean"])
def test_biases_broadcast_and_booleans_hide(bias: str) -> None:
    x = operands(BIASED, torch.float16, 2, 90, 400, bias=bias)
    assert distance(BIASED, x, on_card(BIASED, x)) < K


def test_rows_at_odd_places_are_read_right() -> None:
    """Operands cut out of a larger tensor, so that rows begin at any byte."""
    x = operands(CAUSAL, torch.bfloat16, 2, 77, 77)
    wide = [torch.randn(*t.shape[:3], 131).to(torch.bfloat16) for t in (x.q, x.k, x.v)]
    for w, t in zip(wide, (x.q, x.k, x.v), strict=True):
        w[..., 3:67] = t
    device, processors = graphics_card(torch.device("cuda"))
    odd = [w.cuda()[..., 3:67] for w in wide]
    assert all(t.data_ptr() % 16 for t in odd)
    found = launch(CAUSAL, *odd, arch=device.arch, processors=processors).cpu()
    assert distance(CAUSAL, x, found) < K


def test_the_operator_eager_compiled_and_trained() -> None:
    x = operands(PLAIN, torch.float32, 2, 33, 65)
    q, k, v = (t.cuda().requires_grad_() for t in (x.q, x.k, x.v))
    right = torch_body.grouped_query_attention(PLAIN, q, k, v)
    for call in (attention, torch.compile(attention)):
        found = call(PLAIN, q, k, v, kernels="triton")
        assert (found - right).abs().max() < 1e-5
        (gradient,) = torch.autograd.grad(found.sum(), [k], retain_graph=True)
        (expected,) = torch.autograd.grad(right.sum(), [k], retain_graph=True)
        assert (gradient - expected).abs().max() < 1e-4
    assert (attention(PLAIN, q, k.flip(2), v, kernels="triton") - right).abs().max() > 1e-3, "the control"


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.short)
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("shape", [(2, 300, 300), (2, 1, 3000), (1, 70, 777)], ids=["prefill", "decode", "chunk"])
def test_sparse_patterns(name: str, dtype: DType, shape: tuple[int, int, int]) -> None:
    spec = SPARSE[name]
    x = operands(spec, TORCH[dtype], *shape)
    found = on_card(spec, x)
    assert distance(spec, x, found) < K
    assert distance(replace(spec, pattern=()), x, found) > K, "the control: a result of all keys is another"


@pytest.mark.parametrize("ordered", [False, True], ids=["both ways", "causal"])
def test_sparse_sizes_of_real_models(ordered: bool) -> None:
    for sight in (Sight(reach=128, sinks=4), Sight(block=64, period=64, first=56, last=64), Sight(reach=65, stride=64)):
        spec = GroupedQueryAttention(8, 2, 128, 128, 0.088, pattern=(replace(sight, ordered=ordered),))
        x = operands(spec, torch.bfloat16, 1, 1500, 1500)
        assert distance(spec, x, on_card(spec, x)) < K


def test_the_operator_with_a_pattern_eager_and_compiled() -> None:
    spec = SPARSE["by head"]
    x = operands(spec, torch.float32, 2, 100, 100)
    q, k, v = (t.cuda().requires_grad_() for t in (x.q, x.k, x.v))
    right = torch_body.grouped_query_attention(spec, q, k, v)
    for call in (attention, torch.compile(attention)):
        found = call(spec, q, k, v, kernels="triton")
        assert (found - right).abs().max() < 1e-5
        (gradient,) = torch.autograd.grad(found.sum(), [k], retain_graph=True)
        (expected,) = torch.autograd.grad(right.sum(), [k], retain_graph=True)
        assert (gradient - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(
    ("kernels", "batch", "tokens", "hidden"),
    [("triton", 3, 512, 768), ("triton", 1, 2047, 96), ("triton", 2, 1, 5), ("triton", 4, 33, 130),
     ("cuda", 3, 512, 768), ("cuda", 1, 2048, 768), ("cuda", 5, 128, 1024), ("cuda", 3, 45, 75), ("cuda", 1, 2, 2),
     ("cuda", 1, 4096, 4096)],
)  # fmt: skip
def test_fourier_mixing(kernels: str, batch: int, tokens: int, hidden: int, dtype: torch.dtype) -> None:
    spec = FourierMixing(hidden, gain=True, bias=True)
    x = fourier_problems.draw(spec, dtype, batch, tokens)
    found = mix(spec, *(None if t is None else t.cuda() for t in x), kernels=kernels).cpu()  # type: ignore[arg-type]
    assert fourier_problems.distance(spec, *x, found) < fourier_problems.K
    other = (x[0].roll(1, 2) + 0.5, *x[1:])
    assert fourier_problems.distance(spec, *other, found) > fourier_problems.K, "the control: another sequence"


def test_a_rewritten_model_runs_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from codegen.launch import triton_op
    from rewriter import optimize

    calls = []

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        return launch(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_op, "launch", counted)
    torch.manual_seed(0)
    net, x = nn.Sequential(Mixer(128, 8), Mixer(128, 8)).cuda().eval(), torch.randn(2, 300, 128, device="cuda")
    fast, slow = (optimize(net, "gqa2", example_inputs=(x[:, :16],), kernels=k) for k in ("triton", "off"))
    calls.clear()
    with torch.no_grad():
        right = slow(x)
        assert not calls
        assert (fast(x) - right).abs().max() < 1e-4 * right.abs().max()
        assert len(calls) == 2
        assert (net(x) - right).abs().max() > 1e-2 * right.abs().max(), "the control: the rewriting itself is lossy"


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights alone", "calibrated"])
def test_a_model_on_a_card_is_rewritten_and_stays_there(calibrated: bool) -> None:
    """As on the processor, from default inputs and from ones that lie on the card."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (4, 24))
    more = {"calibration": ids} if calibrated else {}
    expected = rewriter.optimize(model, "gqa2", **more)
    model.cuda()
    more = {"calibration": ids.cuda()} if calibrated else {}
    found = rewriter.optimize(model, "gqa2", **more)
    assert {p.device.type for m in (model, found) for p in m.parameters()} == {"cuda"}
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(tensor, found.state_dict()[name].cpu(), atol=1e-6), name
    with torch.no_grad():
        a, b = expected(ids).logits, found(ids.cuda()).logits.cpu()
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(model(ids.cuda()).logits.cpu(), b, rtol=1e-3, atol=1e-3), "the control: it changed"
    assert [s.kv_heads for s in rewriter.inspect(found).sites] == [2, 2]
    assert rewriter.verify(found, model).checks
    inputs = {"input_ids": ids.cuda()}
    profile = rewriter.profile(model, found, provider="cuda", example_inputs=inputs, runs=2)
    assert profile.before.ops and profile.after.ms.min > 0


def test_a_model_on_two_devices_is_refused() -> None:
    model = nn.Sequential(Mixer(), Mixer().cuda())
    with pytest.raises(rewriter.RewriteError, match="spread over cpu, cuda:0"):
        rewriter.optimize(model, "gqa2", example_inputs=(torch.randn(1, 5, 32),))
