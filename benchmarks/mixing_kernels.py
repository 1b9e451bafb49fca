"""Rows of `benchmarks.kernels` for Fourier mixing: the C++ kernel beside torch.fft and onnxruntime's DFT operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks.rows import Clock, Row, Times, interleaved, timed
from codegen.launch.fourier_host import launch
from codegen.ops.fourier_mixing import torch_body
from codegen.ops.fourier_mixing.reference import fourier_mixing
from codegen.spec import FourierMixing

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One problem: x [batch, tokens, hidden]; `goal`: how many times as fast as the best peer, if anything is asked."""

    batch: int
    tokens: int
    hidden: int
    dtype: torch.dtype = torch.float32
    goal: float | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"fourier mixing, {self.batch} x {self.tokens} tokens, {self.hidden} features, {dtype}"


def cases(*, quick: bool) -> list[Case]:
    asked = [Case(8, 512, 768, goal=3.0), Case(1, 2048, 768, goal=3.0), Case(8, 128, 768, goal=3.0)]
    if quick:
        return asked
    others = [Case(1, 64, 256), Case(1, 128, 768), Case(1, 512, 768), Case(1, 8192, 768)]
    others += [Case(4, 509, 768), Case(4, 1000, 768), Case(8, 512, 1023)]  # a prime length, and odd radices
    return [*asked, *others, Case(8, 512, 768, torch.bfloat16), Case(1, 2048, 768, torch.float16)]


def run_case(case: Case, runs: int, threads: int, clock: Clock) -> list[Row]:
    """Rows of one case: beside each peer, and the error beside double precision."""
    spec = FourierMixing(case.hidden)
    x = torch.randn(case.batch, case.tokens, case.hidden, generator=torch.Generator().manual_seed(0)).to(case.dtype)

    def ours() -> Tensor:
        return launch(spec, x)

    peers = _peers(spec, x, threads)
    right = torch.from_numpy(fourier_mixing(spec, x[:1].double().numpy()))
    largest = float(right.abs().max())
    error = float((ours()[:1].double() - right).abs().max()) / largest
    others = {name: float((call()[:1].double() - right).abs().max()) / largest for name, call in peers.items()}
    patient = 20 * timed(ours, 2, clock)[0].minimum
    often = [name for name in peers if timed(peers[name], 1, clock)[0].minimum < patient]
    times = dict(zip(["ours", *often], interleaved(runs, ours, *(peers[n] for n in often), clock=clock), strict=True))
    times |= {name: timed(peers[name], 2, clock)[0] for name in peers if name not in often}
    return _rows(case, times, error, others)


def _peers(spec: FourierMixing, x: Tensor, threads: int) -> dict[str, Call]:
    wide = x.float()
    found: dict[str, Call] = {
        "torch.fft.fft2": lambda: torch.fft.fft2(x.float(), dim=(1, 2)).real.contiguous().to(x.dtype),
        "torch.fft.fft twice": lambda: torch_body.by_fast_transform(spec, x.float()).contiguous().to(x.dtype),
        "torch, real matrices": lambda: torch_body.by_matrices(spec, x.float()).to(x.dtype),
    }
    session, feeds = _onnxruntime(threads), {"x": wide.numpy()}

    def by_onnxruntime() -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, feeds)[0])).to(x.dtype)

    return found | {"onnxruntime DFT": by_onnxruntime}


def _onnxruntime(threads: int) -> ort.InferenceSession:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        dft (float[b, s, d] x) => (float[b, s, d] y) {
          last = Constant <value = int64[1] {-1}> ()
          zero = Constant <value = int64[1] {0}> ()
          one = Constant <value = int64[1] {1}> ()
          complex = Unsqueeze (x, last)
          features = DFT <axis = 2> (complex)
          both = DFT <axis = 1> (features)
          real = Slice (both, zero, one, last)
          y = Squeeze (real, last)
        }"""
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rows(case: Case, times: Mapping[str, Times], error: float, others: Mapping[str, float]) -> list[Row]:
    mine, peers = times["ours"], {name: t for name, t in times.items() if name != "ours"}
    best = min(peers, key=lambda name: peers[name].minimum)
    rows = []
    for name, t in peers.items():
        goal, ratio = case.goal if name == best else None, t.minimum / mine.minimum
        more = {"kind": "mixing", "error": error, "ours_median": mine.median * 1e3, "peer_median": t.median * 1e3}
        more |= {"best_peer": name == best, "peer_differs_by": others[name]}
        ok = None if goal is None else ratio >= goal
        rows.append(Row("time", str(case), mine.minimum * 1e3, t.minimum * 1e3, name, "ms", ratio, goal, ok, more))
    if case.dtype == torch.float32:
        limit = 2e-6
        unit = "of the largest output"
        rows.append(
            Row("error", str(case), error, limit, "limit", unit, limit / max(error, 1e-30), 1.0, error <= limit, {})
        )
    return rows
