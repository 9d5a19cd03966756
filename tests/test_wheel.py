"""The wheel: built, installed outside the checkout, and run there.

What the package depends on is taken from the environment of this test, so that no index is
asked; the package itself comes from the wheel alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.running import SAMPLES

ROOT = SAMPLES.parent
DATA = sorted((ROOT / "tdxtrace" / "tdx" / "data").glob("*.csv"))


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout, with nothing of it on Python's path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP"))}
    environment |= {"COLUMNS": "80", "LINES": "24", "PYTHONWARNINGS": "error::ImportWarning"}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves nothing in the checkout, and takes nothing but what is named.
    copy = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tdxtrace", copy / "tdxtrace", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    done = _run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--quiet", "--wheel-dir", folder, copy),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh environment with the wheel in it, and a folder with a sample."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    pure = sysconfig.get_path("purelib")
    site = next((folder / "env").glob("lib/python*/site-packages"))
    # Dependencies, behind everything that is installed here; an editable install of the
    # package is a .pth file there, and is not followed from here.
    (site / "dependencies.pth").write_text(f"{pure}\n")
    done = _run(
        *(sys.executable, "-m", "pip", "--python", folder / "env" / "bin" / "python", "install"),
        # What is installed here may be another build of the package: it is not to be found.
        *("--no-deps", "--no-index", "--quiet", "--no-compile", "--ignore-installed", wheel),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    shutil.copy(SAMPLES / "contended.txt", folder / "trace.txt")
    yield folder
    shutil.rmtree(folder)


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"tdxtrace/tdx/data/{path.name}" for path in DATA} <= set(names)
    assert len(DATA) >= 8
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tdxtrace").rglob("*.py")}
    assert sources <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "tdxtrace",
        next(name.split("/")[0] for name in names if ".dist-info" in name),
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]


def test_the_package_comes_from_the_wheel(place: Path) -> None:
    code = "import tdxtrace; print(tdxtrace.__file__)"
    done = _run(place / "env" / "bin" / "python", "-c", code, cwd=place)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(place / "env")


def test_the_installed_program_analyzes_a_log(place: Path) -> None:
    program = place / "env" / "bin" / "tdxtrace"
    done = _run(program, "analyze", "log", "trace.txt", "--output", "out", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2,011 SEAMCALLs, 503 requests, 129 retried" in done.stdout
    assert done.stdout.startswith("2 problems: 2 BUG")
    assert (place / "out" / "retry_chains.parquet").exists()


def test_the_installed_program_decodes_a_status(place: Path) -> None:
    program = place / "env" / "bin" / "tdxtrace"
    done = _run(program, "decode", "0x8000020000000092", "--leaf", "TDH.VP.ENTER", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "TDX_OPERAND_BUSY" in done.stdout
    assert "held by" in done.stdout
    assert "KVM" in done.stdout


def test_the_installed_program_prints_its_version(place: Path) -> None:
    done = _run(place / "env" / "bin" / "tdxtrace", "--version", cwd=place)
    assert done.stdout.startswith("tdxtrace ")


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_every_data_file_is_installed(place: Path, path: Path) -> None:
    site = next((place / "env").glob("lib/python*/site-packages"))
    assert (site / "tdxtrace" / "tdx" / "data" / path.name).read_bytes() == path.read_bytes()
