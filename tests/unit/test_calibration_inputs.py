"""What a person may give as calibration, in Python and as files; sums of moments; the refit."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.weights.moments import MomentSums
from passes.weights.refit import RIDGES, Folded, NormalEquations, missed_across
from rewriter.calibration.batches import LONGEST, ROWS, WINDOW, Batch, batches
from rewriter.calibration.files import read_calibration
from rewriter.calibration.torch_probe import completed
from rewriter.errors import UsageError


class Tokenizer:
    """One token a character; pads with 0."""

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": np.array([[ord(c) % 50 + 1 for c in texts]])}
        rows = [[ord(c) % 50 + 1 for c in t][: options.get("max_length", 10**6)] for t in texts]
        if options.get("padding") != "max_length":
            return {"input_ids": rows}
        width = options["max_length"]
        ids = np.array([r + [0] * (width - len(r)) for r in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


def test_ids_are_cut_into_windows_and_rows_are_kept() -> None:
    long = np.arange(2 * WINDOW + 100)
    cut = batches(long, causal=True)
    assert [b.kwargs["input_ids"].shape for b in cut] == [(1, WINDOW)] * 2
    assert cut[1].kwargs["input_ids"][0, 0] == WINDOW
    assert [b.kwargs["input_ids"].shape for b in batches(torch.arange(12).view(3, 4), causal=False)] == [(1, 4)] * 3
    assert batches(list(range(8)), causal=True)[0].kwargs["input_ids"].shape == (1, 8)


def test_texts_are_joined_for_decoders_and_padded_for_encoders() -> None:
    texts = ["a short one", "a somewhat longer one", "x" * 300] * 11
    joined = batches((texts, Tokenizer()), causal=True)
    assert all(b.kwargs["input_ids"].shape == (1, WINDOW) for b in joined) and len(joined) > 5
    padded = batches(texts, causal=False, tokenizer=Tokenizer())
    assert [b.kwargs["input_ids"].shape for b in padded] == [(ROWS, LONGEST)] * 2
    assert padded[0].kwargs["attention_mask"].sum(axis=1)[:3].tolist() == [11, 21, LONGEST]
    few = batches((["one", "other"], Tokenizer()), causal=False)
    assert few[0].kwargs["input_ids"].shape == (2, 5)


def test_batches_of_inputs_are_taken_as_they_are() -> None:
    x = torch.randn(2, 3, 4)
    (one,) = batches({"x": x}, causal=False)
    assert one.kwargs["x"] is x
    loader = torch.utils.data.DataLoader([{"x": x[0], "labels": 1}, {"x": x[1], "labels": 2}], batch_size=2)
    (loaded,) = batches(loader, causal=False)
    assert set(loaded.kwargs) == {"x"} and loaded.kwargs["x"].shape == (2, 3, 4)
    assert batches([(x, x)], causal=False)[0].args == (x, x)
    assert batches([x], causal=False)[0].args[0] is x


@pytest.mark.parametrize("wrong", [3, [], np.zeros((2, 3)), [object()], np.zeros((0,), np.int64)])
def test_anything_else_is_a_usage_error(wrong: Any) -> None:
    with pytest.raises(UsageError):
        batches(wrong, causal=True)


def test_missing_inputs_are_made_up_or_asked_for() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    like: Any = ((), {"input_ids": ids, "attention_mask": ids, "use_cache": False})
    args, kwargs = completed(Batch((), {"input_ids": np.ones((4, 5), np.int64)}), like, torch.device("cpu"))
    assert args == () and list(kwargs) == ["input_ids", "attention_mask", "use_cache"]
    assert kwargs["attention_mask"].shape == (4, 5) and bool(kwargs["attention_mask"].all())
    with pytest.raises(UsageError, match="lack the input 'pixels'"):
        completed(Batch((), {"input_ids": ids}), ((), {"pixels": torch.ones(1)}), torch.device("cpu"))
    with pytest.raises(UsageError, match="positional"):
        completed(Batch((ids,)), like, torch.device("cpu"))


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": "one"}), json.dumps("two")]))
    assert read_calibration(tmp_path / "a.txt") == read_calibration(tmp_path / "a.jsonl") == ["one", "two"]
    np.save(tmp_path / "a.npy", np.arange(5))
    assert read_calibration(tmp_path / "a.npy").tolist() == [0, 1, 2, 3, 4]
    arrays = {"ids": np.arange(40).reshape(20, 2), "mask": np.ones((20, 2))}
    np.savez(tmp_path / "a.npz", **arrays)
    from safetensors.numpy import save_file

    save_file(arrays, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        cut = read_calibration(tmp_path / name)
        assert [b["ids"].shape for b in cut] == [(ROWS, 2), (20 - ROWS, 2)]
        np.testing.assert_array_equal(np.concatenate([b["ids"] for b in cut]), arrays["ids"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.jsonl", b"{"), ("a.jsonl", b'{"x": 1}'), ("a.npy", b"no"), ("a.npz", b"no"), ("a.bin", b"x"),
     ("a.safetensors", b"no")],
)  # fmt: skip
def test_broken_files_are_usage_errors(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError):
        read_calibration(tmp_path / name)
    with pytest.raises(UsageError, match="no such"):
        read_calibration(tmp_path / "none.txt")


def _array_header(shape: tuple[int, ...]) -> bytes:
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return made.getvalue()


HOSTILE = {
    "brackets without end.jsonl": b"[" * 100_000,
    "half a character.jsonl": b'"one"\n"\\ud800"',
    "numbers.jsonl": b"1\nnull",
    "a list as text.jsonl": b'{"text": ["one"]}',
    "more than any memory.npy": _array_header((10**15,)) + bytes(64),
    "less than nothing.npy": _array_header((-5,)) + bytes(64),
    "one number.npy": _array_header(()) + bytes(8),
    "a header without end.npy": b"\x93NUMPY\x01\x00\x88\x13" + b"(" * 5000,
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files_are_usage_errors(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises(UsageError, match="cannot be read") as refused:
        read_calibration(tmp_path / name)
    assert refused.value.hint


def test_an_archive_of_anything_else_is_a_usage_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("ids.txt", "hello")
    with pytest.raises(UsageError, match="no array"):
        read_calibration(tmp_path / "a.npz")


# ------------------------------------------------------------ sums


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 5))
def test_moments_do_not_depend_on_how_tokens_are_batched(seed: int, cut: int) -> None:
    g = np.random.default_rng(seed)
    q, k, v = g.normal(size=(6, 2, 5, 3)), g.normal(size=(6, 7, 6)), g.normal(size=(6, 7, 4))
    p = g.dirichlet(np.ones(7), size=(6, 2, 5))
    shown, asking = np.ones((6, 7), bool), np.ones((6, 5), bool)
    shown[1, 5:] = asking[1, 3:] = False
    whole, parts = MomentSums(), MomentSums()
    whole.add(q, k, v, p, shown, asking)
    for rows in (slice(0, cut), slice(cut, 6)):
        parts.add(q[rows], k[rows], v[rows], p[rows], shown[rows], asking[rows])
    for a, b in zip(vars(whole.moments()).values(), vars(parts.moments()).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    moments = whole.moments()
    kept = k[shown]
    np.testing.assert_allclose(moments.keys, kept.T @ kept / len(kept), atol=1e-12)
    z = np.einsum("bst,btd->bsd", p[:, 1], v)[asking]
    np.testing.assert_allclose(moments.values[1], z.T @ z / len(z), atol=1e-12)
    assert np.linalg.eigvalsh(moments.keys - moments.spread).min() > -1e-10, "centring takes energy away"


def test_hidden_tokens_do_not_count() -> None:
    """Control of the masks: with them, what hidden tokens hold is without effect; without, it is not."""
    g = np.random.default_rng(0)
    q, k, v = g.normal(size=(1, 2, 4, 3)), g.normal(size=(1, 4, 6)), g.normal(size=(1, 4, 4))
    p = np.zeros((1, 2, 4, 4))
    p[..., :3] = 1 / 3
    wild_q, wild_k = q.copy(), k.copy()
    wild_q[:, :, 3], wild_k[:, 3] = 100, 100
    hidden = np.array([[True, True, True, False]])
    for mask, equal in ((hidden, True), (np.ones((1, 4), bool), False)):
        sums = [MomentSums(), MomentSums()]
        sums[0].add(q, k, v, p, mask, mask)
        sums[1].add(wild_q, wild_k, v, p, mask, mask)
        assert np.allclose(sums[0].moments().queries, sums[1].moments().queries) is equal
        assert np.allclose(sums[0].moments().spread, sums[1].moments().spread) is equal


def test_no_tokens_are_no_moments() -> None:
    with pytest.raises(ValueError, match="no token"):
        MomentSums().moments()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_refit_is_least_squares_near_what_is_known(seed: int) -> None:
    g = np.random.default_rng(seed)
    x, truth = g.normal(size=(200, 6)), g.normal(size=(4, 6))
    known = truth + 0.1 * g.normal(size=truth.shape)
    equations = NormalEquations()
    for rows in (slice(0, 90), slice(90, 200)):
        equations.add(x[rows], x[rows] @ truth.T)
    np.testing.assert_allclose(equations.solve(known, ridge=1e-12), truth, atol=1e-8)
    np.testing.assert_allclose(equations.solve(known, ridge=1e9), known, atol=1e-6)
    errors = [float(np.linalg.norm(equations.solve(known, ridge=r) - truth)) for r in (1e-3, 1.0, 10.0)]
    assert errors == sorted(errors) and errors[0] < errors[-1]


def test_a_constant_is_not_held_by_the_ridge() -> None:
    g = np.random.default_rng(1)
    x = np.concatenate([g.normal(size=(300, 3)), np.ones((300, 1))], axis=1)
    y = np.full((300, 1), 7.0)
    equations = NormalEquations()
    equations.add(x, y)
    known = np.zeros((1, 4))
    assert equations.solve(known, ridge=1e3, constant=True)[0, -1] == pytest.approx(7.0, rel=1e-3)
    assert equations.solve(known, ridge=1e3)[0, -1] < 1.0


@pytest.mark.parametrize("constant", [False, True], ids=["plain", "constant"])
def test_all_ridges_from_one_decomposition(constant: bool) -> None:
    """What each half's solutions miss of the other half is what solving for every ridge by itself gives."""
    first, second, known = two_halves(constant)
    plain = [second.missed(first.solve(known, ridge=ridge, constant=constant)) for ridge in RIDGES]
    shared = missed_across(first, second, known, RIDGES, constant=constant)
    np.testing.assert_allclose(shared - shared[0], np.array(plain) - plain[0], atol=1e-9 * np.ptp(plain))
    other = missed_across(second, first, known, RIDGES, constant=constant)  # control: the halves are not alike
    assert np.abs((other - other[0]) - (shared - shared[0])).max() > 1e-3 * np.ptp(plain)
    best = RIDGES[int(np.argmin(shared + other))]
    assert RIDGES[0] < best < RIDGES[-1]
    whole = NormalEquations(first.gram + second.gram, first.cross + second.cross)
    solved = Folded((first, second)).solve(known, constant=constant)
    np.testing.assert_allclose(solved, whole.solve(known, ridge=best / 2, constant=constant))


def two_halves(constant: bool) -> tuple[NormalEquations, NormalEquations, Any]:
    """Noisy targets of features of very different sizes, and a solution [5, 12] that is known roughly."""
    g = np.random.default_rng(3)
    known = g.normal(size=(5, 12))
    truth, mixing = known + 0.3 * g.normal(size=known.shape), g.normal(size=(12, 12)) * np.geomspace(1, 1e-2, 12)
    halves = NormalEquations(), NormalEquations()
    for half in halves:
        x = g.normal(size=(40, 12)) @ mixing
        if constant:
            x[:, -1] = 1.0
        half.add(x, x @ truth.T + 3 * g.normal(size=(40, 5)))
    return (*halves, known)
