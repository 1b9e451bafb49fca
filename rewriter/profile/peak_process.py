"""Child process of the memory measurement: opens and runs one model, prints its peak as JSON."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from rewriter.profile.memory import PeakSampler, private_bytes

_RUNS = 3


def main(request: dict[str, Any]) -> int | None:
    """Peak growth in bytes of opening and running ``request["model"]``; None if the device cannot tell."""
    import onnxruntime

    from rewriter.capture.feeds import make_feeds
    from rewriter.capture.onnx_load import load
    from rewriter.profile.onnx_decode import Generation
    from rewriter.profile.providers import open_session
    from rewriter.profile.workload import Workload

    path, provider = Path(request["model"]), request["provider"]
    library = None if request.get("library") is None else Path(request["library"])
    workload = Workload.read(request["workload"])
    model = load(path)
    generation = None if workload.mode == "forward" else Generation.of(model, workload, provider)
    feeds = make_feeds(model, shapes=request["shapes"]) if generation is None else generation.prompt
    onnxruntime.get_available_providers()  # loading the library is not the model's cost
    read = private_bytes if provider == "cpu" else used_device_bytes
    try:
        read()
    except OSError:
        return None
    with PeakSampler(read) as peak:
        session = open_session(path, provider, request["threads"], library=library)
        if generation is not None:
            generation.job(session).run()
            return peak.so_far
        wanted = {value.name for value in session.get_inputs()}
        for _ in range(_RUNS):
            session.run(None, {name: array for name, array in feeds.items() if name in wanted})
    return peak.bytes


def used_device_bytes() -> int:
    """Memory in use on the first graphics card, by the driver; raises OSError where there is no driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    for status in (
        driver.cuInit(0),
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
        driver.cuCtxSetCurrent(context),
        driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
    ):
        if status != 0:
            raise OSError(f"the CUDA driver answered {status}")
    return total.value - free.value


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": main(json.loads(sys.argv[1]))}))
