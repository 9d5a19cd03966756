"""``tdxtrace analyze log``: one screen, files, JSON, filters, thresholds."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from support.contracts import breaches
from support.running import ESC, SAMPLE_FILES, SAMPLES, answered, refused, tdxtrace
from support.story import STATUS
from support.texts import ONE_CALL, aug, aug_ret, line

from tdxtrace.cli import screen
from tdxtrace.cli.options import Color
from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.report import findings_text
from tdxtrace.tables.catalog import SCHEMA_VERSION
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import FINDING_TABLES, RETRY_CHAINS

CONTENDED = SAMPLES / "contended.txt"
ZEROSTEP = SAMPLES / "zerostep.txt"
LOST = SAMPLES / "lost.txt.xz"


def found(path: Path) -> dict[str, Any]:
    """The findings on a trace, as the library gives them."""
    return analyze(read_trace(path)).tables()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two TDs of two processes; one page is retried, and one vCPU kept out."""
    lines = []
    for tid, td, busy in ((7, 0x7D001, 3), (8, 0x7D002, 0)):
        place: dict[str, Any] = {"task": f"CPU {tid}/KVM-{tid}", "cpu": tid}
        for n in range(busy + 1):
            status = STATUS["B"] if n < busy else 0
            lines += [
                aug(f"1.{n:06}", f"td={td:#x} gpa={tid << 12:#x} level=0", **place),
                aug_ret(f"1.{n:06}", f"ret={status:#x}", **place),
            ]
        for n, ret in enumerate([0x30, STATUS["B"], 0x4D] if busy else [0x4D]):
            lines += [
                line(f"2.{n:06}", f"tdh_vp_enter: (0x1) vp={tid:#x}", **place),
                line(f"2.{n:06}", f"tdh_vp_enter_ret: (0x1 <- 0x2) ret={ret:#x}", **place),
            ]
    path = tmp_path / "two.txt"
    path.write_text("".join(lines))
    return path


