"""Triton kernels, one family a file, and the functions that launch them."""
