"""Generation with an .onnx file: the prompt in one call, then token by token, the cache staying where it is.

Inputs are made up beforehand and lie on the device; tokens are fixed, so that both models see the same ones and nothing
is sampled. A cache that grows is handed from one step's outputs to the next one's inputs without a copy; where every
cache belongs to an operator that writes into it, past and present are one buffer, bound once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewriter.capture.feeds import make_feeds
from rewriter.errors import UnsupportedModel
from rewriter.profile.interleaved import Job
from rewriter.profile.workload import Workload
from rewriter.verify.kv_cache import CachePorts, cache_ports

Array = NDArray[Any]

_WRITES_IN_PLACE = {"GroupQueryAttention": ({3, 4}, {1, 2})}
"""Operators that write present keys and values into the past's buffer: slots of past inputs and present outputs."""


@dataclass(frozen=True)
class Cache:
    """A generation that stands behind its prompt: what the session is bound to, and the caches it left."""

    binding: Any
    values: dict[str, Any]


@dataclass(frozen=True)
class Generation:
    """How to generate with one file.

    Attributes:
        device: "cpu" or "cuda".
    """

    model: ir.Model
    ports: CachePorts
    workload: Workload
    device: str

    @staticmethod
    def of(model: ir.Model, workload: Workload, provider: str) -> Generation:
        """Raises UnsupportedModel for a file that cannot start with an empty cache and go on with what it left."""
        ports = cache_ports(model)
        if not ports.open:
            raise UnsupportedModel(
                f"mode {workload.mode} needs a file that takes a key/value cache and returns it grown",
                hint="export the decoder with past, or leave --mode out",
            )
        return Generation(model, ports, workload, "cpu" if provider == "cpu" else "cuda")

    @cached_property
    def shares_buffer(self) -> bool:
        """Whether every cache is read and written by an operator that can do both in one place."""
        outputs = {value.name: value for value in self.model.graph.outputs}
        inputs = {value.name: value for value in self.model.graph.inputs}
        return all(_in_place(inputs[past], outputs[present]) for past, present in self.ports.present.items())

    @cached_property
    def prompt(self) -> dict[str, Array]:
        """Inputs of the prompt, with caches that are empty or, if they are buffers, as long as they will get."""
        return self._feeds(self.workload.prompt, 0)

    def _feeds(self, length: int, past: int) -> dict[str, Array]:
        feeds = make_feeds(self.model, batch=self.workload.batch, length=length, past=past, mask="ones")
        return self.ports.neutral(feeds)

    @cached_property
    def steps(self) -> tuple[dict[str, Any], ...]:
        """The small inputs of each step, on the device."""
        count = self.workload.new_tokens
        arrays = [self._feeds(1, self.workload.prompt + i) for i in range(count)]
        return tuple(
            {name: self._on_device(array) for name, array in feeds.items() if name not in self.ports.roles}
            for feeds in arrays
        )

    def _on_device(self, array: Array) -> Any:
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    @property
    def cache_bytes(self) -> int:
        """Of all caches at the end."""
        return self.ports.bytes_at(self.prompt, self.workload.total)

    def job(self, session: Any) -> Job:
        """What is timed: the prompt alone, or the tokens behind it."""
        if self.workload.mode == "prefill":
            return Job(lambda _: self.fill(session))
        return Job(lambda cache: self.go_on(session, cache), lambda: self.fill(session), self.workload.new_tokens)

    def fill(self, session: Any) -> Cache:
        """Run the prompt."""
        binding = session.io_binding()
        wanted = {value.name for value in session.get_inputs()}
        caches = {name: self._first_cache(name) for name in self.ports.roles if name in wanted}
        for name, array in self.prompt.items():
            if name in wanted:
                binding.bind_ortvalue_input(name, caches[name] if name in caches else self._on_device(array))
        if self.shares_buffer:
            for past, present in self.ports.present.items():
                binding.bind_ortvalue_output(present, caches[past])
        self._fresh_outputs(session, binding)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return Cache(binding, self._left(session, binding, caches))

    def _first_cache(self, name: str) -> Any:
        array = self.prompt[name]
        if self.shares_buffer and name in self.ports.present:
            array = np.zeros(self.ports.shape_at(name, self.prompt, self.workload.total), array.dtype)
        return self._on_device(array)

    def _fresh_outputs(self, session: Any, binding: Any) -> None:
        """Let the runtime make room for outputs that are no buffers of ours; their sizes differ from step to step."""
        ours = set(self.ports.present.values()) if self.shares_buffer else set()
        for value in session.get_outputs():
            if value.name not in ours:
                binding.bind_output(value.name, self.device, 0)

    def _left(self, session: Any, binding: Any, caches: dict[str, Any]) -> dict[str, Any]:
        if self.shares_buffer:
            return caches
        results = dict(zip((value.name for value in session.get_outputs()), binding.get_outputs(), strict=True))
        return {**caches, **{past: results[present] for past, present in self.ports.present.items()}}

    def go_on(self, session: Any, cache: Cache) -> dict[str, Any]:
        """Generate behind the prompt; returns the caches at the end."""
        wanted = {value.name for value in session.get_inputs()}
        binding, values = cache.binding, cache.values
        for feeds in self.steps:
            for name, value in feeds.items():
                if name in wanted:
                    binding.bind_ortvalue_input(name, value)
            if not self.shares_buffer:
                for name in self.ports.present:
                    binding.bind_ortvalue_input(name, values[name])
            self._fresh_outputs(session, binding)
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            values = self._left(session, binding, values)
        return values


def _in_place(past: ir.Value, present: ir.Value) -> bool:
    node = present.producer()
    slots = None if node is None else _WRITES_IN_PLACE.get(node.op_type)
    uses = list(past.uses())
    if node is None or slots is None or len(uses) != 1 or uses[0].node is not node:
        return False
    return uses[0].idx in slots[0] and present.index() in slots[1]
