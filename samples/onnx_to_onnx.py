"""An .onnx file that somebody else exported: inspect, rewrite, verify, profile, report; no PyTorch code of it needed.

    python samples/onnx_to_onnx.py [MODEL.onnx [OUT.onnx [TARGET]]]

Without arguments it takes a MiniLM with int8 weights out of an installed package and writes to a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import rewriter
from rewriter.demo.weights import minilm_int8_onnx


def main(source: Path, target_file: Path, target: str) -> None:
    found = rewriter.inspect(source)
    print(f"{found.format}, opset {found.opset}, by {found.producer}")
    for site in found.sites:
        print(f"  {site.name}: {site.heads} heads, {site.kv_heads} K/V heads of {site.head_dim}")
    for refusal in found.refusals:
        print(f"  {refusal.name}: refused: {refusal.reason}")

    done = rewriter.optimize(source, target)
    done.save(target_file)
    print(f"\n{done.rewrite_report}\n")

    verification = rewriter.verify(target_file, source)
    for check in verification.checks:
        print(f"{'ok' if check.ok else 'FAILED':6}  {check.name}: {check.detail}")
    if not verification.ok:
        sys.exit("not verified")

    timed = rewriter.profile(source, target_file, shapes={"input_ids": (1, 128)}, runs=10)
    print(f"\n{timed.device}, {timed.threads} threads: median {timed.before.ms.median:.2f} ms before,", end=" ")
    print(f"{timed.after.ms.median:.2f} ms after; x {timed.speedup['median']:.2f}")
    page = target_file.with_suffix(".html")
    timed.save_html(page, found.pictures)
    print(f"everything on one page: {page}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = sys.argv[1:]
        main(
            Path(given[0]) if given else minilm_int8_onnx(),
            Path(given[1]) if len(given) > 1 else Path(folder) / "out.onnx",
            given[2] if len(given) > 2 else "gqa6",
        )
