"""``rewriter demo``: the main job on real weights, start to finish, ending with one table.

SmolLM2's lossless multi-head twin goes back to grouped queries (exact, and checked to be), MiniLM in torch loses what
mean pooling loses, and less with calibration (checked to be less), and a MiniLM .onnx file with int8 weights that
somebody else exported is rewritten as it is (profiled before and after).
"""

from __future__ import annotations

import json as json_module
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rewriter
from codegen.scratch import scratch_folder
from rewriter.demo.perplexity import perplexity
from rewriter.demo.weights import minilm, minilm_int8_onnx, play, smollm2, smollm2_twin
from rewriter.errors import VerificationFailed
from rewriter.report.rewrite_report import RewriteReport
from rewriter.verify.result import Check

if TYPE_CHECKING:
    from rewriter.profile.result import Profile

PROMPT = "Explain in one sentence why the sky is blue."
NEW_TOKENS = 32
PERPLEXITY_TOKENS = 2048
LOGIT_LIMIT = 1e-4
ONNX_SHAPE = (1, 128)
HELD_OUT, CALIBRATION = "hamlet", "macbeth"
SENTENCES = 64


@dataclass(frozen=True)
class Act:
    """One rewrite of the demo.

    Attributes:
        name: model and door.
        report: of the rewrite.
        checks: what was checked beyond the rewrite's own verification.
        before, after: numbers that only this act measures, by label.
    """

    name: str
    report: RewriteReport
    checks: tuple[Check, ...]
    before: dict[str, float]
    after: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "report": self.report.to_dict(),
            "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in self.checks],
            "before": self.before,
            "after": self.after,
        }


def run_demo(*, json: bool = False) -> None:
    """Run all acts and print a table, or one JSON object.

    Raises VerificationFailed if a check fails, UnsupportedModel if a package with weights is missing.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    start = time.perf_counter()
    try:
        acts: list[Act] = []
        for title, act in (("SmolLM2 in torch", _smollm2), ("MiniLM in torch", _minilm), ("MiniLM int8 .onnx", _onnx)):
            print(f"{title} …", file=sys.stderr, flush=True)
            acts += act()
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    if json:
        print(json_module.dumps({"acts": [a.to_dict() for a in acts], "seconds": round(seconds, 1)}))
    else:
        print(_text(acts, seconds))
    failed = [f"{a.name}: {c.name} ({c.detail})" for a in acts for c in a.checks if not c.ok]
    if failed:
        raise VerificationFailed(f"the demo did not reproduce: {'; '.join(failed)}")


def _smollm2() -> list[Act]:
    """The multi-head twin of a grouped-query model loses nothing on the way back."""
    import torch

    model, tokenizer = smollm2()
    twin = smollm2_twin(model)
    del model
    ids = tokenizer(play(HELD_OUT), return_tensors="pt").input_ids[:, :PERPLEXITY_TOKENS]
    # it is the weights that are compared here: kernels add up in another order
    rewritten = rewriter.optimize(twin, "gqa3", verify=False, kernels="off")
    with torch.no_grad():
        moved = float((twin(ids[:, :512]).logits - rewritten(ids[:, :512]).logits).abs().max())
    old, new = perplexity(twin, ids), perplexity(rewritten, ids)
    texts = [_generate(m, tokenizer) for m in (twin, rewritten)]
    report = rewritten.rewrite_report
    ratio = report.kv_bytes_per_token.before / report.kv_bytes_per_token.after
    checks = (
        Check("max |Δlogit|", moved <= LOGIT_LIMIT, f"{moved:.1e}, limit {LOGIT_LIMIT:.0e}"),
        Check("perplexity", f"{old:.3g}" == f"{new:.3g}", f"{old:.4f} before, {new:.4f} after"),
        Check("K/V bytes per token ÷ 3", ratio == 3.0, f"÷ {ratio:g}"),
        Check("generated tokens equal", texts[0] == texts[1], f"{texts[1][:48]!r} …"),
    )
    return [Act("SmolLM2-135M, torch", report, checks, {"perplexity": old}, {"perplexity": new})]


def _generate(model: Any, tokenizer: Any) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def _minilm() -> list[Act]:
    """A trained encoder's heads differ, so sharing them is lossy: less so where sentences of another play show how."""
    model, tokenizer = minilm()
    batch = dict(tokenizer(_sentences(HELD_OUT), padding=True, return_tensors="pt"))
    pooled = rewriter.optimize(model, "gqa6", example_inputs={k: v[:8] for k, v in batch.items()})
    fitted = rewriter.optimize(model, "gqa6", calibration=(_sentences(CALIBRATION), tokenizer))
    wished, *cosines = _cosines(model, pooled, fitted, batch=batch)
    nearer = Check("nearer than by pooling", cosines[1] > cosines[0], f"{cosines[1]:.4f}, pooled {cosines[0]:.4f}")
    cases = (
        ("MiniLM-L6, torch", pooled, (), cosines[0]),
        (f"MiniLM-L6, torch, {SENTENCES} sentences", fitted, (nearer,), cosines[1]),
    )
    return [
        Act(name, m.rewrite_report, checks, {"sentence cosine": wished}, {"sentence cosine": cosine})
        for name, m, checks, cosine in cases
    ]


