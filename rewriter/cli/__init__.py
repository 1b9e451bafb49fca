"""The command line: inspect, rewrite, verify, profile, kernels, uptrain, targets, demo.

Every command prints tables for people or, with --json, one JSON object on standard output. Errors are one line and
a hint on standard error; the exit code says whose fault it is (see `rewriter.errors`).
"""

from rewriter.cli.commands import app
from rewriter.cli.process import main, run

__all__ = ["app", "main", "run"]
