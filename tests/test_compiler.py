"""Loops run interpreted and compiled with equal results, and never from stale machine code."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tdxtrace import compiler

_LOOPS = """
from package.constants import STEP

def _next(total):
    return total + STEP

def count(values, into):
    total = 0
    for i in range(len(values)):
        total = _next(total)
        into[i] = total
    return total
"""
_COUNT = _LOOPS.partition("def count")[2]
# Makes a file where it is read as pickle.
_PICKLE = b"cos\nsystem\n(S'touch unpickled'\ntR."
_PROGRAM = """
import numpy as np
from package import compiler, loops
values = np.zeros(3, np.int64)
print(compiler.compiled(loops.count)(values, values), values.tolist())
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a copy of the compiler, a loop, and a constant of another module."""
    made = tmp_path / "package"
    made.mkdir()
    shutil.copy(compiler.__file__, made / "compiler.py")
    (made / "__init__.py").write_text("")
    (made / "loops.py").write_text(_LOOPS)
    (made / "constants.py").write_text("STEP = 1\n")
    return made


def _run(package: Path, cache: Path, program: str = _PROGRAM) -> tuple[str, str]:
    """Run the loop in a process of its own; return what it printed, and the notices."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=package.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr


def test_machine_code_is_kept_and_said_to_be_made_once(package: Path, tmp_path: Path) -> None:
    answer, notice = _run(package, tmp_path / "cache")
    assert answer == "3 [1, 2, 3]"
    assert "compiling" in notice
    assert list((tmp_path / "cache").rglob("*.nbc"))
    assert _run(package, tmp_path / "cache") == (answer, "")


def test_threads_that_compile_at_once_keep_machine_code_in_one_folder(
    package: Path, tmp_path: Path
) -> None:
    names = [f"count_{n}" for n in range(6)]
    more = "".join(f"\n{_LOOPS.partition('def count')[1]}_{n}{_COUNT}" for n in range(6))
    (package / "loops.py").write_text(_LOOPS + more)
    program = (
        "import threading, numba, numpy as np\nfrom package import compiler, loops\n"
        f"made = [compiler.compiled(getattr(loops, name)) for name in {names}]\n"
        "a = np.zeros(3, np.int64)\n"
        "threads = [threading.Thread(target=loop, args=(a, a.copy())) for loop in made]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(numba.config.CACHE_DIR == before)"
    ).replace("made =", "before = numba.config.CACHE_DIR\nmade =", 1)
    assert _run(package, tmp_path / "cache", program)[0] == "True"
    assert not list(package.rglob("*.nbi"))
    assert len(list((tmp_path / "cache" / "").rglob("loops.count_*.nbi"))) == len(names)


def test_a_constant_of_another_module_is_part_of_the_key(package: Path, tmp_path: Path) -> None:
    _run(package, tmp_path / "cache")
    (package / "constants.py").write_text("STEP = 5\n")
    assert _run(package, tmp_path / "cache")[0] == "15 [5, 10, 15]"


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x05N."])
def test_damaged_machine_code_is_passed_over(
    ending: str, content: bytes, package: Path, tmp_path: Path
) -> None:
    _run(package, tmp_path / "cache")
    for path in (tmp_path / "cache").rglob(f"*.{ending}"):
        path.write_bytes(content)
    answer, notice = _run(package, tmp_path / "cache")
    assert answer == "3 [1, 2, 3]"
    assert notice.count("\n") <= 1
    assert "Traceback" not in notice


def test_where_nothing_can_be_kept_each_run_compiles(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer, notice = _run(package, tmp_path / "file" / "cache")
    assert answer == "3 [1, 2, 3]"
    assert "not cached" in notice
    assert notice.count("\n") == 1


def test_machine_code_that_others_may_write_or_own_is_not_used(
    package: Path, tmp_path: Path
) -> None:
    _run(package, tmp_path / "cache")
    (made,) = (tmp_path / "cache").glob("loops-*")
    for path in made.rglob("*.nbc"):
        path.write_bytes(_PICKLE)
    made.chmod(0o777)
    _assert_passed_over(package, tmp_path)
    if os.geteuid() == 0:  # only root may give a folder away
        made.chmod(0o700)
        os.chown(made, 12345, 12345)
        _assert_passed_over(package, tmp_path)


def _assert_passed_over(package: Path, tmp_path: Path) -> None:
    answer, notice = _run(package, tmp_path / "cache")
    assert answer == "3 [1, 2, 3]"
    assert "others may write there" in notice
    assert notice.count("\n") == 1
    assert not (package.parent / "unpickled").exists()


def test_where_the_disk_is_full_each_run_compiles(package: Path, tmp_path: Path) -> None:
    """What numba writes of machine code fails as on a full disk."""
    program = (
        "import errno, os, numba.core.caching as caching\n"
        "def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "caching.IndexDataCacheFile.save = full\n"
    ) + _PROGRAM
    answer, notice = _run(package, tmp_path / "cache", program)
    assert answer == "3 [1, 2, 3]"
    assert "No space left on device" in notice
    assert notice.count("\n") <= 2
    assert "Traceback" not in notice


def test_machine_code_of_other_sources_goes_when_it_is_unused(
    package: Path, tmp_path: Path
) -> None:
    old, recent = (tmp_path / "cache" / f"loops-{name}" for name in ("old", "recent"))
    for folder in (old, recent):
        folder.mkdir(parents=True)
        (folder / "used").touch()
    os.utime(old / "used", (0, 0))
    _run(package, tmp_path / "cache")
    assert not old.exists()
    assert recent.exists()


def test_small_inputs_are_interpreted() -> None:
    assert compiler.choose(None) is compiler.interpreted
    assert compiler.choose(compiler.COMPILE_BYTES - 1) is compiler.interpreted
    assert compiler.choose(compiler.COMPILE_BYTES) is compiler.compiled


def test_without_numba_everything_is_interpreted_and_said_to_be_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    fresh = functools.cache(compiler._warn_once.__wrapped__)
    monkeypatch.setattr(compiler, "_warn_once", fresh)
    assert compiler.choose(1 << 40) is compiler.interpreted
    assert compiler.choose(1 << 40) is compiler.interpreted
    assert capsys.readouterr().err.count("numba is not installed") == 1


def _mix(value: np.uint64) -> np.uint64:
    return value * np.uint64(0x9E3779B97F4A7C15)


def test_unsigned_numbers_wrap_either_way() -> None:
    run = compiler.interpreted(_mix)
    assert run(np.uint64(3)) == compiler.compiled(_mix)(np.uint64(3)) == 0xDAA66D2C7DDF743F


def test_interpreted_an_index_out_of_range_is_an_error() -> None:
    def beyond(values: np.ndarray) -> int:
        return int(values[np.uint64(len(values))])

    with pytest.raises(IndexError):
        compiler.interpreted(beyond)(np.zeros(3, np.int64))


def test_a_loop_that_makes_an_array_is_refused() -> None:
    """Nothing is counted while loops run, so nothing could free it."""

    def make(values: np.ndarray) -> int:
        return len(np.empty(len(values)))

    with pytest.raises(Exception, match=r"NRT|returning of array"):
        compiler.compiled(make)(np.zeros(3, np.int64))
