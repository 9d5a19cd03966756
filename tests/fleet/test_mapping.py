"""Mapping of traces to facts: output, resumption, failures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.fleet import (
    HereEngine,
    counted_tasks,
    die_before_answer,
    die_first,
    die_of_poison,
    digest_of,
    facts_at,
    mapped,
)

import tdxtrace
from tdxtrace.analysis.attempts import curves_of
from tdxtrace.errors import InputError, QueryError
from tdxtrace.fleet.engine import LocalEngine, Run
from tdxtrace.fleet.facts import FILES
from tdxtrace.fleet.limits import host_counts
from tdxtrace.fleet.mapping import map_traces
from tdxtrace.fleet.merge import count_fleet, recorded_of, subtracted
from tdxtrace.fleet.storage import open_storage, trace_inputs
from tdxtrace.recommend.limits import limits_of


@pytest.fixture(scope="session")
def facts(traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The facts of the four hosts."""
    place = tmp_path_factory.mktemp("fleet") / "facts"
    assert mapped(place, traces).n_done == 4
    return place


def test_facts_give_what_one_process_gives_that_reads_all(traces: Path, facts: Path) -> None:
    fleet = facts_at(facts)
    order = [str(next(traces.glob(f"{host}.*"))) for host in fleet.parts["host"]]
    # Each trace tells the number of a 4K level itself, which a common reading would take as one.
    findings = tdxtrace.analyze(tdxtrace.read_trace(*order))
    counts = count_fleet(fleet, with_tds=True)
    curves = curves_of(counts.whole)
    recorded = recorded_of(fleet, counts.leaves)
    by_leaf = pl.col("by") != "td"
    assert_frame_equal(curves.filter(by_leaf), findings.attempts.filter(by_leaf), check_exact=True)
    names = ["leaf", "unit", "within", "done_ratio", "n_effective"]
    tds = [rows.filter(~by_leaf).select("source", *names) for rows in (curves, findings.attempts)]
    order_of = ["source", *names]
    assert_frame_equal(tds[0].sort(order_of), tds[1].sort(order_of), check_exact=True)
    # The pace is told to a cell of a histogram, and TDs have numbers in place of addresses.
    rough = ["pace_ns", "worst_td"]
    ours = limits_of(curves, recorded)
    assert_frame_equal(ours.drop(rough), findings.limits.drop(rough), check_exact=True)
    assert_frame_equal(
        ours.select("pace_ns"), findings.limits.select("pace_ns"), rel_tol=0.012, abs_tol=1
    )
    key = ["source", "leaf", "resource", "cause"]
    assert_frame_equal(
        fleet.table("shares").sort(key), findings.cause_shares.sort(key), check_exact=True
    )
    vms = ["source", "tgid", "n_requests"]
    assert_frame_equal(
        fleet.table("vms").drop("td_id").sort(vms),
        findings.vm_stats.drop("td_id").sort(vms),
        check_exact=True,
    )


def test_a_host_is_left_out_by_subtraction(facts: Path) -> None:
    fleet = facts_at(facts)
    rest = subtracted(count_fleet(fleet).whole, host_counts(fleet, "host1"))
    others = count_fleet(fleet.only(fleet.parts["host"] != "host1")).whole
    assert_frame_equal(curves_of(rest), curves_of(others), check_exact=True)


def test_facts_hold_no_names_and_addresses(traces: Path, facts: Path) -> None:
    trace = tdxtrace.read_trace(traces / "host1.perf.txt.xz")
    addresses = set(trace.seamcalls["td_id"].drop_nulls())
    names = [name.encode() for name in trace.threads["comm"].unique() if len(name) > 4]
    assert names
    assert addresses
    fleet = facts_at(facts)
    for name in FILES:
        for column in fleet.table(name):
            if column.dtype == pl.UInt64:
                assert not addresses & set(column.drop_nulls())
    content = b"".join(digest_of(facts).values())
    assert not [name for name in names if name in content]


def test_existing_parts_are_not_counted_again(traces: Path, facts: Path) -> None:
    before = digest_of(facts)
    again = mapped(facts, traces)
    assert (again.n_there, again.n_done) == (4, 0)
    assert digest_of(facts) == before


def test_a_killed_driver_resumes(traces: Path, facts: Path, tmp_path: Path) -> None:
    inputs = trace_inputs([str(traces)])
    place = open_storage(str(tmp_path / "facts"))
    with pytest.raises(KeyboardInterrupt):
        map_traces(inputs, place, HereEngine(most=2))
    second = map_traces(inputs, place, HereEngine())
    assert (second.n_there, second.n_done) == (2, 2)
    assert digest_of(tmp_path / "facts") == digest_of(facts)


