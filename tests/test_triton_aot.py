# ruff: noqa: E402
"""Every kernel compiles for NVIDIA and AMD GPUs, without one: no spills, shared memory within limits."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from dataclasses import dataclass
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from archzoo.kernels.ops import conv, norm
from archzoo.kernels.ops.launch import OPTIONS, tile
from archzoo.ops.conv import _MAX_TAPS
from archzoo.ops.norm import _MAX_ROW

TARGETS = {  # name: (target, bytes of shared memory that one program may use)
    "cuda:80": (GPUTarget("cuda", 80, 32), 166_912),
    "cuda:90": (GPUTarget("cuda", 90, 32), 232_448),
    "hip:gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}


@dataclass
class Resources:
    registers: int
    spilled: int
    shared: int


def compile_kernel(kernel: Any, types: dict[str, str], target: GPUTarget, **values: Any) -> Resources:
    """Compile for run-time parameters of these types and these constexpr values; other parameters are None.

    Pointers, widths and strides count as divisible by 16, as they are in real models.
    """
    options = {k: values.pop(k) for k in ("num_warps", *OPTIONS)}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    values |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in values}
    aligned = [
        i for i, n in enumerate(kernel.arg_names) if types.get(n, "fp32") != "fp32" and n not in ("n", "T")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    log = io.StringIO()
    with knobs.cache.scope(), knobs.nvidia.scope(), tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder  # nothing cached, so that ptxas runs and reports
        knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(kernel, signature, values, attributes)
        options = make_backend(target).parse_options(options).__dict__
        with contextlib.redirect_stdout(log):
            built = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        assert found, "no ptxas report"
        assert registers
        return Resources(int(registers[1]), int(found[1]) + int(found[2]), built.metadata.shared)
    registers = re.search(r"\.vgpr_count:\s*(\d+)", built.asm["amdgcn"])
    found = re.search(r"\.vgpr_spill_count:\s*(\d+)", built.asm["amdgcn"])
    assert found, "no resources in the assembly"
    assert registers
    return Resources(int(registers[1]), int(found[1]), built.metadata.shared)


def fits(resources: Resources, limit: int) -> bool:
    return resources.spilled == 0 and resources.shared <= limit


def pointers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "*bf16")


def scalars(names: str) -> dict[str, str]:
    return {name: "fp32" if name in ("eps", "scale") else "i32" for name in names.split()}


RMS = scalars("n d stride_x eps scale")
RMS_BWD = RMS | scalars("stride_dy stride_dsum") | pointers("DY X W DX") | {"DW": "*fp32"}
GATED = scalars("n d size stride_y stride_z eps") | pointers("Y Z W")
GATED_BWD = GATED | scalars("stride_dout") | pointers("DOUT DY DZ") | {"DW": "*fp32"}
CONV = scalars("T C stride_b stride_t") | pointers("X W BIAS")
PACKED = pointers("STATE") | {"SEQ": "*i32"}
CONV_BWD = CONV | pointers("DY DX") | {"DW": "*fp32", "DB": "*fp32"}
FULL = {"K": _MAX_TAPS, "SILU": True}

CASES: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "rms_norm_fwd d=128": (norm.rms_norm_fwd, RMS | pointers("X W Y"), tile(128)),
    "add_rms_norm_fwd d=max": (
        norm.rms_norm_fwd, RMS | scalars("stride_res") | pointers("X RES W Y SUM"), tile(_MAX_ROW)),
    "rms_norm_bwd d=576": (norm.rms_norm_bwd, RMS_BWD, tile(576)),
    "add_rms_norm_bwd d=max": (norm.rms_norm_bwd, RMS_BWD | pointers("DSUM"), tile(_MAX_ROW)),
    "gated_rms_norm_fwd size=max": (
        norm.gated_rms_norm_fwd, GATED | pointers("OUT"), {"NORM_FIRST": False} | tile(_MAX_ROW)),
    "gated_rms_norm_bwd size=max": (
        norm.gated_rms_norm_bwd, GATED_BWD, {"NORM_FIRST": False} | tile(_MAX_ROW)),
    "gated_rms_norm_bwd size=max norm first": (
        norm.gated_rms_norm_bwd, GATED_BWD, {"NORM_FIRST": True} | tile(_MAX_ROW)),
    "gated_rms_norm_bwd size=256": (norm.gated_rms_norm_bwd, GATED_BWD, {"NORM_FIRST": False} | tile(256)),
    "conv_fwd": (conv.conv_fwd, CONV | pointers("Y"), conv.TILE | FULL),
    "conv_fwd state packed": (conv.conv_fwd, CONV | pointers("Y") | PACKED, conv.TILE | FULL),
    "conv_bwd": (conv.conv_bwd, CONV_BWD, conv.TILE_BWD | FULL),
    "conv_bwd state packed": (conv.conv_bwd, CONV_BWD | PACKED | pointers("DSTATE"), conv.TILE_BWD | FULL),
    "conv_step": (
        conv.conv_step, scalars("C stride_x") | pointers("X STATE W BIAS Y"), conv.STEP | FULL),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_fits(case: str, target: str) -> None:
    kernel, types, values = CASES[case]
    gpu, limit = TARGETS[target]
    resources = compile_kernel(kernel, types, gpu, **values)
    print(f"\n{case:40s} {target:12s} {resources}")
    assert fits(resources, limit), resources


def test_every_kernel_is_covered() -> None:
    jitted = {
        name
        for module in (norm, conv)
        for name, fn in vars(module).items()
        if isinstance(fn, triton.JITFunction) and fn.__module__ == module.__name__ and name[0] != "_"
    }
    assert jitted == {kernel.__name__ for kernel, _, _ in CASES.values()}


@triton.jit
def _spills(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i).to(tl.float32)
    tl.store(Y + i, (x / tl.sum(x, 0)).to(tl.bfloat16))


@triton.jit
def _hoards(A, B, C, N: tl.constexpr):
    i, k = tl.arange(0, 16), tl.arange(0, N)
    a, b = tl.load(A + i[:, None] * N + k[None, :]), tl.load(B + k[:, None] * 16 + i[None, :])
    tl.store(C + i[:, None] * 16 + i[None, :], tl.dot(a, b).to(tl.bfloat16))


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_that_does_not_fit_is_noticed(target: str) -> None:
    gpu, limit = TARGETS[target]
    hoards = compile_kernel(_hoards, pointers("A B C"), gpu, N=4096, num_warps=16, **OPTIONS)
    assert hoards.shared > limit
    assert not fits(hoards, limit)
    spills = hoards  # on AMD; NVIDIA's registers hold its tiles
    if gpu.backend == "cuda":
        spills = compile_kernel(_spills, pointers("X Y"), gpu, N=8192, num_warps=1, **OPTIONS)
    assert spills.spilled > 0
    assert not fits(spills, spills.shared)
