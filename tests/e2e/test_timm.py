"""timm's vision transformers, in PyTorch and through both ONNX exporters.

timm needs torchvision, whose wheel on PyPI is built for CUDA and does not load beside a CPU-only torch. Nothing of what
it fails to load is used here, so the operators that it then misses are declared, in an environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.borrowed_environment import make, run

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, warnings
from pathlib import Path
import numpy as np, onnxruntime, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
missing = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
from timm.layers import set_fused_attn
import rewriter

HEADS, WIDTH, KEPT = 4, 32, 2

def vit(fused, perturbed):
    torch.manual_seed(0)
    set_fused_attn(fused)
    sizes = dict(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=10)
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        for block in model.blocks:
            for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                heads = tensor.view(3, KEPT, HEADS // KEPT, WIDTH // HEADS, -1)
                heads[1:, :, 1:] = heads[1:, :, :1]
                if perturbed:
                    heads[1:, :, 1:] += 0.3 * torch.randn(heads[1:, :, 1:].shape)
    return model

def export(model, x, path, dynamo):
    more = dict(dynamo=True, opset_version=18, verbose=False) if dynamo else dict(dynamo=False, opset_version=17)
    torch.onnx.export(model, (x,), str(path), input_names=["x"], **more)
    return path

def answer(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]

def apart(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())

folder, found = Path(sys.argv[1]), {}
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
for fused in (True, False):
    for perturbed in (False, True):
        case = ("sdpa" if fused else "eager") + (" perturbed" if perturbed else "")
        model = vit(fused, perturbed)
        with torch.no_grad():
            small = rewriter.optimize(model, "gqa2", example_inputs=(x,))
            found[f"{case} torch"] = (len(small.rewrite_report.sites), apart(small(x), model(x)))
        for dynamo in (True, False):
            path = export(model, x, folder / f"{case}-{dynamo}.onnx", dynamo)
            done = rewriter.optimize(path, "gqa2")
            done.save(folder / "small.onnx")
            name = f"{case} " + ("dynamo18" if dynamo else "torchscript17")
            found[name] = (len(done.rewrite_report.sites), apart(answer(folder / "small.onnx", x), answer(path, x)))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def timm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("timm"), ["timm", "torchvision", "pillow"])


def test_a_tied_twin_is_rewritten_without_loss_and_a_perturbed_one_is_not(timm_python: Path, tmp_path: Path) -> None:
    found = json.loads(run(timm_python, "-c", SCRIPT, tmp_path))
    assert len(found) == 12
    for case, (sites, error) in found.items():
        assert sites == 2, case
        assert error > 1e-3 if "perturbed" in case else error < 1e-4, (case, error)