def test_a_part_without_provenance_is_ignored_and_counted_again(
    traces: Path, facts: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "facts"
    shutil.copytree(facts, copy)
    next(copy.rglob("provenance.json")).unlink()
    assert counted_tasks(copy).len() == 3
    assert mapped(copy, traces).n_done == 1
    assert digest_of(copy) == digest_of(facts)


def test_traces_that_cannot_be_read_are_rows_of_failures(traces: Path, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    whole = (traces / "host0.dat").read_bytes()
    (folder / "good.dat").write_bytes(whole)
    (folder / "short.dat").write_bytes(whole[:9000])
    (folder / "empty.dat").write_bytes(b"")
    (folder / "poisoned.txt").write_bytes(b"\x1b]0;evil\x07 no trace\n" * 50)
    done = mapped(tmp_path / "facts", folder)
    assert done.n_done + done.n_failed == 4
    failures = facts_at(tmp_path / "facts").failures
    names = [Path(trace).name for trace in failures["trace"].sort()]
    assert names[0] == "empty.dat"
    assert "poisoned.txt" in names
    assert "\x1b" not in "".join(failures["reason"])
    # What is mended is no failure any more.
    (folder / "empty.dat").write_bytes((traces / "host1.perf.txt.xz").read_bytes())
    mapped(tmp_path / "facts", folder)
    left = facts_at(tmp_path / "facts").failures["trace"]
    assert [Path(trace).name for trace in left.sort()] == names[0:1] + names[1:]


def test_a_copy_of_a_trace_counts_once(traces: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(traces / "host0.dat", tmp_path / folder / f"{folder}.dat")
    mapped(tmp_path / "facts", tmp_path / "a", tmp_path / "b")
    fleet = facts_at(tmp_path / "facts")
    assert (fleet.parts.height, fleet.n_copies) == (1, 1)
    assert mapped(tmp_path / "facts", tmp_path / "a", tmp_path / "b").n_done == 0


def test_the_path_of_a_trace_gives_its_identity(traces: Path, tmp_path: Path) -> None:
    place = tmp_path / "traces" / "rack 1" / "2026-11-30"
    place.mkdir(parents=True)
    shutil.copy(traces / "host0.dat", place / "a-1.5.34.dat")
    mapped(tmp_path / "facts", tmp_path / "traces", identify="{host}/{date}/*-{module}.dat")
    (row,) = facts_at(tmp_path / "facts").parts.to_dicts()
    named = {name: row[name] for name in ("host", "date", "module", "generation")}
    assert named == {
        "host": "rack 1",
        "date": "2026-11-30",
        "module": "1.5.34",
        "generation": "C",
    }
    with pytest.raises(QueryError, match="does not have this form"):
        mapped(tmp_path / "other", tmp_path / "traces", identify="{host}/{date}/x-*")
    with pytest.raises(QueryError, match="no field 'hots'"):
        mapped(tmp_path / "other", tmp_path / "traces", identify="{hots}")


def test_names_of_hosts_are_hashed_with_a_key(traces: Path, tmp_path: Path) -> None:
    mapped(tmp_path / "facts", traces / "host0.dat", key=b"0123456789abcdef")
    other = mapped(tmp_path / "other", traces / "host0.dat", key=b"fedcba9876543210")
    assert other.n_done == 1
    hosts = [facts_at(tmp_path / name).parts["host"].item() for name in ("facts", "other")]
    assert hosts[0] != hosts[1]
    written = (
        b"".join(digest_of(tmp_path / "facts").values())
        + "".join(digest_of(tmp_path / "facts")).encode()
    )
    assert b"host0" not in written


def test_missing_or_damaged_facts_are_reported(facts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no facts of format"):
        facts_at(tmp_path)
    copy = tmp_path / "facts"
    shutil.copytree(facts, copy)
    next(copy.rglob("counts.parquet")).write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"counts\.parquet is damaged"):
        count_fleet(facts_at(copy))


def test_a_condition_selects_traces(facts: Path) -> None:
    fleet = facts_at(facts)
    one = fleet.where("host in ('host1', 'host3') and n_bytes > 0")
    assert one.parts["host"].to_list() == ["host1", "host3"]
    assert fleet.where(None) is fleet
    assert one.digest != fleet.digest
    with pytest.raises(QueryError, match="no column 'hosts'; nearest: host"):
        fleet.where("hosts = 'x'")
    with pytest.raises(QueryError, match="no trace in the facts"):
        fleet.where("host = 'x'")
    with pytest.raises(QueryError, match="can read only the tables"):
        fleet.where("host in (select * from read_csv('/etc/passwd'))")


@pytest.mark.parametrize("run", [die_first, die_before_answer])
def test_the_task_of_a_dead_worker_is_retried(
    run: Run, traces: Path, facts: Path, tmp_path: Path
) -> None:
    engine = LocalEngine(2)
    # Each death costs a new interpreter; two are as good as four.
    inputs = trace_inputs([str(traces / "host0.dat"), str(traces / "host1.perf.txt.xz")])
    try:
        done = map_traces(inputs, open_storage(str(tmp_path / "facts")), engine, run=run)
    finally:
        engine.close()
    assert (done.n_done + done.n_there, done.n_failed) == (2, 0)
    assert counted_tasks(tmp_path / "facts").len() == 2
    assert digest_of(tmp_path / "facts").items() <= digest_of(facts).items()


def test_a_trace_that_kills_workers_does_not_fail_other_traces(
    traces: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    shutil.copy(traces / "host0.dat", folder / "a-poison.dat")
    shutil.copy(traces / "host1.perf.txt.xz", folder / "b.txt.xz")
    engine = LocalEngine(2)
    try:
        done = map_traces(
            trace_inputs([str(folder)]),
            open_storage(str(tmp_path / "facts")),
            engine,
            run=die_of_poison,
        )
    finally:
        engine.close()
    assert (done.n_done, done.n_failed) == (1, 1)
    (failure,) = (tmp_path / "facts").rglob("failures/*.json")
    row = json.loads(failure.read_text())
    assert (row["n_tries"], row["reason"]) == (3, "its worker died 3 times (memory?)")
