"""What is in the wheel, built from the tree and from the source distribution."""

import fcntl
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(1800)  # the first build compiles everything


def maturin(*arguments: str, folder: Path) -> None:
    target = ROOT / "target"
    target.mkdir(exist_ok=True)
    with open(target / "maturin.lock", "w") as lock:
        # Two test workers at once take each other's library away.
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = subprocess.run(
            [sys.executable, "-m", "maturin", *arguments],
            cwd=folder,
            # One target folder: dependencies are compiled once.
            env=os.environ | {"CARGO_TARGET_DIR": str(target)},
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp(request.param)
    source = ROOT
    if request.param == "sdist":
        maturin("sdist", "--out", str(out), folder=ROOT)
        (archive,) = out.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(out, filter="data")
        (source,) = (path.parent for path in out.glob("*/pyproject.toml"))
    maturin("build", "--release", "--out", str(out), folder=source)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def files_of(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def under(wheel: zipfile.ZipFile, prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in wheel.namelist() if name.startswith(prefix)}


@pytest.mark.parametrize(("linked", "suffix"), [("kernels/ops", ".py"), ("configs", ".toml")])
def test_linked_folders_are_complete(wheel: zipfile.ZipFile, linked: str, suffix: str) -> None:
    expected = files_of(ROOT / linked)
    assert [name for name in expected if name.endswith(suffix) and name != "__init__.py"]
    assert under(wheel, f"archzoo/{linked}/") == expected.keys()
    for name, path in expected.items():
        assert wheel.read(f"archzoo/{linked}/{name}") == path.read_bytes()


def test_the_package_is_complete(wheel: zipfile.ZipFile) -> None:
    names = under(wheel, "archzoo/")
    sources = {name for name in files_of(ROOT / "python" / "archzoo") if name.endswith(".py")}
    assert sources <= names
    assert {"py.typed", "_rust.pyi"} <= names
    assert [name for name in names if name.endswith((".so", ".pyd", ".dylib"))] == ["_rust.abi3.so"]
    assert {name.split("/")[0] for name in wheel.namelist()} == {"archzoo", "archzoo-0.1.0.dist-info"}


def test_the_wheel_fits_every_python_from_3_11_on(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("archzoo-0.1.0.dist-info/WHEEL").decode()
    assert "Tag: cp311-abi3-" in text
    metadata = Parser().parsestr(wheel.read("archzoo-0.1.0.dist-info/METADATA").decode())
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    scripts = wheel.read("archzoo-0.1.0.dist-info/entry_points.txt").decode()
    assert "archzoo=archzoo.cli:app" in scripts.replace(" ", "")
