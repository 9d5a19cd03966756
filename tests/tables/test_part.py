"""Parts of a trace by time range."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from support.recordings import SAMPLES, read

import tdxtrace
from tdxtrace.analysis.selection import Selection
from tdxtrace.errors import InputError
from tdxtrace.tables.part import write_part
from tdxtrace.tables.trace import Trace

_WHOLE = SAMPLES / "contended.txt"
_LINES = ("seamcalls", "vm_entries", "page_faults", "host_events", "losses")


def _part(folder: Path, **asked: str) -> tuple[Trace, Selection]:
    selected = Selection(**asked)  # type: ignore[arg-type]
    write_part(read(_WHOLE), folder / "part", *selected.times(read(_WHOLE)))
    return tdxtrace.read_trace(folder / "part"), selected


def test_a_part_has_the_rows_of_its_time_and_accounts_for_every_line(tmp_path: Path) -> None:
    part, selected = _part(tmp_path, since="+0.01", until="+0.02")
    part.check()
    whole = read(_WHOLE)
    assert part.seamcalls.equals(selected.filter(whole.seamcalls, whole))
    source = part.provenance.sources[0]
    counted = sum(int(part.tables()[name]["n_lines"].sum()) for name in _LINES)
    assert counted + source.n_headers == source.n_lines
    assert (source.last_ns or 0) - (source.first_ns or 0) == 10_000_000


def test_requests_that_the_edges_of_a_part_may_cut_are_cut(tmp_path: Path) -> None:
    part, _ = _part(tmp_path, since="+0.01", until="+0.02")
    found, all_found = tdxtrace.analyze(part), tdxtrace.analyze(read(_WHOLE))
    chains, whole = found.retry_chains, all_found.retry_chains
    sure = chains.filter(pl.col("outcome").is_in(["succeeded", "failed", "resolved_elsewhere"]))
    same = sure.join(whole, on=["first_seq", "last_seq", "n_attempts", "outcome"], how="semi")
    assert 0 < sure.height < whole.height
    assert sure.height == same.height
    # Nothing is a bug only because what was before is missing.
    more = found.broken_rules.join(all_found.broken_rules, on=["rule", "seq"], how="anti")
    assert found.broken_rules.height
    assert more.is_empty()


def test_a_part_from_the_start_did_not_start_midway(tmp_path: Path) -> None:
    part, _ = _part(tmp_path, until="+0.02")
    assert part.losses["kind"].cast(pl.String).to_list().count("started_midway") == 0


def test_a_time_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no event in this time range"):
        _part(tmp_path, since="+900")
    assert not list(tmp_path.iterdir())
