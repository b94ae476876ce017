"""The Triton kernels against their definitions, in Triton's interpreter.

Each file runs in a process of its own: the interpreter must be chosen before the first import of a kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CASES = sorted((Path(__file__).parent / "interpret").glob("*.py"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernels(path: Path) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "ARCHZOO_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", str(path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
