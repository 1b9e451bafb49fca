"""Scripts that measure this library beside its peers, in one run: ``python -m benchmarks.coverage --help``."""
