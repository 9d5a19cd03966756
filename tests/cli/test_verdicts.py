"""``tdxtrace verdicts``, and the kernel's log together with a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import ESC, answered, refused
from support.texts import ONE_CALL

FAILED = "SEAMCALL TDH_VP_INIT failed: 0x8000020000000080"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "dmesg.txt"
    path.write_text(f"[    1.000002] kvm_intel: {FAILED}\n[    2.000000] usb 1-1: new device\n")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.txt"
    path.write_text(ONE_CALL)
    return path


def test_a_log_is_analysed_alone(log: Path) -> None:
    text = answered("analyze", "log", log).text
    assert "kernel log: 1 seamcall_failed" in text
    assert "no SEAMCALL was captured: the kernel log has no calls that succeeded" in text
    assert "--table kernel_messages" in " ".join(text.split())


def test_its_messages_are_a_table_of_events(log: Path) -> None:
    data = answered("events", log, "--table", "kernel_messages", "--format", "json").stdout
    (row,) = json.loads(data)
    assert (row["leaf"], row["status"], row["ts_ns"]) == (
        22,
        0x8000_0200_0000_0080,
        1_000_002_000,
    )


def test_a_log_beside_a_trace(trace: Path, log: Path) -> None:
    text = answered("analyze", trace, "--dmesg", log).text
    assert "kernel log: 1 seamcall_failed" in text
    assert "TDH." in text
    result = json.loads(answered("analyze", trace, "--dmesg", log, "--json").stdout)
    assert any("compared by time" in note for note in result["provenance"]["notes"])


def test_plus_seconds_count_from_the_traces_start(trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "boot.txt"
    log.write_text(f"[    0.000001] kvm_intel: {FAILED}\n")
    words = ("events", trace, "--dmesg", log, "--until", "+0.5", "--format", "csv")
    assert len(answered(*words).lines) == 2


def test_a_log_that_is_none_is_refused(trace: Path, tmp_path: Path) -> None:
    assert "not a kernel log" in refused(1, "analyze", trace, "--dmesg", trace)
    gone = tmp_path / "gone"
    assert "no such trace" in refused(1, "analyze", trace, "--dmesg", gone)


def test_verdicts_are_sentences_with_their_evidence(log: Path) -> None:
    text = " ".join(answered("verdicts", log).text.split())
    assert text.startswith("1 BUG BUG tdr_or_tdvpr_busy: 1 kernel message of VP.INIT")
    assert "KVM did not keep its calls apart (kernel_messages seq 1)" in text
    assert "rule tdr_or_tdvpr_busy: Yan Zhao" in text
    assert text.endswith(f"look closer: tdxtrace events {log} --table kernel_messages")


def test_an_undecided_one_says_what_would_decide(tmp_path: Path) -> None:
    log = tmp_path / "dmesg.txt"
    lines = [
        f"[ {n}.000000] kvm_intel: SEAMCALL TDH_MEM_PAGE_AUG failed: 0xc00003000000000{n}"
        for n in range(1, 5)
    ]
    log.write_text("\n".join(lines) + "\n")
    text = " ".join(answered("verdicts", log).text.split())
    assert text.startswith("1 UNDECIDED, of 4 groups of findings UNDECIDED message_alone")
    assert text.count("to decide: a trace of that moment") == 1
    assert all(f"(kernel_messages seq {n})" in text for n in range(1, 5))


def test_a_trace_without_findings_is_reported(trace: Path) -> None:
    assert "no problems found" in answered("verdicts", trace).text


def test_verdicts_are_a_table_or_the_same_text_in_a_file(log: Path, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.csv"
    answered("verdicts", log, "--format", "csv", "--output", path)
    assert path.read_text().startswith("source,verdict,subject")
    answered("verdicts", log, "--output", tmp_path / "verdicts.txt")
    assert (tmp_path / "verdicts.txt").read_text() == answered("verdicts", log).text


def test_hostile_text_of_a_log_does_not_reach_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "dmesg.txt"
    log.write_text(f"[    1.000002] kvm_intel: {FAILED} {ESC}[31m\n")
    for words in (("verdicts", log), ("events", log, "--table", "kernel_messages")):
        assert ESC not in answered(*words, columns=400).text


def test_the_module_may_be_named(trace: Path) -> None:
    assert "no problems found" in answered("verdicts", trace, "--module", "1.5.16").text
    assert "no lock generation" in refused(2, "verdicts", trace, "--generation", "Z")
