"""The benchmarks run, and write the JSON that the interface names. Times are not asserted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import (
    colt5_files,
    coverage,
    curves,
    end_to_end,
    fidelity,
    file_experts,
    flash_layers,
    kernels,
    real_models,
    rows,
    sparse_attention,
    sparse_mixers,
)
from benchmarks.attentions import DOORS, Outcome
from benchmarks.peers import PeerResult, model_type
from codegen.spec import Activation

ROW = {"name", "case", "ours", "peer", "peer_name", "unit", "ratio", "goal", "ok"}
MACHINE = {"processor", "cores", "memory_gib", "accelerator", "python", "torch_threads", "packages"}


class Here(ThreadPoolExecutor):
    """In the place of other processes; what goes there and back is written as for them."""

    def __init__(self, workers: int, mp_context: Any) -> None:
        super().__init__(workers)

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        call = pickle.dumps((function, args, kwargs))
        return super().submit(_answered, call)


def _answered(call: bytes) -> Any:
    function, args, kwargs = pickle.loads(call)
    return pickle.loads(pickle.dumps(function(*args, **kwargs)))


@pytest.mark.slow
def test_coverage_of_two_models_through_three_doors(
    tmp_path: Path, zoo_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "ProcessPoolExecutor", Here)
    target, page = tmp_path / "coverage.json", tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\n## Coverage\n\nold\n\n## Other\n\nkept\n")
    arguments = ["--cases", "bert-sdpa,deberta-eager", "--doors", "torch,graph,torchscript17", "--workers", "1"]
    code = coverage.main([*arguments, "--json", str(target), "--markdown", str(page), "--cache", str(zoo_cache)])
    assert code == 0
    written = json.loads(target.read_text())
    assert set(written["machine"]) >= MACHINE and written["skipped"] == []
    table = {(r["case"], r["peer_name"]): r for r in written["rows"]}
    doors = [("torch", None), ("graph", None), ("torchscript17", "onnxruntime"), ("torchscript17", "onnxscript")]
    assert set(table) == {(f"{case} {door}", peer) for case in ("bert-sdpa", "deberta-eager") for door, peer in doors}
    for (case, peer), row in table.items():
        assert set(row) >= ROW and row["ok"] is True and row["unit"] == "attentions"
        counts = (2, 0, 2) if case.startswith("bert") else (0, 2, 0)
        assert (row["found"], row["explained"], row["ours"]) == counts and row["goal"] == counts[2]
        assert (row["peer"] is None) is (peer is None)
    text = page.read_text()
    assert "old" not in text and "## Other\n\nkept" in text and "| torchscript17 | 2 | 4 | 2 | 2 | 2 |" in text


def test_an_unknown_case_is_a_usage_error() -> None:
    assert coverage.main(["--cases", "no-such-model"]) == 2


def _outcome(found: int, explained: int, verified: int, fused: int = 1) -> Outcome:
    peers = {"onnxruntime": PeerResult(fused, 0.5)}
    return Outcome("bert-sdpa", "dynamo18", 4, 1, found, explained, verified, 0.0, 0.1, peers)


def test_a_site_that_is_lost_or_not_verified_is_not_ok() -> None:
    assert _outcome(3, 1, 3).ok
    assert not _outcome(2, 1, 2).ok, "one attention is not accounted for"
    assert not _outcome(3, 1, 2).ok, "one site was called rewritable and was not rewritten"
    assert not _outcome(2, 2, 2).ok, "one site was refused that need not be"


def test_rows_compare_with_each_peer() -> None:
    (row,) = coverage.rows_of(_outcome(3, 1, 3))
    assert (row.ours, row.peer, row.ratio, row.goal, row.ok) == (3, 1, 3.0, 3, True)
    (nothing,) = coverage.rows_of(_outcome(3, 1, 3, fused=0))
    assert nothing.ratio is None


def test_quick_is_a_part_of_all() -> None:
    everything, quick = coverage.jobs(quick=False), coverage.jobs(quick=True)
    assert set(quick) < set(everything)
    assert {door for _, door in everything} == set(DOORS)
    assert len({case for case, _ in quick}) > 40


def test_model_types_are_told_by_the_longest_name() -> None:
    assert [model_type(n) for n in ("bert-sdpa", "llama-eager", "t5-sdpa", "phi3-sdpa", "phi-sdpa")] == [
        "bert", "gpt2", "t5", "gpt2", "phi",
    ]  # fmt: skip


def test_times_and_tables() -> None:
    calls: list[str] = []
    first, second = rows.interleaved(3, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert 0 < first.minimum <= first.median and len(second.seconds) == 3
    assert rows.markdown_table(["x", "y"], [[1, None], [True, 0.12345]]) == (
        "| x | y |\n| --- | --- |\n| 1 |  |\n| yes | 0.123 |"
    )


def test_the_grid_of_kernels_holds_every_goal() -> None:
    everything, quick = kernels.cases(quick=False), kernels.cases(quick=True)
    assert 0 < len(quick) < len(everything) and all(c.dim == 64 for c in quick)
    decode = {
        (c.kv_heads, c.dim, c.dtype) for c in everything if c.kind == "decode" and (c.batch, c.keys) == (16, 4096)
    }
    assert decode == {(kv, d, t) for kv in (32, 8, 1) for d in (64, 128) for t in ("float32", "bfloat16")}
    mixing = [(c.batch, c.tokens, c.hidden, c.goal) for c in kernels.mixing_kernels.cases(quick=True)]
    assert mixing == [(8, 512, 768, 3.0), (1, 2048, 768, 3.0), (8, 128, 768, 3.0)]
    goals = {(c.kind, c.kv_heads, c.dtype): kernels.goal_against_peers(c) for c in everything}
    assert goals["decode", 8, "float32"] == 1.6 and goals["decode", 1, "float32"] == 4.0
    assert goals["decode", 8, "bfloat16"] == 4.0 and goals["prefill", 12, "float32"] == 1.8


@pytest.mark.slow
def test_kernels_beside_their_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.host().arch:
        pytest.skip("no instruction set that there are kernels for")
    small = [kernels.Case("decode", 1, 8, 2, 64, 512, "float32"), kernels.Case("prefill", 1, 4, 4, 64, 256, "float32")]
    monkeypatch.setattr(kernels, "cases", lambda quick: small)
    monkeypatch.setattr(kernels.mixing_kernels, "cases", lambda quick: [kernels.mixing_kernels.Case(2, 64, 32)])
    linear = [kernels.linear_kernels.Case(256, kernels.linear_kernels.FeatureMap.ELU1)]
    monkeypatch.setattr(kernels.linear_kernels, "cases", lambda quick: linear)
    files = [replace(kernels.file_kernels.cases(quick=True)[0], tokens=256)]
    monkeypatch.setattr(kernels.file_kernels, "cases", lambda quick: files)
    monkeypatch.setattr(kernels.build_times, "SPECS", {"fourier": kernels.mixing_kernels.FourierMixing(32)})
    sparse = [kernels.sparse_kernels.Case("window 128, 4 sinks", 256)]
    monkeypatch.setattr(kernels.sparse_kernels, "cases", lambda quick: sparse)
    routed = [replace(case, tokens=32, places=8) for case in kernels.routed_kernels.cases(quick=True)[:1]]
    monkeypatch.setattr(kernels.routed_kernels, "cases", lambda quick: routed)
    monkeypatch.setattr(kernels.peaks, "ROUNDS", 10_000)
    target, page = tmp_path / "kernels.json", tmp_path / "benchmarks.md"
    threads = kernels.torch.get_num_threads()
    try:
        assert kernels.main(["--cpu-time", "--runs", "1", "--json", str(target), "--markdown", str(page)]) == 0
    finally:
        kernels.torch.set_num_threads(threads)
    written = json.loads(target.read_text())
    assert set(written["machine"]) >= MACHINE and all(set(row) >= ROW for row in written["rows"])
    peers = {row["peer_name"] for row in written["rows"] if row["name"] == "time"}
    assert {"torch sdpa", "onnxruntime Attention", "onnxruntime com.microsoft.GroupQueryAttention"} <= peers
    assert {"torch.fft.fft2", "onnxruntime DFT"} <= peers
    timings = [row for row in written["rows"] if row["name"] == "time"]
    others = {"linear", "file", "sparse"}  # those have peers that do more or less
    alike = [row for row in timings if row.get("kind") not in others]
    assert len(alike) > 6 and all(row["peer_differs_by"] < 1e-4 for row in alike)
    assert {row["kind"] for row in timings if row not in alike} == others
    names = {row["name"] for row in written["rows"]}
    assert names >= {"time", "error", "share of the machine's read bandwidth", "build"}
    assert "## Kernels" in page.read_text()


@pytest.mark.slow
def test_fidelity_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "MINILM_CASES", fidelity.MINILM_CASES[:1])
    monkeypatch.setattr(fidelity, "MINILM_QUICK", 8)
    target = tmp_path / "fidelity.json"
    code = fidelity.main(
        ["--quick", "--only", "minilm", "--json", str(target), "--markdown", str(tmp_path / "page.md")]
    )
    assert code == 0
    written = json.loads(target.read_text())
    assert set(written["machine"]) >= MACHINE
    found = {r["case"]: r for r in written["rows"]}
    assert all(set(r) >= ROW for r in found.values())
    merges = ("mean", "aligned", "joint", "joint + refit, 8 sentences")
    cosines = [found[f"kv 1/2, {merge}"]["ours"] for merge in merges]
    assert cosines == sorted(cosines), "each merge keeps more than the one before"
    assert "## Fidelity" in (tmp_path / "page.md").read_text()


FIDELITY = {
    "minilm cosine": "MiniLM",
    "minilm cosine, healed": "MiniLM",
    "minilm auto, cosine": "MiniLM",
    "smollm2 mqa perplexity / base": "SmolLM2",
    "smollm2 turned twin, largest change": "SmolLM2",
    "smollm2 mqa, KL on another kind of text": "SmolLM2",
    "smollm2 mqa perplexity / base, healed": "SmolLM2",
    "smollm2 linear perplexity / base": "SmolLM2",
    "whisper, KL from the original": "Whisper tiny.en",
}


def test_fidelity_lists_every_row_below_its_model() -> None:
    more = {"seconds": 1.0, "nearer": 11.5, "uniform": "", "word_error_rate": 0.125}
    made = [
        rows.Row(name, f"case {i}", 0.98491, 0.5, "peer", "unit", 2.0, 0.985, False, more)
        for i, name in enumerate(FIDELITY)
    ]
    _, *sections = fidelity.document(made, quick=False).split("\n### ")
    text = {section.splitlines()[0]: section for section in sections}
    assert list(text) == ["MiniLM", "SmolLM2", "Whisper tiny.en"]
    for i, (name, heading) in enumerate(FIDELITY.items()):
        assert [h for h, section in text.items() if f"| case {i} |" in section] == [heading], name
    assert "0.9849" in text["MiniLM"], "a healed figure is not rounded up to its goal"
    assert "11.5" in text["Whisper tiny.en"] and "0.125" in text["Whisper tiny.en"]


def test_fidelity_keeps_what_was_measured_before_it_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, page = tmp_path / "fidelity.json", tmp_path / "page.md"
    page.write_text("# Benchmarks\n\n## Fidelity\n\nold\n\n## Other\n\nkept\n")
    seen: list[list[str]] = []

    def part(_: bool) -> Iterator[rows.Row]:
        for name in ("first", "second"):
            yield rows.Row("minilm cosine", name, 0.9, None, None, "cosine", None, None, None)
            written = [r["case"] for r in json.loads(target.read_text())["rows"]]
            text = page.read_text()
            assert [f"| {case} |" in text for case in ("first", "second")] == [
                case in written for case in ("first", "second")
            ]
            assert "old" not in text and "kept" in text
            seen.append(written)
        raise KeyboardInterrupt

    monkeypatch.setattr(fidelity, "PARTS", {"cut": part})
    with pytest.raises(KeyboardInterrupt):
        fidelity.main(["--json", str(target), "--markdown", str(page)])
    assert seen == [["first"], ["first", "second"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fidelity.json", "page.md"]


def test_an_unknown_part_is_a_usage_error() -> None:
    assert fidelity.main(["--only", "no-such-part"]) == 2


@pytest.mark.slow
def test_mixed_encoders_beside_the_originals(tmp_path: Path) -> None:
    target, page = tmp_path / "end.json", tmp_path / "page.md"
    small = end_to_end.Shape(hidden=48, heads=4, feed_forward=64, layers=1, longest=128)
    arguments = ["--tokens", "24", "--runs", "1", "--threads", "1", "--json", str(target), "--markdown", str(page)]
    assert end_to_end.main(arguments, shape=small, mixers=sparse_mixers.Sizes(4, depth=2)) == 0
    written = json.loads(target.read_text())
    assert set(written["machine"]) >= MACHINE and all(set(r) >= ROW for r in written["rows"])
    times = [r for r in written["rows"] if r["name"] == "time"]
    assert {"onnxruntime, as exported", "onnxruntime, Attention operator", "torch, eager, sdpa"} <= {
        r["peer_name"] for r in times
    }
    # the fastest peer in onnxruntime, of ours with and without kernels, and the one in torch
    for model, places in {"fnet": 3, "sparse-mixer": 2, "fast-sparse-mixer": 2}.items():
        best = [r["best_peer"] for r in times if r["case"].startswith(f"{model},")]
        assert best.count(True) == places
    assert all("kernels" not in r["peer_name"] for r in times)
    assert all(r["goal"] is None for r in times)  # goals are for other lengths
    errors = [r for r in written["rows"] if r["name"] == "error"]
    assert errors and all(r["ok"] for r in errors)
    flash = [r for r in written["rows"] if r["name"] == "flash"]
    peers = {flash_layers.SDPA, flash_layers.WHOLE}
    assert {(r["form"], r["peer_name"]) for r in flash} == {(f, p) for f in ("flash", "flash-quad") for p in peers}
    state = next(r for r in written["rows"] if r["name"] == "decoding" and r["unit"] == "MiB")
    assert state["ok"] and state["ours"] == state["peer"]
    conditional = [r for r in written["rows"] if r["name"] == "colt5"]
    assert all(r["ratio"] > 0 and r["goal"] is None for r in conditional)
    dense = [r["peer_name"] for r in conditional if r["best_peer"]]
    assert len(dense) == 4 and dense.count("torch, dense, sdpa") == 2  # T5 and BERT, in torch and in files
    tiled = [r for r in conditional if r["peer_name"].endswith(colt5_files.TILES)]
    assert [r["case"].split(",")[0] for r in tiled] == ["colt5 from BERT"]  # T5's bias is as large as all scores
    assert all(f"## {title}" in page.read_text() for title in ("End to end", "FLASH layers", "CoLT5 encoders"))


def test_sparse_attention_is_told_by_length_and_drawn() -> None:
    lengths = {2048: (10.0, 40.0), 8192: (80.0, 640.0)}
    found = [
        rows.Row("time", f"{name}, {n} tokens, 8 heads, d 64", taken, 1.0, "torch, all keys", "ms", 1.0, None, None)
        for n, pair in lengths.items()
        for name, taken in zip(("torch, fixed", "torch, all keys"), pair, strict=True)
    ]
    found += [
        rows.Row("growth", f"{name}, 2048 to 8192 tokens", grown, None, "work", "exponent of n", None, goal, ok)
        for name, grown, goal, ok in (("torch, fixed", 1.5, 1.5, True), ("torch, all keys", 2.0, None, None))
    ]
    taken = sparse_attention.times(found)
    assert taken == {"torch, fixed": {2048: 10.0, 8192: 80.0}, "torch, all keys": {2048: 40.0, 8192: 640.0}}
    text = sparse_attention.report(found, "curves.svg")
    assert "| torch, fixed | 10 | 80 | 1.5 | 1.5 | yes |" in text and "](curves.svg)" in text
    drawn = ElementTree.fromstring(curves.svg(taken, "both logarithmic", powers=True))
    lines = [line.attrib["points"] for line in drawn if line.tag.endswith("polyline")]
    (fixed, *_), (whole, *_) = ([float(y) for _, y in (p.split(",") for p in points.split())] for points in lines)
    assert fixed > whole, "what takes less time is lower, and y points down"


def test_rows_of_flash_layers_carry_their_goals() -> None:
    found = {flash_layers.SDPA: 8.0, flash_layers.WHOLE: 10.0, "flash": 1.0, "flash-quad": 2.0}
    rows_ = list(flash_layers._rows(found, 8192, "causal, training step", flash_layers.LAYER_GOALS, causal=True))
    told = {(r.more["form"], r.peer_name): (r.ratio, r.goal, r.ok, r.more["paper"]) for r in rows_}
    assert told["flash", flash_layers.SDPA] == (8.0, 2.0, True, 12.12)
    assert told["flash", flash_layers.WHOLE] == (10.0, 12.0, False, 12.12)
    assert told["flash-quad", flash_layers.SDPA] == (4.0, None, None, 5.23)
    (flat,) = flash_layers._flat({"inference": {1024: 9.0, 2048: 1.0, 16384: 1.2}})
    assert flat.ok is False and flat.ratio == pytest.approx(1 / 1.2)


@pytest.mark.slow
def test_a_real_model_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = real_models.sentences
    monkeypatch.setattr(
        real_models, "sentences", lambda texts, count, seed: sentences(texts, 16 if count == 64 else count, seed)
    )
    monkeypatch.setattr(real_models, "SENTENCES", 2)
    monkeypatch.setattr(real_models, "LENGTH", 32)
    target, page, readme = tmp_path / "rows.json", tmp_path / "benchmarks.md", tmp_path / "README.md"
    readme.write_text("# x\n<!-- real models -->\nold\n<!-- end of real models -->\nkept\n")
    places = ["--json", str(target), "--markdown", str(page), "--readme", str(readme)]
    assert real_models.main(["--quick", "--only", "minilm", *places]) == 0
    (row,) = json.loads(target.read_text())["rows"]
    assert set(row) >= ROW and row["kv"] == 0.5 and 0.9 < row["parameters"] < 1 and row["ratio"] > 0
    assert row["measure"] == "cosine" and 0.8 < row["drift"] < 1 and row["healed"] != row["drift"]
    for text in (page.read_text(), readme.read_text()):
        assert "| MiniLM-L6 | gqa6, joint | torch, CPU: 2 x 32 tokens |" in text and "old" not in text
    assert readme.read_text().endswith("<!-- end of real models -->\nkept\n")
    assert real_models.main(["--only", "nothing"]) == 2


def _made(model: str, target: str, ratio: float) -> rows.Row:
    more = {"model": model, "target": target, "measure": "cosine", "drift": 0.9, "kv": 0.5}
    return rows.Row(f"{model}, {target}", "here", 1.0, ratio, "the original", "ms", ratio, None, None, more)


def test_parts_fill_their_own_lines_of_the_readme_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text(
        "<!-- real models -->\n| other | columns |\n| --- | --- |\n| old |  |\n<!-- end of real models -->\n"
    )

    def parts(*ratios: float, cut: bool = False) -> None:
        def first(quick: bool) -> Iterator[rows.Row]:
            yield _made("A", "gqa2", ratios[0])
            if cut:
                raise KeyboardInterrupt
            yield _made("A", "fnet", ratios[0])

        def second(quick: bool) -> Iterator[rows.Row]:
            yield _made("B", "gqa2", ratios[1])

        monkeypatch.setattr(real_models, "PARTS", {"first": first, "second": second})

    def lines() -> list[str]:
        return [
            line.replace(" here ", " ") for line in readme.read_text().splitlines() if line.startswith(("| A", "| B"))
        ]

    places = ["--readme", str(readme), "--markdown", str(page)]
    parts(2.0, 3.0)
    assert real_models.main(places) == 0
    whole = lines()
    assert [line[:20] for line in whole] == ["| A | gqa2 | | 2 | 0", "| A | fnet | | 2 | 0", "| B | gqa2 | | 3 | 0"]
    assert "old" not in readme.read_text() and "## Real models\n" in page.read_text()
    parts(4.0, 5.0)
    assert real_models.main(["--only", "second", *places]) == 0
    assert lines()[:2] == whole[:2] and "| 5 |" in lines()[2] and "## Real models: second\n" in page.read_text()
    parts(6.0, 7.0, cut=True)
    with pytest.raises(KeyboardInterrupt):
        real_models.main(places)
    assert "| 6 |" in lines()[0] and lines()[1] == whole[1], "what was measured before the end is kept"


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    for text in ("no marks", "<!-- a -->\n", "<!-- end of a -->\n<!-- a -->\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match="no place for 'a'"):
            rows.put_between(page, "a", "new")
        with pytest.raises(ValueError, match="no place for 'real models'"):
            real_models.main(["--quick", "--only", "minilm", "--readme", str(page)])
        assert page.read_text() == text


def test_experts_in_files_beside_the_runtimes_own(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    case = file_experts.Case(8, 12, 2, Activation.RELU, tokens=20, experts=4)
    assert file_experts.main(["--runs", "1", "--markdown", str(page)], wanted=[case]) == 0
    cells = page.read_text().strip().splitlines()[-1].strip("| ").split(" | ")
    assert cells[0] == str(case) and float(cells[-1]) < 1e-5
