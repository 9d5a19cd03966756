"""Atomic replacement of files and folders, and refusal to overwrite inputs."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event, Thread

import pytest

from tdxtrace.errors import InputError
from tdxtrace.tables import files
from tdxtrace.tables.files import atomic_folder, refuse_overwriting, rename_into_place


def _folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "text").write_text(text)
    return path


def _refuse(*_: object) -> bool:
    return False


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("old", ["nothing", "empty", "folder", "file", "link"])
def test_a_folder_replaces_whatever_had_its_name(
    old: str, can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchanged", _refuse)
    target = tmp_path / "run"
    if old == "empty":
        target.mkdir()
    elif old == "folder":
        _folder(target, "old")
    elif old == "file":
        target.write_text("old")
    elif old == "link":
        target.symlink_to(_folder(tmp_path / "other", "kept"))
    rename_into_place(_folder(tmp_path / "made", "new"), target)
    assert (target / "text").read_text() == "new"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"run", "other"} if old == "link" else {"run"})
    assert old != "link" or (tmp_path / "other" / "text").read_text() == "kept"


def test_a_file_replaces_a_folder(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.write_text("new")
    rename_into_place(made, _folder(tmp_path / "run", "old").parent / "run")
    assert (tmp_path / "run").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_target_exists_at_any_time(tmp_path: Path) -> None:
    target, ended, missed = _folder(tmp_path / "run", "0"), Event(), 0

    def watch() -> None:
        nonlocal missed
        while not ended.is_set():
            missed += not target.exists()

    watcher = Thread(target=watch)
    watcher.start()
    for n in range(300):
        rename_into_place(_folder(tmp_path / "made", str(n)), target)
    ended.set()
    watcher.join()
    assert missed == 0


def test_a_failed_rename_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchanged", _refuse)
    target = _folder(tmp_path / "run", "old")
    made = _folder(tmp_path / "made", "new")
    real = Path.rename

    def rename(self: Path, name: Path) -> Path:
        if self == made:
            raise OSError(5, "the disk is broken")
        return real(self, name)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk is broken"):
        rename_into_place(made, target)
    assert (target / "text").read_text() == "old"
    assert (made / "text").read_text() == "new"


def test_a_folder_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    target = _folder(tmp_path / "run", "old")
    with pytest.raises(InputError, match=r"is written; .* is now .*made: Permission denied"):
        rename_into_place(_folder(tmp_path / "made", "new"), target)
    assert (target / "text").read_text() == "new"


@pytest.mark.parametrize("name", ["new", "/dev/null", "a\0b"])
def test_devices_and_missing_files_are_not_overwritten_inputs(name: str, tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    refuse_overwriting(tmp_path / name, ["/dev/null", "-", tmp_path / name, "a\0b", "no/such"])
    refuse_overwriting(tmp_path / "old", ["/dev/null", "-", tmp_path / name, "a\0b", "no/such"])


def test_a_new_file_in_an_input_folder_is_allowed(tmp_path: Path) -> None:
    refuse_overwriting(tmp_path / "report.html", [tmp_path])
    (tmp_path / "report.html").touch()
    with pytest.raises(InputError, match=r"report.html would overwrite the input .*; name another"):
        refuse_overwriting(tmp_path / "report.html", [tmp_path])


@pytest.mark.parametrize("is_there", [True, False])
def test_the_files_of_a_folder_appear_when_all_are_written(is_there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    if is_there:
        folder.mkdir(parents=True)
        (folder / "mine").write_text("kept")
    with atomic_folder(folder, force=False, inputs=()) as made:
        (made / "one").write_text("1")
        (made / "two").write_text("2")
        assert not (folder / "one").exists()
    names = {path.name for path in folder.iterdir()}
    assert names == {"one", "two"} | ({"mine"} if is_there else set())
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt(), OSError(28, "no space")])
def test_an_incomplete_folder_leaves_no_files(
    is_there: bool, error: BaseException, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    if is_there:
        folder.mkdir()

    def write() -> None:
        with atomic_folder(folder, force=True, inputs=()) as made:
            (made / "one").write_text("1")
            raise error

    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        write()
    assert folder.exists() == is_there
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if is_there else [])


def test_a_file_of_a_folder_is_not_replaced_unless_all_may_be(tmp_path: Path) -> None:
    (tmp_path / "two").write_text("old")

    def write(force: bool, *inputs: Path) -> None:
        with atomic_folder(tmp_path, force=force, inputs=inputs) as made:
            (made / "one").write_text("1")
            (made / "two").write_text("2")

    for force, inputs in ((False, ()), (True, (tmp_path / "two",))):
        with pytest.raises(InputError, match=r"two exists|would overwrite the input"):
            write(force, *inputs)
        assert [path.name for path in tmp_path.iterdir()] == ["two"]
        assert (tmp_path / "two").read_text() == "old"
