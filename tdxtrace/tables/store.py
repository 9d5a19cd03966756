"""Storage of a Trace as a folder of Parquet files, and the cache of such folders.

A file consists of segments, which are its row groups.  Its footer lists the number of rows and the
range of times and of ``seq`` of each segment, so that a part of a table can be read alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.errors import InputError, TableError
from tdxtrace.tables.catalog import SCHEMA_VERSION
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.files import rename_into_place
from tdxtrace.tables.formats import format_named
from tdxtrace.tables.schema import Table
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Provenance, Source, Trace

if TYPE_CHECKING:
    import pyarrow.parquet as pq


PROVENANCE: Final = "provenance.json"
# Rows per Parquet row group: large enough for fast reading, about 40 MB while buffered.
GROUP_ROWS: Final = 1 << 18
_MAX_PROVENANCE_BYTES: Final = 64 << 20
# Limit of the unpacked size relative to the size on disk, as in ingest.source for other inputs:
# the time and number of a row take at least some bytes on disk.
_MAX_RATIO: Final = 200
_FREE_BYTES: Final = 256 << 20
_COMPRESSION: Final[Mapping[str, Any]] = {"compression": "zstd"}
_FAST_COMPRESSION: Final[Mapping[str, Any]] = {"compression": "lz4", "use_dictionary": False}
# Bytes of a value in memory by type; _TEXT_BYTES is a lower bound for other types (enums, text).
_TEXT_BYTES: Final = 4
_WIDTHS: Final = {"Int8": 1, "UInt8": 1, "Boolean": 1, "Int16": 2, "UInt16": 2} | {
    "Int32": 4,
    "UInt32": 4,
    "Int64": 8,
    "UInt64": 8,
    "Float64": 8,
}
# Bytes hashed at either end of a file: a recording that changes only in its middle gets a new
# modification time.
_BLOCK_BYTES: Final = 1 << 16
_TABLE_KEY: Final = "tdxtrace.table"
_VERSION_KEY: Final = "tdxtrace.schema_version"
_SEGMENTS_KEY: Final = "tdxtrace.segments"
_UNUSED_KEY: Final = "tdxtrace.unused_columns"
# Key in the provenance: the CRC-32 of each table's file.
_SUMS_KEY: Final = "crc32"
_SUM_BYTES: Final = 1 << 20
_TABLES: Final[Mapping[str, Table]] = {table.name: table for table in EVENT_TABLES}


@dataclass(frozen=True, slots=True)
class Segment:
    """A row group of a stored table: number of rows, range of times and of ``seq``."""

    n_rows: int
    first_ns: int | None
    """Earliest time of a row; None: a row, or the table, has no time."""
    last_ns: int | None
    first_seq: int | None
    last_seq: int | None

    @classmethod
    def of(cls, rows: pl.DataFrame) -> Segment:
        """Describe the rows of a segment."""
        spans = []
        for names in (BEGINS, ENDS, ("seq",), ("seq",)):
            known = [name for name in names if name in rows.columns]
            spans.append(rows.select(pl.coalesce(known)).to_series() if known else None)
        firsts = [s.min() if s is not None and not s.null_count() else None for s in spans]
        lasts = [s.max() if s is not None and not s.null_count() else None for s in spans]
        return cls(rows.height, firsts[0], lasts[1], firsts[2], lasts[3])  # type: ignore[arg-type]

    def may_overlap(self, since_ns: int | None, until_ns: int | None) -> bool:
        """Return whether any row may overlap the time range."""
        if self.first_ns is None or self.last_ns is None:
            return True
        return (since_ns is None or self.last_ns >= since_ns) and (
            until_ns is None or self.first_ns <= until_ns
        )


# Columns of the first and the last time of a row; the first one that is not null is used.
BEGINS: Final = ("start_ns", "ts_ns", "end_ns")
ENDS: Final = ("end_ns", "ts_ns", "start_ns")


@dataclass(slots=True)
class _TableFile:
    """A Parquet file that is being written."""

    table: Table
    path: Path
    is_temporary: bool = False
    """Whether to write it fast rather than small: it is read once, soon."""
    n_rows: int = 0
    _buffered: list[pl.DataFrame] = field(default_factory=list)
    _n_buffered: int = 0
    _writer: pq.ParquetWriter | None = None
    _is_closed: bool = False
    _segments: list[Segment] = field(default_factory=list)
    _unused: set[str] = field(default_factory=set)

    def add(self, rows: pl.DataFrame) -> None:
        """Buffer rows; write a row group when enough are buffered."""
        self._buffered.append(rows)
        self._n_buffered += rows.height
        self.n_rows += rows.height
        if self._n_buffered >= GROUP_ROWS:
            self._write()

    def close(self) -> None:
        """Write the remaining rows and complete the file."""
        if self._is_closed:
            return
        self._is_closed = True
        self._write()
        if self._writer is not None:
            facts = [dataclasses.astuple(segment) for segment in self._segments]
            self._writer.add_key_value_metadata(
                {
                    _SEGMENTS_KEY: json.dumps(facts),
                    _UNUSED_KEY: json.dumps(sorted(self._unused)),
                }
            )
            self._writer.close()
            self._writer = None

    def _write(self) -> None:
        import pyarrow.parquet as pq  # noqa: PLC0415 - slow to import, seldom needed

        frame = self.table.with_optional(
            pl.concat([self.table.empty(), *self._buffered], how="diagonal")
        )
        self._buffered, self._n_buffered = [], 0
        _check_space(self.path.parent, frame)
        used = {c.name for c in self.table.columns if c.optional and frame[c.name].count()}
        optional = {c.name for c in self.table.columns if c.optional}
        self._unused = (self._unused if self._segments else optional) - used
        self._segments.append(Segment.of(frame))
        rows = frame.to_arrow()
        if self._writer is None:
            metadata = {_TABLE_KEY: self.table.name, _VERSION_KEY: str(SCHEMA_VERSION)}
            schema = rows.schema.with_metadata(metadata)
            compression = _FAST_COMPRESSION if self.is_temporary else _COMPRESSION
            self._writer = pq.ParquetWriter(self.path, schema, **compression)
        self._writer.write_table(rows.cast(self._writer.schema), row_group_size=frame.height or 1)


@dataclass(slots=True)
class SortedFile:
    """A table on disk to which rows are added in any order, and which is sorted by its key.

    It is sorted one range of keys at a time, so that memory does not grow with the table.

    Args:
        table: The table; its key is ``source`` and a number.
        path: Path of the file.
    """

    table: Table
    path: Path
    _unsorted: _TableFile = field(init=False)
    _buffered: list[pl.DataFrame] = field(default_factory=list)
    _n_buffered: int = 0
    _keys: list[pl.DataFrame] = field(default_factory=list)
    """Keys of every _SAMPLED-th row of each row group."""

    def __post_init__(self) -> None:
        path = self.path.with_suffix(".unsorted")
        self._unsorted = _TableFile(self.table, path, is_temporary=True)

    def add(self, rows: pl.DataFrame) -> None:
        """Add rows.

        Raises:
            InputError: If they cannot be written.
        """
        self._buffered.append(rows)
        self._n_buffered += rows.height
        if self._n_buffered >= GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        if not self._n_buffered:
            return
        rows = pl.concat(self._buffered).sort(self.table.key)
        self._buffered, self._n_buffered = [], 0
        self._keys.append(rows.select(self.table.key).gather_every(_SAMPLED))
        try:
            self._unsorted.add(rows)
        except OSError as error:
            raise _cannot_write(self.path.parent, error) from None

    def finish(self, owner: object, change: Change | None = None) -> StoredTable:
        """Sort the rows, and return the table.

        Args:
            owner: Object that owns the file, such as its temporary folder; the table refers to it
                so that the file is not removed while it is used.
            change: Function applied to the rows of each range, sorted by the key.

        Raises:
            InputError: If they cannot be written.
        """
        self._write()
        self._unsorted.close()
        sorted_table, sorted_file = (
            _TableFile(self.table, self.path),
            pl.scan_parquet(self._unsorted.path, glob=False),
        )
        try:
            for is_within in self._ranges():
                rows = sorted_file.filter(is_within).collect().sort(self.table.key)
                rows = rows.cast(self.table.schema)
                sorted_table.add(rows if change is None else change(rows))
            sorted_table.close()
            self._unsorted.path.unlink()
        except OSError as error:
            raise _cannot_write(self.path.parent, error) from None
        return StoredTable(self.table, self.path, owner)

    def _ranges(self) -> Iterator[pl.Expr]:
        """Yield conditions on the key, in ascending order, of about ``GROUP_ROWS`` rows each.

        Each range contains the same number of sampled rows (sample sort): J. S. Huang, Y. C. Chow,
        Parallel sorting and data partitioning by sampling, COMPSAC 1983.
        """
        if not self._keys:
            return
        source, number = self.table.key
        keys = pl.concat(self._keys).sort(self.table.key)
        for (name,), own in keys.group_by(source, maintain_order=True):
            bounds = own[number].gather_every(GROUP_ROWS // _SAMPLED)[1:].unique().sort().to_list()
            of_source = pl.col(source) == pl.lit(name, self.table.schema[source])
            for low, high in zip([None, *bounds], [*bounds, None], strict=True):
                is_within = of_source
                if low is not None:
                    is_within &= pl.col(number) >= pl.lit(low, self.table.schema[number])
                if high is not None:
                    is_within &= pl.col(number) < pl.lit(high, self.table.schema[number])
                yield is_within


# One of so many rows is sampled to find the bounds of ranges.  A choice.
_SAMPLED: Final = 1 << 10


@dataclass(slots=True)
class StoreWriter:
    """Writer of a Trace's tables into a temporary folder that is renamed when complete.

    Args:
        folder: Path of the folder; a link is resolved.
        force: Whether to replace an existing store, once the new one is complete.

    Raises:
        InputError: If the folder cannot be created, or exists and may not be replaced.
    """

    folder: Path
    force: bool = False
    _files: dict[str, _TableFile] = field(default_factory=dict)
    _work: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(os.path.realpath(self.folder))
        _check_replaceable(self.folder, self.force)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._work = Path(tempfile.mkdtemp(prefix=".tdxtrace-", dir=self.folder.parent))
        except OSError as error:
            raise _cannot_write(self.folder, error) from None
        for table in EVENT_TABLES:
            self._files[table.name] = _TableFile(table, self._work / f"{table.name}.parquet")

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Add rows to the table ``name``.

        Raises:
            InputError: If they cannot be written.
        """
        try:
            self._files[name].add(rows)
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def n_rows(self, name: str) -> int:
        """Return the number of rows added to a table so far."""
        return self._files[name].n_rows

    def batches(self, name: str) -> Iterator[pl.DataFrame]:
        """Yield the rows of a table in batches; no row can be added afterwards."""
        self._files[name].close()
        yield from _groups(self._files[name].path, self._files[name].table)

    def finish(self, provenance: Provenance, change: Mapping[str, Change]) -> None:
        """Write the provenance and rename the folder to its final name.

        Args:
            provenance: Inputs of the rows.
            change: Functions applied to the rows of tables, by table name.

        Raises:
            InputError: If something cannot be written, or the name was taken meanwhile.
        """
        facts = {"schema_version": SCHEMA_VERSION, "provenance": provenance.to_dict()}
        try:
            for name, changed in change.items():
                self._rewrite(name, changed)
            for file in self._files.values():
                file.close()
            facts[_SUMS_KEY] = {name: _sum_of(file.path) for name, file in self._files.items()}
            (self._work / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
            self._work.chmod(0o755)
            _check_replaceable(self.folder, self.force)
            rename_into_place(self._work, self.folder)
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def _rewrite(self, name: str, changed: Change) -> None:
        old = self._files[name]
        old.close()
        new = _TableFile(old.table, old.path.with_suffix(".new"))
        for rows in _groups(old.path, old.table):
            new.add(changed(rows))
        new.close()
        new.path.replace(old.path)

    def discard(self) -> None:
        """Remove the temporary folder, if it was not renamed."""
        shutil.rmtree(self._work, ignore_errors=True)


def _check_space(folder: Path, rows: pl.DataFrame) -> None:
    """Check that the disk has space for rows.

    Raises:
        InputError: If less is free than the rows take in memory; on disk they take less.
    """
    disk = os.statvfs(folder)
    free, needed = disk.f_bavail * disk.f_frsize, int(rows.estimated_size())
    if free < needed:
        raise InputError(
            f"the disk of {one_line(str(folder.parent))} is almost full: {free >> 20} MiB left, "
            f"{(needed >> 20) + 1} MiB needed next; name another disk (TMPDIR, or --output)"
        )


Change = Callable[[pl.DataFrame], pl.DataFrame]


def _groups(path: Path, table: Table) -> Iterator[pl.DataFrame]:
    import pyarrow.parquet as pq  # noqa: PLC0415

    with pq.ParquetFile(path) as parts:
        for group in range(parts.num_row_groups):
            rows = pl.from_arrow(parts.read_row_group(group))
            assert isinstance(rows, pl.DataFrame)
            yield rows.cast(table.schema_of(rows))


def _check_replaceable(folder: Path, force: bool) -> None:
    """Check that ``folder`` is missing, an empty folder or, with ``force``, a store.

    Raises:
        InputError: If it is anything else.
    """
    shown = one_line(str(folder))
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not is_store(folder):
        raise InputError(f"{shown} exists and is not a converted trace; name another folder")
    if not force:
        raise InputError(f"{shown} exists; use --force to replace it")


def is_store(folder: Path) -> bool:
    """Whether ``folder`` contains a stored Trace."""
    return (folder / PROVENANCE).is_file()


def open_store(folder: Path, owner: object = None, max_bytes: int | None = None) -> Trace:
    """Open a folder written by :class:`StoreWriter`; each table is read on first access.

    Args:
        folder: The folder.
        owner: Object that owns the folder, which the Trace refers to: the temporary folder.
            None: the store is untrusted, and everything that is read from it is checked.
        max_bytes: Limit of the unpacked size of its tables; None: 200 times their size on disk
            plus 256 MiB.

    Raises:
        InputError: If a file cannot be read, or its tables unpack to more than the limit.
        TableError: If it has another schema version or other columns.
    """
    shown = one_line(str(folder))
    damaged = InputError(f"cannot read {shown}: its {PROVENANCE} is damaged")
    try:
        with (folder / PROVENANCE).open("rb") as file:
            facts = json.loads(file.read(_MAX_PROVENANCE_BYTES))
        version = facts["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if version != SCHEMA_VERSION:
        given = one_line(str(version), 20) if isinstance(version, (int, str)) else "none"
        raise TableError(
            f"{shown} has tables of version {given}, this tdxtrace reads "
            f"version {SCHEMA_VERSION}; convert the trace again"
        )
    try:
        provenance = _provenance(facts["provenance"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    n_sources = len(provenance.sources) if owner is None else None
    if owner is None:
        _check_sums(folder, facts.get(_SUMS_KEY))
    files = {
        name: StoredTable(table, folder / f"{name}.parquet", owner, n_sources)
        for name, table in _TABLES.items()
    }
    if n_sources is not None:
        _check_sizes(folder, files.values(), max_bytes)
    return Trace.stored(files, provenance)


def _check_sizes(folder: Path, files: Iterable[StoredTable], max_bytes: int | None) -> None:
    """Check the unpacked size of all tables.

    Raises:
        InputError: If it exceeds ``max_bytes``, or 200 times the size on disk plus 256 MiB.
    """
    stored = sum(file.path.stat().st_size for file in files)
    unpacked = sum(file.n_rows * file.row_bytes for file in files)
    if unpacked > (_FREE_BYTES + _MAX_RATIO * stored if max_bytes is None else max_bytes):
        raise InputError(
            f"{one_line(str(folder))} unpacks from {stored >> 10} KiB to {unpacked >> 20} MiB; "
            "to allow this, use --max-unpacked 100G"
        )


@dataclass(slots=True)
class StoredTable:
    """A table of a store, read in whole or in part.

    Raises:
        InputError: If its file cannot be read.
        TableError: If the file holds another table, or has another schema version or other columns.
    """

    table: Table
    path: Path
    owner: object = None
    """Object that owns the file and removes it when unused: a temporary folder."""
    n_sources: int | None = None
    """Number of sources, to check ``source`` of each row; None: the file is trusted."""
    segments: tuple[Segment, ...] = field(init=False)
    """Its segments, in their order."""
    _columns: pl.Schema = field(init=False)
    """Declared types of the columns that are not null in all rows."""

    def __post_init__(self) -> None:
        # polars may resolve a relative path against a former working directory.
        self.path = self.path.absolute()
        with _named(self.path):
            facts = pl.read_parquet_metadata(self.path)
            sorted_table = pl.scan_parquet(self.path, glob=False)
            given = sorted_table.collect_schema()
            n_rows = int(sorted_table.select(pl.len()).collect().item())
        name, version = facts.get(_TABLE_KEY), facts.get(_VERSION_KEY)
        shown = one_line(str(self.path))
        if (name, version) != (self.table.name, str(SCHEMA_VERSION)):
            raise TableError(
                f"{shown} holds table {name!r} of version {version}, not "
                f"{self.table.name!r} of version {SCHEMA_VERSION}; convert the trace again"
            )
        try:
            unused = set(json.loads(facts[_UNUSED_KEY]))
            segments = json.loads(facts[_SEGMENTS_KEY])
            self.segments = tuple(_segment(*fields) for fields in segments)
        except (KeyError, ValueError, TypeError, RecursionError):
            raise TableError(f"{shown} has no segments; convert the trace again") from None
        if self.n_rows != n_rows:
            raise TableError(f"{shown} has {n_rows} rows, but its segments list {self.n_rows}")
        needed = self.table.schema_of(given.to_frame())
        if any(given.get(name) != kind for name, kind in needed.items()):
            raise TableError(f"{shown} does not have the columns of {self.table.name!r}")
        self._columns = pl.Schema({n: dtype for n, dtype in needed.items() if n not in unused})

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(segment.n_rows for segment in self.segments)

    def scan(self, since_ns: int | None = None, until_ns: int | None = None) -> pl.LazyFrame:
        """Return the rows as a lazy query, which reads only the columns that it uses.

        Args:
            since_ns: Leave out segments that end before this time.
            until_ns: Leave out segments that begin after this time.  All rows of the other
                segments are included.
        """
        sorted_table = pl.scan_parquet(self.path, glob=False)
        rows = sorted_table.select(self._columns.names())
        parts: list[tuple[int, int]] = []
        at = 0
        for segment in self.segments:
            if segment.may_overlap(since_ns, until_ns):
                if parts and sum(parts[-1]) == at:
                    parts[-1] = (parts[-1][0], parts[-1][1] + segment.n_rows)
                else:
                    parts.append((at, segment.n_rows))
            at += segment.n_rows
        if parts != [(0, at)]:
            slices = [rows.slice(begin, n) for begin, n in parts]
            rows = pl.concat(slices) if slices else rows.head(0)
        return rows.cast(self._columns)

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        """Yield all rows in their order, a segment at a time.

        Args:
            columns: Columns to return; None: all.

        Raises:
            InputError: If they cannot be read.
        """
        at, rows = 0, self.scan()
        for segment in self.segments:
            part = rows.slice(at, segment.n_rows)
            # Untrusted rows are checked with all their columns.
            is_checked = self.n_sources is not None
            with _named(self.path):
                some = (part if columns is None or is_checked else part.select(columns)).collect()
            if is_checked:
                self._check(some)
            at += segment.n_rows
            yield some if columns is None else some.select(columns)

    def read(self) -> pl.DataFrame:
        """Return all rows.

        Raises:
            InputError: If they cannot be read.
        """
        with _named(self.path):
            rows = self.scan().collect()
        if self.n_sources is not None:
            self._check(rows)
        return rows

    def _check(self, rows: pl.DataFrame) -> None:
        """Check rows of an untrusted file.

        Raises:
            TableError: If they do not match the table's declaration, or have an unknown source.
        """
        self.table.check(rows)
        highest = rows["source"].max()
        if isinstance(highest, int) and highest >= (self.n_sources or 0):
            raise TableError(
                f"{one_line(str(self.path))} has rows of source {highest}, which its provenance "
                "does not list"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory, without the characters of its texts."""
        return sum(_WIDTHS.get(str(kind), _TEXT_BYTES) for kind in self._columns.dtypes())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise errors in reading a file as InputError with the file's name."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        shown = one_line(str(path))
        raise InputError(f"cannot read {shown}: {one_line(str(error), 60)}") from None


def _segment(*fields: int | None) -> Segment:
    """Return the segment with these fields from a footer; ValueError if they are invalid."""
    made = Segment(*fields)  # type: ignore[arg-type]
    others = (made.first_ns, made.last_ns, made.first_seq, made.last_seq)
    if type(made.n_rows) is not int or made.n_rows < 0:
        raise ValueError
    if not all(one is None or type(one) is int for one in others):
        raise ValueError
    return made


def _provenance(facts: dict[str, Any]) -> Provenance:
    """Parse the provenance of a store; ValueError, KeyError or TypeError if it is invalid."""
    sources = tuple(Source(**source) for source in facts["sources"])
    made = Provenance(**{**facts, "sources": sources, "notes": tuple(facts["notes"])})
    for source in sources:
        format_named(source.format)
        _check_types(source)
        if not all(type(n) is int for n in source.events.values()):
            raise TypeError
    _check_types(made)
    if not all(isinstance(note, str) for note in made.notes):
        raise TypeError
    return made


_TYPES: Final = {"str": str, "int": int, "Mapping[str, int]": dict}


def _check_types(made: Source | Provenance) -> None:
    """Raise TypeError if a field does not have its declared type, or an integer exceeds 64 bits."""
    for declared in dataclasses.fields(made):
        kind, _, optional = str(declared.type).partition(" | ")
        value = getattr(made, declared.name)
        if kind in _TYPES and not (value is None and optional):
            if type(value) is not _TYPES[kind]:
                raise TypeError(declared.name)
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                raise TypeError(declared.name)


def _sum_of(path: Path) -> int:
    """CRC-32 of a file; at 2.7 GB/s, against 0.1 GB/s at which its rows are read."""
    made = 0
    with path.open("rb") as file:
        while data := file.read(_SUM_BYTES):
            made = zlib.crc32(data, made)
    return made


def _check_sums(folder: Path, sums: object) -> None:
    """Check the CRC-32 of each table: polars may panic on, or crash by, damaged files.

    Raises:
        InputError: If a checksum differs, or a file is missing or is not a regular file.
    """
    for name in _TABLES:
        path = folder / f"{name}.parquet"
        shown = one_line(str(path))
        if not path.is_file():
            raise InputError(f"cannot read {shown}: it is missing or not a file")
        try:
            is_whole = isinstance(sums, dict) and _sum_of(path) == sums.get(name)
        except OSError as error:
            raise InputError(f"cannot read {shown}: {error.strerror}") from None
        if not is_whole:
            raise InputError(
                f"cannot read {shown}: it is damaged (wrong checksum); convert the trace again"
            )


def _cannot_write(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {one_line(str(folder))}: {error.strerror or error}")


def cache_folder() -> Path:
    """Return the user's cache folder for tdxtrace.

    Sources:
        XDG Base Directory Specification: XDG_CACHE_HOME, else ~/.cache.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".cache"
    return base / "tdxtrace"


def cache_path(paths: Sequence[str | Path], options: Sequence[object]) -> Path | None:
    """Return the cache folder for the conversion of these inputs with these options.

    A file is identified by its path, size, modification time, first and last bytes.

    Args:
        paths: The inputs.
        options: All other inputs of the conversion.

    Returns:
        The folder, which may not exist yet; None if an input is not a regular file.
    """
    digest = hashlib.sha256(repr((SCHEMA_VERSION, _SUMS_KEY, *options)).encode())
    for path in paths:
        identity = _identity(Path(path))
        if identity is None:
            return None
        digest.update(identity)
    return cache_folder() / digest.hexdigest()[:32]


def _identity(path: Path) -> bytes | None:
    try:
        if not path.is_file():
            return None
        facts = path.stat()
        with path.open("rb") as file:
            first = file.read(_BLOCK_BYTES)
            file.seek(max(0, facts.st_size - _BLOCK_BYTES))
            last = file.read(_BLOCK_BYTES)
    except OSError:
        return None
    name = f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode(
        "utf-8", "surrogateescape"
    )
    return hashlib.sha256(name + first + last).digest()
