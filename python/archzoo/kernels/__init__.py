"""Triton kernels. Their sources are in `kernels/ops` at the top of the repository, linked here as `ops`.

Import them inside functions only: `import archzoo` must work without Triton.
"""