# The screen.


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=lambda path: path.name)
def test_a_sample_fits_one_screen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 columns; ``test_screens.py`` has those of 100."""
    monkeypatch.chdir(SAMPLES.parent)
    done = answered("analyze", "log", path.relative_to(SAMPLES.parent), columns=80)
    assert 10 < len(done.lines) <= 24
    assert max(map(len, done.lines)) <= 80
    assert ESC not in done.text


def test_the_words_analyze_log_and_analyze_mean_the_same(chains: Path) -> None:
    assert answered("analyze", "log", chains) == answered("analyze", chains)


def test_the_screen_opens_with_the_problems_and_how_to_look_closer() -> None:
    lines = answered("analyze", CONTENDED).lines
    assert lines[0] == "2 problems: 2 BUG; 3 kinds of findings undecided"
    assert lines[1].startswith(
        "  BUG (host kernel) mmu_lock_excludes: 80 busy answers of MEM.PAGE.AUG, MEM.RANGE.BLOCK"
    )
    assert lines[3].startswith("limit: PAGE.AUG at most ")
    command = lines[1].partition("tdxtrace ")[2].split()
    assert "seq 935: TDH.MEM.PAGE.AUG" in answered(*command).text


def test_a_trace_without_a_problem_says_so_first(trace: Path) -> None:
    assert answered("analyze", trace).lines[0].startswith("no problems found in 5 requests")


def test_large_traces_are_not_judged_unasked(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_text, "MAX_JUDGED_ROWS", 7)
    first = answered("analyze", trace).lines[0]
    assert first == f"problems: not checked for 9 SEAMCALLs: tdxtrace verdicts {trace}"


def test_brief_has_no_tables(trace: Path) -> None:
    done = answered("analyze", trace, "--brief")
    assert "no problems found" in done.lines[0]
    assert "worst chains" not in done.text
    assert "events_lost" in done.text or "LOST" in done.text


def test_rows_may_be_limited_and_the_screen_says_so() -> None:
    done = answered("analyze", ZEROSTEP, "-n", "1")
    assert "more: 6 leaves, 7 episodes, 59 retried chains (-n 0: all)" in done.text
    assert "more:" not in answered("analyze", ZEROSTEP, "-n", "0").text


def test_the_screen_says_what_was_read_lost_and_found() -> None:
    text = answered("analyze", "log", CONTENDED).text
    assert "contended.txt: ftrace, 4,034 lines" in text
    assert "2,011 SEAMCALLs, 503 requests, 129 retried, 1 TD, 8 vCPUs" in text
    assert "No lost events reported" in text
    row = next(line for line in text.splitlines() if line.startswith("MEM.PAGE.AUG"))
    assert row.split()[1:4] == ["185", "65", "35%"]
    assert "/64" in row
    assert row.split()[-5:] == ["159", "21", "3", "2", "0"]
    assert "zero-step: none found" in text
    assert "worst chains" in text
    assert "next: tdxtrace retry-chains" in text


def test_one_address_in_two_files_is_two_tds() -> None:
    path = SAMPLES / "contended.txt"
    text = answered("analyze", "log", path, path, columns=120).text
    assert "4,022 SEAMCALLs, 1,006 requests, 258 retried, 2 TDs, 16 vCPUs" in text


def test_the_screen_shows_zero_step_episodes_per_vcpu() -> None:
    text = answered("analyze", "log", ZEROSTEP).text
    assert "8 zero-step episodes" in text
    row = next(line for line in text.splitlines() if line.startswith("fake_tdx-13749"))
    assert "165" in row
    assert "busy_sept (proof)" in row
    assert "next: tdxtrace zero-steps" in text


def test_the_screen_says_what_was_lost_and_what_to_do() -> None:
    text = answered("analyze", "log", LOST).text
    assert "LOST: lost_events 1,864; 44 chains cut by it" in text
    assert "next: lost events: use a larger buffer" in text


def test_the_screen_counts_records_where_there_are_no_lines() -> None:
    text = answered("analyze", "log", SAMPLES / "tracecmd-v7.dat").text
    assert "tracecmd-v7.dat: trace.dat, 1,224 records" in text
    assert " record outcome" in text


def test_a_higher_terminal_shows_more() -> None:
    low = answered("analyze", "log", ZEROSTEP, columns=80, height=24)
    high = answered("analyze", "log", ZEROSTEP, columns=80, height=60)
    assert len(low.lines) < len(high.lines) <= 60
    assert "PHYMEM.PAGE.WBINVD" in high.text


def test_next_steps_are_commands_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES.parent)
    text = answered("analyze", "log", "sample_traces/zerostep.txt", columns=200).text
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("next: tdxtrace")]
    assert commands
    for words in commands:
        answered(*words)


def test_a_capture_of_kvms_own_events_says_what_it_cannot_tell(tmp_path: Path) -> None:
    path = tmp_path / "stock.txt"
    steps = [*["EPT_VIOLATION"] * 7, "0xffff FAILED_VMENTRY 0x7fff0000", "TDCALL"]
    events = ["kvm_exit: vcpu 0 reason TDCALL rip 0x0"]
    for reason in steps:
        events += ["kvm_entry: vcpu 0, rip 0x0", f"kvm_exit: vcpu 0 reason {reason} rip 0x0"]
    path.write_text("".join(line(f"1.{10 * n:06}", event) for n, event in enumerate(events)))
    text = answered("analyze", "log", path).text
    assert "no SEAMCALL was captured" in text
    # TDH.MEM.TRACK may have refused the entry: a suspicion, which is not counted.
    assert "0 zero-step episodes" in text
    assert "failed_vmentry (weak)" in text


def test_several_traces_are_read_together(tmp_path: Path, trace: Path) -> None:
    packed = tmp_path / "other.gz"
    packed.write_bytes(gzip.compress(ONE_CALL.encode()))
    text = answered("analyze", "log", trace, packed).text
    assert "two.txt: ftrace" in text
    assert "other.gz: ftrace (gzip)" in text


@pytest.mark.parametrize("words", [("analyze", "log", "-"), ("analyze", "-")])
def test_standard_input_is_a_dash(words: tuple[str, ...]) -> None:
    assert "1 SEAMCALL, 1 request" in answered(*words, stdin=ONE_CALL.encode()).text


def test_quiet_prints_nothing(trace: Path) -> None:
    assert answered("analyze", "log", trace, "-q").stdout == b""
    assert answered("analyze", "log", trace, "--quiet").stdout == b""


# JSON.

TABLES = {table.name: table for table in FINDING_TABLES}


def test_json_holds_the_findings() -> None:
    result = json.loads(answered("analyze", "log", CONTENDED, "--json").stdout)
    tables = found(CONTENDED)
    assert result["schema_version"] == SCHEMA_VERSION
    assert result["n_seamcalls"] == 2011
    assert result["n_requests"] == tables["retry_chains"].height
    assert result["retried_seamcalls"] == 129
    assert result["vm_stats"] == tables["vm_stats"].to_dicts()
    assert result["vcpu_stats"] == tables["vcpu_stats"].to_dicts()
    assert result["zero_steps"] == tables["zero_steps"].to_dicts()
    assert result["losses"] == tables["losses"].to_dicts()
    assert [row["leaf_name"] for row in result["leaf_stats"]][:2] == [
        *("TDH.MEM.PAGE.AUG", "TDH.VP.ENTER"),
    ]
    assert result["provenance"]["sources"][0]["n_lines"] == 4034
    assert result["worst_chains"][0]["n_attempts"] == 64


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=lambda path: path.name)
def test_rows_of_json_keep_their_contract(path: Path) -> None:
    result = json.loads(answered("analyze", "log", path, "--json").stdout)
    for key, name in (
        *((name, name) for name in ("leaf_stats", "vm_stats", "vcpu_stats", "zero_steps")),
        ("worst_chains", "retry_chains"),
    ):
        rows = [{k: v for k, v in row.items() if k != "leaf_name"} for row in result[key]]
        assert breaches(TABLES[name], rows) == []
    assert breaches(LOSSES, result["losses"]) == []
    assert result["worst_chains"]


def test_json_is_ascii_and_whole_numbers_stay_whole(steps: Path) -> None:
    data = answered("analyze", "log", steps, "--json").stdout
    assert data.isascii()
    starts = [row["start_ns"] for row in json.loads(data)["zero_steps"]]
    assert starts == analyze(read_trace(steps)).zero_steps["start_ns"].to_list()
    assert len(starts) == 3


# Files.


def test_output_writes_every_table_and_the_findings(steps: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    done = answered("analyze", "log", steps, "--output", folder)
    assert "zerostep.txt: ftrace" in done.text
    tables = found(steps)
    assert {p.name for p in folder.iterdir()} == {
        *(f"{name}.parquet" for name in tables),
        "findings.json",
    }
    for name, rows in tables.items():
        assert pl.read_parquet(folder / f"{name}.parquet").equals(rows)
        assert pq.read_table(folder / f"{name}.parquet").num_rows == rows.height
    printed = json.loads(answered("analyze", "log", steps, "--json").stdout)
    assert json.loads((folder / "findings.json").read_text()) == printed


def test_the_columns_that_others_rely_on_are_there(trace: Path, tmp_path: Path) -> None:
    answered("analyze", "log", trace, "-q", "-o", tmp_path / "out")
    columns = pl.read_parquet(tmp_path / "out" / "retry_chains.parquet").columns
    assert set(columns) >= {
        *("leaf", "tid", "td_id", "gpa", "start_ns", "end_ns", "n_attempts", "n_busy"),
        *("outcome", "final_status", "identity"),
    }
    assert columns == [column.name for column in RETRY_CHAINS.columns]


def test_output_that_is_a_file_is_told(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert "file" in refused(1, "analyze", "log", trace, "-q", "--output", path)
    assert path.read_text() == "mine"


def test_nothing_found_is_empty_files_of_the_right_columns(tmp_path: Path, trace: Path) -> None:
    answered("analyze", "log", trace, "-q", "-o", tmp_path / "out", "--until", "0.5")
    for name, table in TABLES.items():
        rows = pl.read_parquet(tmp_path / "out" / f"{name}.parquet")
        assert rows.is_empty()
        assert list(rows.columns) == [c.name for c in table.columns]


# Filters.


def summary(*words: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(answered("analyze", "log", *words, "--json").stdout)
    return result


@pytest.mark.parametrize("vm", ["0x7d001", "7d001", str(0x7D001)])
def test_a_vm_can_be_chosen(trace: Path, vm: str) -> None:
    result = summary(trace, "--vm", vm)
    assert [row["td_id"] for row in result["vm_stats"]] == [0x7D001]
    assert [row["tid"] for row in result["vcpu_stats"]] == [7]
    assert result["options"] == {"vms": [vm]}
    assert summary(trace, "--vm", "0x7d001", "--vm", "0x7d002")["n_requests"] == 5


def test_a_leaf_can_be_chosen(trace: Path) -> None:
    result = summary(trace, "--leaf", "tdh_mem_page_aug")
    assert [row["leaf_name"] for row in result["leaf_stats"]] == ["TDH.MEM.PAGE.AUG"]
    assert summary(trace, "--leaf", "0", "--leaf", "page.aug")["n_requests"] == 5


@pytest.mark.parametrize(
    ("words", "n"),
    [
        (("--since", "+0.5"), 3),
        (("--since", "1.5"), 3),
        (("--until", "+0.5"), 2),
        (("--since", "0.5", "--until", "1.5"), 2),
        (("--since", "3"), 0),
    ],
)
def test_a_time_can_be_chosen(trace: Path, words: tuple[str, ...], n: int) -> None:
    assert summary(trace, *words)["n_requests"] == n


def test_a_time_that_the_trace_does_not_have_is_told(trace: Path) -> None:
    text = answered("analyze", trace, "--since", "+99").text
    assert "no SEAMCALL in the selected time: the trace is from 1.000000000 to 2.00000" in text
    assert text.startswith("nothing to judge: no SEAMCALL was selected")


def test_the_selection_is_printed_on_the_screen(trace: Path) -> None:
    text = answered("analyze", "log", trace, "--leaf", "TDH.MEM.PAGE.AUG", columns=120).text
    assert "only leaves TDH.MEM.PAGE.AUG" in text
    assert "TDH.MEM.PAGE.AUG" in text


# Thresholds.


@pytest.mark.parametrize(
    ("rules", "broken"),
    [
        (["max-attempts>16"], 1),
        (["max-attempts>64", "zero-steps>0", "problems>2"], 0),
        (["max-attempts>16", "failed>0", "cut>99", "problems>1"], 3),
    ],
)
def test_a_broken_rule_is_exit_status_3(rules: list[str], broken: int) -> None:
    words = [word for rule in rules for word in ("--fail-on", rule)]
    done = tdxtrace("analyze", "log", CONTENDED, *words)
    assert done.status == (3 if broken else 0)
    assert len(done.stderr.splitlines()) == broken
    assert all(line.startswith("tdxtrace: ") for line in done.stderr.splitlines())
    assert "contended.txt: ftrace" in done.text


def test_a_threshold_goes_by_what_was_chosen(trace: Path) -> None:
    assert tdxtrace("analyze", trace, "-q", "--fail-on", "max-attempts>3").status == 3
    chosen = ("--vm", "0x7d002", "--fail-on", "max-attempts>3")
    assert answered("analyze", trace, "-q", *chosen).stdout == b""


def test_a_threshold_does_not_keep_files_from_being_written(trace: Path, tmp_path: Path) -> None:
    done = tdxtrace("analyze", trace, "-o", tmp_path / "out", "--fail-on", "zero-steps>0")
    assert done.status == 3
    assert (tmp_path / "out" / "findings.json").exists()


# Words that are wrong.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fail-on", "max-tries>3"), "unknown quantity 'max-tries'"),
        (("--fail-on", "often"), "not a rule"),
        (("--leaf", "TDH.MEM.PAGE.AGU"), "TDH.MEM.PAGE.AUG"),
        (("--vm", "0x1234"), "no VM 0x1234"),
        (("--vm", "alice"), "not a VM"),
        (("--since", "noon"), "not a time"),
        (("--until", "1e9"), "not a time"),
        (("--input-format", "xml"), "unknown format"),
        (("--map", "x"), "not a mapping"),
        (("--map", "x=nothing_known"), "unknown function"),
    ],
)
def test_wrong_words_are_exit_status_2(words: tuple[str, ...], said: str) -> None:
    assert said in refused(2, "analyze", "log", CONTENDED, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("analyze",),
        ("analyze", "log", "--no-such-option"),
        ("analyze", "log", "x", "--level-base", "2"),
        ("analyze", "log", "x", "--fail-on"),
    ],
)
def test_words_that_typer_refuses_are_exit_status_2(words: tuple[str, ...]) -> None:
    done = tdxtrace(*words)
    assert done.status == 2
    assert "Traceback" not in done.stderr


# Options that say how to read.


def test_odd_names_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "odd.txt"
    path.write_text(
        line("1.000001", "p_0x4240: (0x556e6d3ab240)")
        + line("1.000002", "r_0x4240: (0x556e6d3acd28 <- 0x556e6d3ab240) status=0x0")
    )
    assert "--map" in refused(1, "analyze", path)
    mapped = ["p_0x4240=tdh_mem_page_remove", "r_0x4240=tdh_mem_page_remove"]
    result = summary(path, "--map", mapped[0], "--map", mapped[1])
    assert result["leaf_stats"][0]["leaf_name"] == "TDH.MEM.PAGE.REMOVE"


def test_the_level_base_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(aug("1.000001", "gpa=0x200000 level=1") + aug_ret("1.000002"))
    assert summary(path)["provenance"]["level_base"] == 0
    assert summary(path, "--level-base", "1")["provenance"]["level_base"] == 1


def test_the_format_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("nothing\n" * 3000 + ONE_CALL)
    refused(1, "analyze", path)
    assert summary(path, "--input-format", "ftrace")["n_seamcalls"] == 1


# Hostile text.

HOSTILE = "\x1b[31m[b]<i>&\x07"


def test_names_reach_the_screen_as_text(tmp_path: Path) -> None:
    path = tmp_path / "hostile.txt"
    task = f"{HOSTILE}-7"
    text = aug("1.000001", "gpa=0x1000", task=task) + aug_ret("1.000002", "ret=0x1", task=task)
    busy = text.replace("ret=0x1", f"ret={STATUS['B']:#x}")
    noise = line("1.000009", f"<{HOSTILE}>: x") + f"{HOSTILE} no event\n"
    path.write_text(busy + text.replace(" 1.", " 2.") + noise)
    for words in (
        ("analyze", "log", path),
        ("events", path, "--table", "threads"),
        ("events", path, "--table", "losses"),
        ("retry-chains", path),
    ):
        done = answered(*words)
        assert all(part.isprintable() for part in done.lines)
    screen = answered("analyze", "log", path).text
    assert "\\x1b[31m[b]" in screen


def test_markup_in_names_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "[red]x[bold].txt"
    task = "[red]a[/b]-7"
    first = aug("1.000001", task=task) + aug_ret("1.000002", f"ret={STATUS['B']:#x}", task=task)
    path.write_text(first + aug("1.000003", task=task) + aug_ret("1.000004", task=task))
    text = answered("analyze", "log", path).text
    assert "[red]x[bold].txt: ftrace" in text
    assert "[red]a[/b]-7" in text


def test_names_of_files_reach_the_screen_as_text(tmp_path: Path) -> None:
    path = tmp_path / f"{ESC}[31mred"
    path.write_text(ONE_CALL)
    done = answered("analyze", "log", path)
    assert ESC not in done.text
    assert ESC not in refused(1, "analyze", "log", f"{path}-not-there")


@pytest.mark.parametrize("words", [("--no-color",), ()])
def test_no_color_has_no_colours_even_on_a_terminal(words: tuple[str, ...]) -> None:
    into = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        made = screen.console(Color.never if words else Color.auto)
        made.file = into
        made.print("[cyan]hello[/cyan]")
    assert ("\x1b[36m" in into.getvalue()) is not bool(words)
