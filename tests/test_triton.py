"""The Triton kernels against their definitions: in Triton's interpreter, and on a GPU when there is one.

Each file of tests/kernels runs in a process of its own: the interpreter must be chosen before the first
import of a kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CASES = sorted(p for p in (Path(__file__).parent / "kernels").glob("*.py") if p.name != "conftest.py")
each_file = pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)


def run(path: Path, interpret: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # not a worker of this run
    env |= {"TRITON_INTERPRET": interpret, "ARCHZOO_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@each_file
def test_interpreted(path: Path) -> None:
    run(path, "1")


@each_file
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu(path: Path) -> None:
    run(path, "0")
