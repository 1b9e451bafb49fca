"""Arguments and options that several commands have, and the words that options take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ExternalData(StrEnum):
    """Where the weights of an .onnx output go."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Merge(StrEnum):
    """How the key/value heads of a group become one."""

    MEAN = "mean"
    ALIGNED = "aligned"
    JOINT = "joint"


class Grouping(StrEnum):
    """Which key/value heads share one."""

    CONTIGUOUS = "contiguous"
    SIMILAR = "similar"


class Kernels(StrEnum):
    """Which generated kernels a rewritten PyTorch model may use."""

    AUTO = "auto"
    OFF = "off"
    TRITON = "triton"
    CUDA = "cuda"
    CPP = "cpp"


class Train(StrEnum):
    """Which parameters uptraining changes."""

    ALL = "all"
    BLOCKS = "blocks"
    REWRITTEN = "rewritten"


class Precision(StrEnum):
    """What uptraining multiplies in."""

    NO = "no"
    BF16 = "bf16"
    FP16 = "fp16"


class Mode(StrEnum):
    """What a profile measures."""

    FORWARD = "forward"
    PREFILL = "prefill"
    DECODE = "decode"


class Provider(StrEnum):
    """What the models run on."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
Progress = Annotated[bool, typer.Option("--progress", help="Report progress even without a terminal.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file or a Hugging Face directory.")]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="Fail if the mean KL divergence is larger (nats).")]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one self-contained page, too.")
]
MinCosine = Annotated[float | None, typer.Option("--min-cosine", help="Fail if the mean cosine is smaller.")]
