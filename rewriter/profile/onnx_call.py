"""One call of a session, ready to be timed; on a graphics card it waits for its result.

There inputs and outputs stay in the card's memory: they are bound once, before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rewriter.errors import UnsupportedModel, first_line

Call = Callable[[], object]
Arrays = Mapping[str, NDArray[Any]]


def session_call(session: Any, feeds: Arrays, provider: str) -> Call:
    """A call with `feeds`, of which the session takes what it has inputs for."""
    if provider != "cpu":
        return bound_call(session, feeds, "cuda")
    given = own(session, feeds)
    return lambda: session.run(None, given)


def bound_call(session: Any, feeds: Arrays, device: str, outputs: Sequence[NDArray[Any]] | None = None) -> Call:
    """Inputs lie on the device, and outputs arrive there.

    Args:
        device: "cuda" or "cpu".
        outputs: arrays of the shapes and dtypes of all outputs, which then get places that never change; without
            them the runtime makes room for outputs in each call.
    """
    import onnxruntime as ort

    binding = session.io_binding()
    for name, array in own(session, feeds).items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))
    names = [value.name for value in session.get_outputs()]
    if outputs is None:
        for name in names:
            binding.bind_output(name, device, 0)
    else:
        for name, array in zip(names, outputs, strict=True):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array, device, 0))

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def captured_call(session: Any, feeds: Arrays, outputs: Sequence[NDArray[Any]], path: Path) -> Call:
    """A call of a session that replays a CUDA graph; the first one, which captures it, is done here.

    Raises UnsupportedModel if the provider cannot capture the model in `path`.
    """
    call = bound_call(session, feeds, "cuda", outputs)
    try:
        call()
    except Exception as error:  # onnxruntime's errors share no public base class
        raise UnsupportedModel(
            f"{path.name} cannot be captured as a CUDA graph: {first_line(error)}", hint="leave the CUDA graph out"
        ) from error
    return call


def own(session: Any, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """Those feeds that the session has inputs for."""
    wanted = {value.name for value in session.get_inputs()}
    return {name: array for name, array in feeds.items() if name in wanted}
