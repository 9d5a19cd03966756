"""Commands that print one table: events, retry-chains, zero-steps."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from support.contracts import breaches
from support.running import SAMPLES, answered, refused, tdxtrace
from support.texts import ONE_CALL, line

from tdxtrace.cli import query_options
from tdxtrace.cli.options import ABOUT_TABLES
from tdxtrace.cli.table_commands import COMMANDS
from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.tables.enums import EventTable
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import (
    FINDING_TABLES,
    RETRY_CHAINS,
    STEP_THRESHOLDS,
    ZERO_STEP_CAUSES,
    ZERO_STEPS,
)
from tdxtrace.tables.schema import Table
from tdxtrace.tables.verdicts import VERDICT_TABLES

TABLES = {
    "retry-chains": RETRY_CHAINS,
    "zero-steps": ZERO_STEPS,
    "zero-step-causes": ZERO_STEP_CAUSES,
    "step-thresholds": STEP_THRESHOLDS,
    **{table.name.replace("_", "-"): table for table in VERDICT_TABLES},
    **{f"events {table.name}": table for table in EVENT_TABLES},
}


_ON_STEPS = ("zero-steps", "zero-step-causes", "step-thresholds", "verdicts")


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and the table it prints."""

    words: tuple[str | Path, ...]
    table: Table
    rows: pl.DataFrame


@pytest.fixture(params=TABLES, scope="module")
def command(request: pytest.FixtureRequest, chains: Path, steps: Path) -> Command:
    name: str = request.param
    path = steps if name in _ON_STEPS else chains
    trace = read_trace(path)
    verb, _, table = name.partition(" ")
    if table:
        return Command((verb, path, "--table", table), TABLES[name], trace.tables()[table])
    rows = getattr(analyze(trace), TABLES[name].name)
    return Command((verb, path), TABLES[name], rows)


def test_parquet_is_the_table_itself(command: Command) -> None:
    printed = pl.read_parquet(answered(*command.words, "--format", "parquet").stdout)
    assert printed.equals(command.rows)


