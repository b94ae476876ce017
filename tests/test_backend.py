"""Which backend an op takes, and why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import archzoo.ops
from archzoo.errors import ArchzooError, InputError, UnknownNameError
from archzoo.ops.backend import HAS_TRITON, INTERPRETED, backend, choose, why
from archzoo.ops.conv import causal_conv1d
from archzoo.ops.norm import add_rms_norm, gated_rms_norm, rms_norm


def test_the_device_decides() -> None:
    assert choose(torch.empty(1)) == "cpu"
    assert choose(torch.empty(1, device="meta")) == "reference"
    assert why(torch.empty(1)) == "cpu: the tensor is on the CPU"
    with FakeTensorMode():
        gpu = torch.empty(1, device="cuda")
        assert choose(gpu) == ("triton" if HAS_TRITON else "reference")
        assert choose(gpu.double()) == "reference"
        assert "float64" in why(gpu.double()) or not HAS_TRITON


def test_forced_and_restored() -> None:
    x = torch.empty(1)
    with backend("reference"):
        assert choose(x) == "reference"
        with backend("auto"):
            assert choose(x) == "cpu"
        assert why(x) == "reference: it is forced"
    with pytest.raises(ZeroDivisionError), backend("reference"):
        raise ZeroDivisionError
    assert choose(x) == "cpu"
    assert archzoo.ops.backend is backend


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs kernels on the CPU")
def test_triton_needs_a_gpu() -> None:
    with backend("triton"):
        assert why(torch.empty(1)).startswith("none: ")
        with pytest.raises(InputError, match="TRITON_INTERPRET=1" if HAS_TRITON else "not installed"):
            choose(torch.empty(1))
        with pytest.raises(ArchzooError):
            rms_norm(torch.ones(2, 4))


def test_unknown() -> None:
    with pytest.raises(UnknownNameError, match="did you mean triton"), backend("tritn"):
        pass


def run(code: str, **env: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_environment() -> None:
    code = "import torch; from archzoo.ops import why; print(why(torch.empty(1)))"
    assert run(code, ARCHZOO_BACKEND="reference") == "reference: it is forced\n"
    assert "unknown backend 'gpu'" in run(code, ARCHZOO_BACKEND="gpu")


def test_without_triton() -> None:
    """The ops import, run and compile when Triton is missing, and do not import it when it is there."""
    use = """
import torch, archzoo.ops.norm, archzoo.ops.conv
y = archzoo.ops.norm.rms_norm(torch.ones(1, 4, 8))
archzoo.ops.conv.causal_conv1d(y, torch.ones(8, 4))
"""
    assert run("import sys; sys.modules['triton'] = None" + use) == ""
    assert run(use + "import sys; print('archzoo.kernels.ops' in sys.modules)") == "False\n"


def test_compiled_code_follows_the_choice() -> None:
    def f(x: Tensor) -> Tensor:
        return x + {"cpu": 1, "reference": 2}[choose(x)]

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    x = torch.zeros(1)
    assert compiled(x) == 1
    with backend("reference"):
        assert compiled(x) == 2
    assert compiled(x) == 1


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_gpu_shapes_without_a_gpu() -> None:
    """On a GPU the registered ops run, here with fake tensors."""
    with FakeTensorMode():
        x = torch.empty(2, 6, 8, device="cuda", dtype=torch.bfloat16)
        w = torch.empty(8, device="cuda")
        taps = torch.empty(8, 4, device="cuda")
        y, summed = add_rms_norm(rms_norm(x, w), x, w)
        y = causal_conv1d(gated_rms_norm(y, summed, w, group_size=4), taps)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")
