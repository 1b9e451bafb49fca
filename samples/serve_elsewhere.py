"""A rewritten decoder is an ordinary checkpoint: it is served by tools that have never heard of this library.

SmolLM2's multi-head twin becomes grouped-query attention and is saved. onnxruntime-genai then builds its own model
from the folder and generates from that.

    python samples/serve_elsewhere.py FOLDER [PYTHON]

onnxruntime-genai brings the plain onnxruntime, so it wants an environment of its own: PYTHON is that environment's
interpreter (`python -m venv genai && genai/bin/pip install onnxruntime-genai transformers torch onnx onnx-ir`). Without
it the folder is written and the commands are printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from rewriter import optimize
from rewriter.demo.weights import smollm2, smollm2_twin

PROMPT = "The sky is blue because"
NEW_TOKENS = 9

GENERATE = """
import json, sys
import onnxruntime_genai as og
model, prompt, new = og.Model(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=len(prompt) + new)
generator = og.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""


def run(*command: object) -> str:
    """The last line that it prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def main(folder: Path, python: str | None = None) -> None:
    model, tokenizer = smollm2()
    small = optimize(smollm2_twin(model), "gqa3")
    small.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    print(f"saved   {folder / 'checkpoint'}")

    prompt = tokenizer(PROMPT)["input_ids"]
    builder = ("-m", "onnxruntime_genai.models.builder", "-i", folder / "checkpoint", "-o", folder / "genai")
    builder = (*builder, "-p", "fp32", "-e", "cpu")
    print(f"\nvllm serve {folder / 'checkpoint'}\npython {' '.join(map(str, builder))}\n")
    if python is None:
        print("not built: give the interpreter of an environment with onnxruntime-genai")
        return
    run(python, *builder)
    decoder = json.loads((folder / "genai" / "genai_config.json").read_text())["model"]["decoder"]
    print(f"built   {decoder['num_attention_heads']} query heads, {decoder['num_key_value_heads']} K/V heads")
    theirs = json.loads(run(python, "-c", GENERATE, folder / "genai", json.dumps(prompt), NEW_TOKENS))
    ours = small.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
    print(f"genai   {tokenizer.decode(theirs)!r}")
    print(f"torch   {tokenizer.decode(ours)!r}")
    if theirs != ours:
        sys.exit("the two generate different tokens")


if __name__ == "__main__":
    torch.set_num_threads(2)
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:3])
