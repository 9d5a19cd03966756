"""Files in a folder or an object store, written atomically."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tdxtrace.errors import InputError
from tdxtrace.tables.files import atomic_file
from tdxtrace.tables.store import is_store
from tdxtrace.tables.text import one_line

_REMOTE: Final = "://"
_GLOB: Final = frozenset("*?[")
_BLOCK: Final = 1 << 20


class Storage(Protocol):
    """Files by their paths relative to one folder or URL."""

    @property
    def url(self) -> str:
        """The folder or URL."""

    def names(self, suffix: str) -> list[str]:
        """Return the paths of all files with this suffix, sorted."""

    def has(self, name: str) -> bool:
        """Return whether a file exists."""

    def read(self, names: Sequence[str]) -> list[bytes]:
        """Return the contents of files."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically; an existing one is replaced."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""


@dataclass(frozen=True, slots=True)
class FolderStorage:
    """Files in a folder."""

    url: str

    def names(self, suffix: str) -> list[str]:
        """Return the paths of all files with this suffix, sorted."""
        found, root = [], self.url.rstrip("/") or "/"
        for folder, _, files in os.walk(root):
            place = folder[len(root) :].lstrip("/")
            own = [file for file in files if file.endswith(suffix)]
            found += [f"{place}/{file}" if place else file for file in own]
        return sorted(found)

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return (Path(self.url) / name).is_file()

    def read(self, names: Sequence[str]) -> list[bytes]:
        """Return the contents of files."""
        try:
            return [Path(f"{self.url}/{name}").read_bytes() for name in names]
        except OSError as error:
            raise _cannot("read", str(error.filename), error) from None

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically; an existing one is replaced."""
        path = Path(self.url) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot("write", str(path), error) from None
        with atomic_file(path, force=True, inputs=()) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (Path(self.url) / name).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class ObjectStorage:
    """Objects below a URL of fsspec; object stores write an object atomically."""

    url: str
    files: Any
    """The file system of fsspec."""
    root: str

    def names(self, suffix: str) -> list[str]:
        """Return the paths of all files with this suffix, sorted."""
        self.files.invalidate_cache()
        found = self.files.find(self.root)
        return sorted(n.removeprefix(f"{self.root}/") for n in found if n.endswith(suffix))

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        self.files.invalidate_cache()
        return bool(self.files.exists(f"{self.root}/{name}"))

    def read(self, names: Sequence[str]) -> list[bytes]:
        """Return the contents of files."""
        places = [f"{self.root}/{name}" for name in names]
        try:
            found = self.files.cat(places) if places else {}
        except OSError as error:
            raise _cannot("read", self.url, error) from None
        return [found[place] for place in places]

    def write(self, name: str, content: bytes) -> None:
        """Write a file; an existing one is replaced."""
        try:
            self.files.pipe_file(f"{self.root}/{name}", content)
        except OSError as error:
            raise _cannot("write", f"{self.url}/{name}", error) from None

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.files.exists(f"{self.root}/{name}"):
            self.files.rm_file(f"{self.root}/{name}")


def open_storage(url: str) -> Storage:
    """Return the files below a folder, or a URL such as s3://bucket/facts.

    Raises:
        InputError: If the URL needs a library that is not installed, or cannot be used.
    """
    if _REMOTE not in url:
        return FolderStorage(url)
    files, root = _remote(url)
    return ObjectStorage(url.rstrip("/"), files, root.rstrip("/"))


def _remote(url: str) -> tuple[Any, str]:
    try:
        import fsspec  # noqa: PLC0415 - an extra

        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(
            f"{one_line(url)} needs {error.name or 'fsspec'}; pip install 'tdxtrace[fleet]'"
        ) from None
    except ValueError as error:
        raise InputError(f"cannot use {one_line(url)}: {one_line(str(error), 80)}") from None
    return files, root


def _cannot(what: str, name: str, error: OSError) -> InputError:
    words = error.strerror or one_line(str(error), 80)
    return InputError(f"cannot {what} {one_line(name)}: {words}")


@dataclass(frozen=True, slots=True)
class TraceInput:
    """A trace to count: its URL, size, and modification time or version."""

    url: str
    n_bytes: int
    changed: str

    def origin(self, key: bytes) -> str:
        """Return a hash of all fields, keyed unless ``key`` is empty."""
        words = f"{self.url}\n{self.n_bytes}\n{self.changed}"
        return hashlib.blake2b(
            words.encode("utf-8", "replace"), digest_size=16, key=key
        ).hexdigest()


def trace_inputs(urls: Sequence[str]) -> list[TraceInput]:
    """Return the traces in files, folders, globs and URLs, sorted, without duplicates.

    All files in a folder and its subfolders are traces; a folder made by ``tdxtrace convert`` is
    one trace.

    Raises:
        InputError: If an argument matches no trace.
    """
    found: dict[str, TraceInput] = {}
    for url in urls:
        of_url = list(_remote_inputs(url) if _REMOTE in url else _local_inputs(url))
        if not of_url:
            raise InputError(f"no trace at {one_line(url)}")
        found |= {given.url: given for given in of_url}
    return [found[url] for url in sorted(found)]


def _local_inputs(url: str) -> Iterator[TraceInput]:
    path = Path(url)
    if not path.exists() and _GLOB & set(url):
        anchor = Path(path.anchor or ".")
        places = sorted(anchor.glob(str(path.relative_to(path.anchor))))
    else:
        places = [path]
    for place in places:
        yield from _inputs_below(place)


def _inputs_below(path: Path) -> Iterator[TraceInput]:
    if path.is_dir() and not is_store(path):
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                yield from _inputs_below(inner)
    elif path.exists():
        state = [file.stat() for file in _files_of(path)]
        changed = str(max((s.st_mtime_ns for s in state), default=0))
        yield TraceInput(str(path), sum(s.st_size for s in state), changed)


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def _remote_inputs(url: str) -> Iterator[TraceInput]:
    files, root = _remote(url)
    files.invalidate_cache()
    places = files.glob(root) if _GLOB & set(root) else [root]
    for place in places:
        for name, facts in files.find(place, detail=True).items():
            changed = str(facts.get("ETag") or facts.get("LastModified") or facts.get("mtime"))
            yield TraceInput(files.unstrip_protocol(name), int(facts["size"]), changed)


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Yield the path of a trace: of a local one itself, of a remote one a temporary copy.

    Raises:
        InputError: If it cannot be copied.
    """
    if _REMOTE not in url:
        yield Path(url)
        return
    files, root = _remote(url)
    with tempfile.TemporaryDirectory(prefix="tdxtrace-") as folder:
        path = Path(folder) / Path(root).name
        try:
            files.get_file(root, str(path))
        except OSError as error:
            raise _cannot("read", url, error) from None
        yield path


def content_hash(path: Path) -> str:
    """Return the hash of a trace's content: of a file, or of the files of a folder.

    Raises:
        InputError: If it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in _files_of(path):
            if path.is_dir():
                digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
            with file.open("rb") as opened:
                while block := opened.read(_BLOCK):
                    digest.update(block)
    except OSError as error:
        raise _cannot("read", str(path), error) from None
    return digest.hexdigest()