def _sentences(name: str) -> list[str]:
    """The first lines of a play that are about as long as sentences."""
    return [line for text in play(name).splitlines() if 30 < len(line := text.strip()) < 80][:SENTENCES]


def _cosines(*models: Any, batch: dict[str, Any]) -> list[float]:
    """Of every model's sentence vectors with those of the first, on average."""
    import torch

    with torch.no_grad():
        vectors = [_embed(m(**batch).last_hidden_state, batch["attention_mask"]) for m in models]
    return [float((vectors[0] * v).sum(-1).mean()) for v in vectors]


def _embed(states: Any, mask: Any) -> Any:
    """Mean over real tokens, normalised: how this model is used."""
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return pooled / pooled.norm(dim=-1, keepdim=True)


def _onnx() -> list[Act]:
    """A third-party file: rewritten, saved, and both files timed in onnxruntime."""
    source = minilm_int8_onnx()
    done = rewriter.optimize(source, "gqa6")
    with scratch_folder() as folder:
        target = folder / "minilm-gqa6.onnx"
        done.save(target)
        shapes = {"input_ids": ONNX_SHAPE, "attention_mask": ONNX_SHAPE}
        timed: Profile = rewriter.profile(source, target, shapes=shapes, runs=30)
        sizes = source.stat().st_size / 1e6, target.stat().st_size / 1e6
    before, after = ({"ms": m.ms.median, "file MB": s} for m, s in zip((timed.before, timed.after), sizes, strict=True))
    return [Act("MiniLM-L6 int8, onnx", done.rewrite_report, (), before, after)]


def _text(acts: list[Act], seconds: float) -> str:
    from rewriter.report.tables import table, text

    rows: list[tuple[object, ...]] = []
    for act in acts:
        report = act.report
        first = report.sites[0]
        step = "exact" if all(s.exact for s in report.sites) else "lossy"
        rows.append((act.name, f"{len(report.sites)} sites", first.before, first.after, step))
        rows.append(("", "parameters", f"{report.parameters.before:,}", f"{report.parameters.after:,}", ""))
        kv = report.kv_bytes_per_token
        rows.append(("", "K/V bytes per token", f"{kv.before:,}", f"{kv.after:,}", f"÷ {kv.before / kv.after:.3g}"))
        rows += [("", name, f"{act.before[name]:.4g}", f"{act.after[name]:.4g}", "") for name in act.before]
        rows += [("", c.name, "", "", ("ok: " if c.ok else "FAILED: ") + c.detail) for c in act.checks]
        if report.fidelity is not None:
            rows.append(("", "output cosine", "1", f"{report.fidelity.cosine:.4f}", "no gradient step"))
    return text(table(("model", "", "before", "after", ""), rows)) + f"\n{seconds:.0f} s"
