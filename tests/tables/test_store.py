"""Storage of a Trace as a folder of Parquet files, and the cache of such folders."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.recordings import SAMPLES, read
from support.stores import sealed

import tdxtrace
from tdxtrace.analysis.selection import Selection
from tdxtrace.errors import InputError, QueryError, TableError
from tdxtrace.ingest.read import ReadOptions, convert
from tdxtrace.ingest.read import read as read_inputs
from tdxtrace.tables import store
from tdxtrace.tables.catalog import SCHEMA_VERSION
from tdxtrace.tables.store import StoreWriter, cache_path, is_store
from tdxtrace.tables.trace import Trace

_PLAIN = ReadOptions()
_TRACES = ["lost.dat.xz", "qemu.perf.data.xz", "contended.txt"]


def _convert(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "run"
    convert([SAMPLES / name for name in names], folder, _PLAIN)
    return folder


@pytest.mark.parametrize("name", _TRACES)
def test_a_converted_trace_equals_the_original(name: str, tmp_path: Path) -> None:
    stored, trace = tdxtrace.read_trace(_convert(tmp_path, name)), read(SAMPLES / name)
    stored.check()
    for table, frame in trace.tables().items():
        assert_frame_equal(stored.tables()[table], frame)
    assert stored.provenance == trace.provenance


@pytest.fixture
def segmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trace, Trace]:
    """A trace as read, and from a store with a hundred rows in a segment."""
    trace = read(SAMPLES / "contended.txt")
    monkeypatch.setattr(store, "GROUP_ROWS", 100)
    writer = StoreWriter(tmp_path / "run")
    for name, rows in trace.tables().items():
        for part in rows.iter_slices(100):
            writer.add(name, part)
    writer.finish(trace.provenance, {})
    return trace, tdxtrace.read_trace(tmp_path / "run")


@pytest.mark.parametrize(
    "asked", [{"since": "+0.1", "until": "+0.12"}, {"until": "+0.01"}, {"since": "+9"}]
)
def test_only_segments_of_the_selected_time_are_read(
    segmented: tuple[Trace, Trace], asked: dict[str, str]
) -> None:
    trace, stored = segmented
    selected = Selection(**asked)  # type: ignore[arg-type]
    for name, rows in trace.tables().items():
        assert_frame_equal(selected.scan(name, stored).collect(), selected.filter(rows, trace))
    since_ns, until_ns = selected.times(trace)
    read_rows = stored.scan("seamcalls", since_ns, until_ns).collect()
    kept = selected.filter(trace.seamcalls, trace)
    assert kept.height <= read_rows.height <= kept.height + 200


def test_a_table_of_a_store_is_read_when_it_is_asked_for(
    segmented: tuple[Trace, Trace], tmp_path: Path
) -> None:
    trace, stored = segmented
    (tmp_path / "run" / "vm_entries.parquet").unlink()
    assert f"{trace.seamcalls.height:,}" in repr(stored)
    statement = "select leaf, count(*) n from seamcalls group by leaf order by leaf"
    assert tdxtrace.query(stored, statement).equals(tdxtrace.query(trace, statement))
    with pytest.raises(InputError, match=r"cannot read .*vm_entries.parquet"):
        stored.vm_entries.clear()


def test_an_unknown_table_is_refused_with_the_nearest() -> None:
    trace = read(SAMPLES / "contended.txt")
    with pytest.raises(QueryError, match="no table 'seamcall'; nearest: seamcalls"):
        trace.scan("seamcall")
    with pytest.raises(QueryError, match="no table 'chains'; nearest: retry_chains"):
        tdxtrace.analyze(trace).scan("chains")


def test_several_sources_share_a_folder(tmp_path: Path) -> None:
    trace = tdxtrace.read_trace(_convert(tmp_path, *_TRACES))
    assert trace.seamcalls["source"].unique().sort().to_list() == [0, 1, 2]
    assert [source.format for source in trace.provenance.sources] == [
        "trace.dat",
        "perf.data",
        "ftrace",
    ]


def test_levels_are_normalised_once_all_rows_are_known(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    convert([SAMPLES / "lost.dat.xz"], folder, ReadOptions(level_base=1))
    lowered = tdxtrace.read_trace(folder).seamcalls["level"]
    expected = tdxtrace.read_trace(SAMPLES / "lost.dat.xz", level_base=1).seamcalls["level"]
    assert lowered.to_list() == expected.to_list()
    assert lowered.to_list() != read(SAMPLES / "lost.dat.xz").seamcalls["level"].to_list()


def test_files_have_table_name_and_version_in_their_metadata(tmp_path: Path) -> None:
    facts = pl.read_parquet_metadata(_convert(tmp_path, "lost.dat.xz") / "seamcalls.parquet")
    assert facts["tdxtrace.table"] == "seamcalls"
    assert facts["tdxtrace.schema_version"] == str(SCHEMA_VERSION)


def test_tables_of_another_version_are_rejected(tmp_path: Path) -> None:
    folder = _convert(tmp_path, "lost.dat.xz")
    facts = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps({**facts, "schema_version": 99}))
    message = f"tables of version 99, this tdxtrace reads version {SCHEMA_VERSION}; convert"
    with pytest.raises(TableError, match=message):
        tdxtrace.read_trace(folder)


def test_a_file_of_another_table_is_rejected(tmp_path: Path) -> None:
    folder = _convert(tmp_path, "lost.dat.xz")
    (folder / "seamcalls.parquet").write_bytes((folder / "threads.parquet").read_bytes())
    sealed(folder)
    with pytest.raises(TableError, match="holds table 'threads'"):
        tdxtrace.read_trace(folder)


@pytest.mark.parametrize("name", ["seamcalls.parquet", "provenance.json"])
def test_damaged_folders_are_named(name: str, tmp_path: Path) -> None:
    folder = _convert(tmp_path, "lost.dat.xz")
    (folder / name).write_bytes(b"{")
    with pytest.raises(InputError, match=f"cannot read .*{folder.name}"):
        tdxtrace.read_trace(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store to make copies of."""
    return _convert(tmp_path_factory.mktemp("kept"), "contended.txt")


