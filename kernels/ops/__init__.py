"""Triton kernels, one family a file, and the functions that launch them. Nothing here is imported at start-up."""
