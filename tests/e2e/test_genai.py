"""A rewritten checkpoint is an ordinary one: onnxruntime-genai's model builder builds it and generates the same tokens.

onnxruntime-genai brings the plain onnxruntime wheel, which would overwrite our GPU one; it lives in an environment of
its own that borrows everything else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewriter import optimize
from rewriter.demo.weights import smollm2
from tests.e2e.borrowed_environment import make, run

NEW_TOKENS = 12
SAMPLES = Path(__file__).resolve().parents[2] / "samples"

GENERATE = """
import json, sys
import onnxruntime_genai as og
model, prompt, new = og.Model(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
parameters = og.GeneratorParams(model)
length = len(prompt) + new
parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
generator = og.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def genai_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("genai"), ["onnxruntime-genai", "onnxruntime"])


def llama(vocabulary: int) -> Any:
    """Two layers; genai's attention kernel wants head sizes that are multiples of 16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=vocabulary, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def generated(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return [int(token) for token in out[0]]


def test_genai_builds_a_rewritten_checkpoint_and_generates_the_same_tokens(genai_python: Path, tmp_path: Path) -> None:
    _, tokenizer = smollm2()
    original = llama(len(tokenizer))
    rewritten = optimize(original, "gqa2")
    checkpoint, built = tmp_path / "checkpoint", tmp_path / "built"
    rewritten.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", built, "-p", "fp32", "-e", "cpu"]
    run(genai_python, *builder)
    assert json.loads((built / "genai_config.json").read_text())["model"]["decoder"]["num_key_value_heads"] == 2

    prompt = tokenizer("The sky is blue because")["input_ids"]
    tokens = json.loads(run(genai_python, "-c", GENERATE, built, json.dumps(prompt), str(NEW_TOKENS)))
    assert tokens == generated(rewritten, prompt)
    assert tokens != generated(original, prompt), "the control: other weights give other tokens"


def test_the_sample_serves_smollm2_elsewhere(genai_python: Path, tmp_path: Path) -> None:
    sample = SAMPLES / "serve_elsewhere.py"
    done = subprocess.run([sys.executable, sample, tmp_path, genai_python], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "built   9 query heads, 3 K/V heads" in done.stdout
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("genai", "torch")))
    assert said["genai"] == said["torch"] and "human eye" in said["torch"]
    folder = tmp_path / "alone"
    alone = subprocess.run([sys.executable, sample, folder], capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0 and f"vllm serve {folder / 'checkpoint'}" in alone.stdout