@pytest.fixture
def copied(kept: Path, tmp_path: Path) -> Path:
    """A store that may be changed."""
    return Path(shutil.copytree(kept, tmp_path / "run"))


STRANGE = {
    "list": [],
    "deep": "[" * 100_000,
    "sources": {"sources": 5},
    "source": {"sources": [5]},
    "path": {"path": 5},
    "time": {"first_ns": 1 << 70},
    "events": {"events": [1]},
    "count": {"events": {"x": "y"}},
    "notes": {"notes": 7},
    "note": {"notes": [7]},
    "more": {"unknown": 1},
}


@pytest.mark.parametrize("kind", STRANGE)
def test_invalid_provenance_is_reported_as_damage(kind: str, copied: Path) -> None:
    folder, change = copied, STRANGE[kind]
    facts = json.loads((folder / "provenance.json").read_text())
    result = facts["provenance"]
    source = result["sources"][0]
    for name, value in change.items() if isinstance(change, dict) else ():
        (source if name in source or name == "unknown" else result)[name] = value
    text = change if isinstance(change, str) else json.dumps(change or [1])
    (folder / "provenance.json").write_text(json.dumps(facts) if isinstance(change, dict) else text)
    with pytest.raises(InputError, match=r"its provenance.json is damaged"):
        tdxtrace.read_trace(folder)


def _rewritten(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], **facts: str) -> None:
    """Write a table of a store anew, with its own footer."""
    kept = {k: v for k, v in pl.read_parquet_metadata(path).items() if "tdxtrace" in k} | facts
    change(pl.read_parquet(path)).write_parquet(path, metadata=kept)
    sealed(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.head(5), "has 5 rows, but its segments"),
        (lambda rows: rows.with_columns(seq=pl.lit(1, pl.UInt64)), "'key is unique"),
        (lambda rows: rows.with_columns(leaf=pl.lit("x")), "does not have the columns"),
        (lambda rows: rows.with_columns(source=pl.lit(7, pl.UInt16)), "rows of source 7"),
        (lambda rows: rows.with_columns(seq=pl.lit(None, pl.UInt64)), "seq is never null"),
        (lambda rows: rows.with_columns(start_ns=pl.col("end_ns") + 1), "end is not before start"),
    ],
)
def test_stored_rows_that_no_trace_has_are_refused(
    change: Callable[[pl.DataFrame], pl.DataFrame], message: str, copied: Path
) -> None:
    _rewritten(copied / "seamcalls.parquet", change)
    with pytest.raises(TableError, match=message):
        _ = tdxtrace.read_trace(copied).seamcalls


