"""Which implementation of an op runs, and why.

Every op has a plain-PyTorch reference that is its definition. `choose` says what runs instead:

  reference   the definition: when forced, on devices without kernels (meta, mps, xpu, a GPU without Triton)
  cpu         vectorised torch or Rust
  triton      CUDA and ROCm GPUs; on CPU tensors only under TRITON_INTERPRET=1 and only when forced
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from archzoo.errors import InputError, UnknownNameError

BACKENDS = ("auto", "reference", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    return name


# A plain global, so that torch.compile guards on it. Shared by all threads.
_forced = _known(os.environ.get("ARCHZOO_BACKEND") or "auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force "auto", "reference" or "triton" in a `with` block; ARCHZOO_BACKEND sets the default."""
    global _forced
    previous, _forced = _forced, _known(name)
    try:
        yield
    finally:
        _forced = previous


def _decide(tensor: torch.Tensor) -> tuple[str, str]:
    kind = tensor.device.type
    if _forced == "reference":
        return "reference", "it is forced"
    if _forced == "triton":
        if not HAS_TRITON:
            return "", "triton is not installed"
        if kind != "cuda" and not (kind == "cpu" and INTERPRETED):
            return "", f"the tensor is on '{kind}' (CPU tensors need TRITON_INTERPRET=1 before the import)"
        if tensor.dtype == torch.float64:
            return "", "Triton kernels compute in float32 and the tensor is float64"
        return "triton", "it is forced"
    if kind == "cpu":
        return "cpu", "the tensor is on the CPU"
    if kind != "cuda":
        return "reference", f"there are no kernels for device '{kind}'"
    if not HAS_TRITON:
        return "reference", "triton is not installed"
    if tensor.dtype == torch.float64:
        return "reference", "Triton kernels compute in float32 and the tensor is float64"
    return "triton", "the tensor is on a GPU"


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._are_functorch_transforms_active


def addressable(*tensors: torch.Tensor | None) -> bool:
    """Whether the memory of these tensors may be used: no subclass (fake, distributed), nothing traces."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _functorch():
        return False
    for t in tensors:  # noqa: SIM110 - a generator would cost as much as a small kernel
        if type(t) not in _PLAIN:
            return False
    return True


def launchable(*tensors: torch.Tensor | None) -> bool:
    """Whether a kernel may be launched without torch's dispatcher, which takes longer than a small one."""
    if not addressable(*tensors):
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def native(*tensors: torch.Tensor | None, strided: torch.Tensor | None = None) -> bool:
    """Whether Rust's kernels apply: CPU, fp32, no gradient, no compile; contiguous except `strided`."""
    if _forced != "auto" or not addressable(*tensors, strided):
        return False
    grad = torch.is_grad_enabled()
    for t in (*tensors, strided):
        if t is None:
            continue
        if t.dtype != torch.float32 or t.device.type != "cpu" or (grad and t.requires_grad):
            return False
        if not t.is_contiguous() and t is not strided:
            return False
    return True


def row_stride(t: torch.Tensor) -> int:
    """Values from a row of t [..., d] to the next; 0 when its rows are not evenly spaced."""
    if t.is_contiguous():
        return t.shape[-1]
    if t.stride(-1) != 1 or t.dim() == 1:
        return 0
    even = all(t.shape[i] == 1 or t.stride(i) == t.shape[i + 1] * t.stride(i + 1) for i in range(t.dim() - 2))
    return t.stride(-2) if even and t.stride(-2) >= t.shape[-1] else 0


def choose(tensor: torch.Tensor) -> str:
    """The backend for an op on this tensor: "reference", "cpu" or "triton"."""
    name, reason = _decide(tensor)
    if not name:
        raise InputError(f"backend 'triton' is forced, but {reason}")
    return name


def why(tensor: torch.Tensor) -> str:
    """One line that says which backend is taken for this tensor and why."""
    name, reason = _decide(tensor)
    return f"{name}: {reason}" if name else f"none: backend 'triton' is forced, but {reason}"