@pytest.mark.parametrize("words", [("events",), ("retry-chains",), ("verdicts",)])
def test_a_file_of_parquet_has_what_is_printed(
    words: tuple[str, ...], chains: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.parquet"
    assert answered(*words, chains, "--format", "parquet", "--output", path).stdout == b""
    assert path.read_bytes() == answered(*words, chains, "--format", "parquet").stdout


def test_csv_has_a_header_and_every_row(command: Command) -> None:
    done = answered(*command.words, "--format", "csv")
    assert done.lines[0].split(",") == list(command.table.schema)
    rows = pl.read_csv(io.BytesIO(done.stdout), infer_schema_length=None)
    assert rows.height == command.rows.height


def test_json_is_an_array_of_rows_that_keep_the_contract(command: Command) -> None:
    data = answered(*command.words, "--format", "json").stdout
    assert data.endswith(b"\n")
    rows = json.loads(data)
    assert len(rows) == command.rows.height
    assert breaches(command.table, rows) == []


def test_the_screen_shows_some_rows_and_says_how_many_more(chains: Path) -> None:
    done = answered("events", chains, "--limit", "5")
    assert len(done.lines) <= 8
    n = read_trace(chains).seamcalls.height
    assert f"{n - 5} more rows (-n 0: all)" in done.text
    piped = answered("events", chains)
    assert len(piped.lines) == 1 + n
    assert f"{n - 40} more rows (-n 0: all)" in answered("events", chains, columns=200).text


def test_the_limit_is_for_every_form(chains: Path) -> None:
    n = read_trace(chains).seamcalls.height
    for words, height in ((("-n", "5"), 5), (("-n", "0"), n), ((), n)):
        data = answered("events", chains, *words, "--format", "csv").stdout
        assert pl.read_csv(io.BytesIO(data)).height == height


def test_retry_chains_are_the_retried_ones_with_most_attempts_first(chains: Path) -> None:
    rows = analyze(read_trace(chains)).retry_chains
    done = answered("retry-chains", chains, "--limit", "0")
    end = done.lines[0].index("n_attempts") + len("n_attempts")
    attempts = [int(row[:end].split()[-1]) for row in done.lines[1:]]
    retried = rows.filter(pl.col("n_busy") > 0)["n_attempts"]
    assert attempts == sorted(retried, reverse=True)
    whole = answered("retry-chains", chains, "--limit", "0", "--all")
    assert len(whole.lines) - 1 == rows.height


@pytest.mark.parametrize("outcome", ["succeeded", "cut"])
def test_chains_can_be_chosen_by_outcome(outcome: str, chains: Path) -> None:
    data = answered("retry-chains", chains, "--outcome", outcome, "--format", "csv").stdout
    rows = analyze(read_trace(chains)).retry_chains.filter(pl.col("outcome") == outcome)
    assert pl.read_csv(io.BytesIO(data))["outcome"].to_list() == [outcome] * rows.height
    assert rows.height > 0


@pytest.mark.parametrize("words", [("retry-chains",), ("events",)])
@pytest.mark.parametrize(
    "filters", [("--leaf", "TDH.VP.ENTER"), ("--since", "+0.002"), ("--until", "+0.002")]
)
def test_every_command_takes_the_same_filters(
    words: tuple[str, ...], filters: tuple[str, ...], chains: Path
) -> None:
    whole = pl.read_parquet(answered(*words, chains, "--format", "parquet").stdout)
    kept = pl.read_parquet(answered(*words, chains, *filters, "--format", "parquet").stdout)
    assert 0 < kept.height < whole.height
    assert kept.join(whole, on=kept.columns, how="anti", nulls_equal=True).is_empty()


def test_a_vm_can_be_chosen_for_events(chains: Path) -> None:
    (td,) = analyze(read_trace(chains)).retry_chains["td_id"].drop_nulls().unique()
    data = answered("events", chains, "--vm", hex(td), "--format", "parquet").stdout
    assert pl.read_parquet(data)["td_id"].drop_nulls().unique().to_list() == [td]
    assert "no VM 0x1" in refused(2, "events", chains, "--vm", "0x1")


@pytest.mark.parametrize("table", ["threads", "losses", "host_events"])
def test_filters_of_time_do_no_harm_where_there_is_none(table: str) -> None:
    answered("events", SAMPLES / "lost.txt.xz", "--table", table, "--since", "+0.01")


def test_nothing_found_says_so(chains: Path) -> None:
    assert "no rows" in answered("zero-steps", chains).text
    assert "no rows" in answered("events", chains, "--table", "page_faults").text
    assert answered("zero-steps", chains, "--format", "json").stdout == b"[]\n"


# Files.


@pytest.mark.parametrize("form", ["table", "csv", "json", "parquet"])
def test_a_file_is_not_overwritten_unless_asked_for(form: str, tmp_path: Path, steps: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    words = ("zero-steps", steps, "--format", form, "--output", path)
    assert "--force" in refused(1, *words)
    assert path.read_text() == "mine"
    assert answered(*words, "--force").stdout == b""
    assert path.read_bytes() != b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_gets_what_the_screen_would_show(tmp_path: Path, steps: Path) -> None:
    path = tmp_path / "out.txt"
    answered("zero-steps", steps, "--output", path)
    assert path.read_text() == answered("zero-steps", steps).text


def test_files_obey_the_umask(tmp_path: Path, steps: Path) -> None:
    path = tmp_path / "out.csv"
    before = os.umask(0o027)
    try:
        answered("zero-steps", steps, "--format", "csv", "--output", path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_in_no_folder_is_told(tmp_path: Path, steps: Path) -> None:
    words = ("zero-steps", steps, "--format", "csv", "--output", tmp_path / "no" / "out")
    assert "cannot write" in refused(1, *words)


def test_a_folder_is_not_overwritten_and_nothing_is_left_behind(
    tmp_path: Path, steps: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept").write_text("mine")
    words = ("zero-steps", steps, "--format", "csv", "--output", folder, "--force")
    assert "cannot write" in refused(1, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert [p.name for p in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "words",
    [
        ("events", "trace.txt", "--table", "nothing"),
        ("events", "trace.txt", "--format", "xml"),
        ("events", "trace.txt", "--limit", "-1"),
        ("events",),
        ("retry-chains", "trace.txt", "--outcome", "fine"),
    ],
)
def test_words_that_do_not_exist_are_exit_status_2(words: tuple[str, ...]) -> None:
    done = tdxtrace(*words)
    assert done.status == 2
    assert "Traceback" not in done.stderr


def test_tables_are_read_from_standard_input_too() -> None:
    data = answered("events", "-", "--format", "json", stdin=ONE_CALL.encode()).stdout
    assert [row["leaf"] for row in json.loads(data)] == [6]


def test_raw_words_are_shown_in_hex_and_names_by_name(chains: Path) -> None:
    text = answered("events", chains, "--limit", "9", columns=200).text
    assert "exit EPT_VIOLATION" in text
    assert "OPERAND_BUSY SEPT tree" in text
    assert "0x100000000" in text
    kvm = line("1.000001", "kvm_exit: vcpu 0 reason 0xffff FAILED_VMENTRY 0x7fff0000 rip 0x0")
    result = answered("events", "-", "--table", "vm_entries", stdin=kvm.encode()).text
    assert "FAILED_VMENTRY (-1)" in result


def test_event_tables_can_be_chosen_as_the_catalog_has_them() -> None:
    assert list(EventTable) == [table.name for table in EVENT_TABLES]


def test_every_finding_table_has_a_command() -> None:
    by_options = {
        "busy-causes": set(ABOUT_TABLES.values()),
        "attempts": {"attempts", "latencies"},
        "policies": {"policies"},
        "recommend": {"limits", "limit_statements"},
        "host-check": {"host_checks"},
        # Parts of what analyze and attempts print; whole with query and analyze --output.
        "query": {"leaf_stats", "vm_stats", "vcpu_stats", "busy_answers"},
    }
    own = {name.replace("-", "_") for name in COMMANDS} - {"events"}
    others = set().union(*by_options.values())
    assert own.isdisjoint(others)
    assert own | others == {table.name for table in FINDING_TABLES}


def test_a_long_table_in_a_pipe_is_cut_and_says_so(
    chains: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_options, "_IN_PIPE", 50)
    monkeypatch.setattr(query_options, "_BLOCK_ROWS", 20)
    n = read_trace(chains).seamcalls.height
    cut, whole = answered("events", chains).lines, answered("events", chains, "-n", "0").lines
    assert n > 200
    assert cut[-1] == f"{n - 50} more rows (-n 0: all)"
    # Three blocks of rows, each below its title.
    assert len(cut) == 50 + 3 + 1
    assert len(whole) == n + math.ceil(n / 20)