def test_a_store_that_unpacks_to_far_more_than_traces_do_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_FREE_BYTES", 0)
    monkeypatch.setattr(store, "_MAX_RATIO", 1)
    with pytest.raises(InputError, match="--max-unpacked"):
        tdxtrace.read_trace(copied)
    assert read_inputs([copied], ReadOptions(unpacked=1 << 30)).seamcalls.height > 1000


def test_a_table_that_is_a_pipe_is_refused_at_once(copied: Path) -> None:
    (copied / "losses.parquet").unlink()
    os.mkfifo(copied / "losses.parquet")
    with pytest.raises(InputError, match=r"losses.parquet: it is missing or not a file"):
        tdxtrace.read_trace(copied)


@pytest.mark.parametrize("name", ["threads", "seamcalls"])
def test_a_table_damaged_anywhere_is_named_and_not_read(name: str, copied: Path) -> None:
    path, luck = copied / f"{name}.parquet", random.Random(1)
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        data[luck.randrange(len(data))] ^= 1 << luck.randrange(8)
        path.write_bytes(data if luck.randrange(4) else data[: luck.randrange(len(data))])
        with pytest.raises(InputError, match=f"{name}.parquet: it is damaged"):
            tdxtrace.read_trace(copied)


def test_crafted_tables_are_read_or_refused(copied: Path) -> None:
    luck = random.Random(1)
    path = copied / "threads.parquet"
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        data[luck.randrange(len(data))] ^= 1 << luck.randrange(8)
        path.write_bytes(data)
        sealed(copied)
        with suppress(InputError, TableError):
            _ = tdxtrace.read_trace(copied).threads


def test_a_failed_conversion_leaves_no_folder(tmp_path: Path) -> None:
    broken = tmp_path / "broken.dat"
    broken.write_bytes((SAMPLES / "tracecmd-v7.dat").read_bytes()[:64])
    with pytest.raises(tdxtrace.TdxtraceError):
        convert([broken], tmp_path / "run", _PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.dat"]


def test_a_folder_that_is_no_store_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(InputError, match="is not a converted trace; name another folder"):
        StoreWriter(tmp_path / "mine", force=True)
    folder = _convert(tmp_path, "lost.dat.xz")
    with pytest.raises(InputError, match="exists; use --force"):
        StoreWriter(folder, force=False)
    StoreWriter(folder, force=True).discard()
    assert is_store(folder)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*run"):
        StoreWriter(tmp_path / "file" / "run")


def test_a_store_cannot_be_read_together_with_other_inputs(tmp_path: Path) -> None:
    folder = _convert(tmp_path, "lost.dat.xz")
    with pytest.raises(InputError, match="read it without other inputs"):
        tdxtrace.read_trace(folder, SAMPLES / "contended.txt")


def test_the_cache_key_depends_on_content_and_options(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("one")
    first = cache_path([path], ("v1",))
    assert first == cache_path([path], ("v1",))
    assert first != cache_path([path], ("v2",))
    path.write_text("two")
    assert first != cache_path([path], ("v1",))
    assert cache_path(["-"], ()) is None


@pytest.mark.parametrize("name", ["run*", "run[1]", "run?", "**", "run{1}", "~", "a b", "run%31"])
def test_the_name_of_a_store_is_not_taken_as_a_glob(name: str, tmp_path: Path) -> None:
    convert([SAMPLES / "contended.txt"], tmp_path / "run1", _PLAIN)
    convert([SAMPLES / "lost.dat.xz"], tmp_path / name, _PLAIN)
    stored, trace = tdxtrace.read_trace(tmp_path / name), read(SAMPLES / "lost.dat.xz")
    for table, frame in trace.tables().items():
        assert_frame_equal(stored.tables()[table], frame)
