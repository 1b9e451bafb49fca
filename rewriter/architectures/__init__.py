"""Published efficient architectures as ordinary torch modules, to be trained from scratch.

They use the operations of `codegen/ops/`, as rewritten models do. `import rewriter` loads nothing of this.
"""
