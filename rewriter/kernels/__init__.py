"""Kernels for rewritten models: which are needed, and the folder that `rewriter kernels` writes."""
