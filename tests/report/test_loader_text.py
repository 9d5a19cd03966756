"""Module updates in every view: durations of the P-SEAMLDR's calls."""

from __future__ import annotations

import polars as pl
from support.texts import line, read_text

from tdxtrace import analyze
from tdxtrace.report.loader_text import loader_sentences
from tdxtrace.report.sections import quality

CALL = "seamcall_{}: cpuid: {} op: SEAMLDR_INSTALL {}1000 2000 0 0 0 0"


def _updated(status: str) -> str:
    """Two CPUs ask for the module's replacement at once; the slower one takes 43.7 ms."""
    return "".join(
        (
            line("5.000001", CALL.format("enter", 3, ""), task="kworker/3:1-90", cpu=3),
            line("5.000002", CALL.format("enter", 4, ""), task="kworker/4:1-91", cpu=4),
            line("5.028302", CALL.format("exit", 4, f"err: ({status}) "), "kworker/4:1-91", 4),
            line("5.043701", CALL.format("exit", 3, "err: (0) "), "kworker/3:1-90", 3),
        )
    )


def test_an_update_says_how_long_it_kept_which_cpus() -> None:
    findings = analyze(read_text(_updated("0")))
    says = "2 calls of SEAMLDR.INSTALL kept 2 CPUs, each for up to 43.7ms, from 5.000001000 s"
    assert loader_sentences(findings.loader_calls) == [says]
    assert f"P-SEAMLDR: {says}." in quality.section(findings).says


def test_a_repeated_update_call_is_reported() -> None:
    calls = read_text(_updated("8000000000030000")).loader_calls
    assert loader_sentences(calls)[0].endswith(
        "; 1 of 2 answers no success, first PSEAMLDR_EINTERRUPT"
    )
    entries = calls.with_columns(end_ns=pl.lit(None, pl.Int64), status=pl.lit(None, pl.UInt64))
    assert loader_sentences(entries) == [
        "2 calls of SEAMLDR.INSTALL kept 2 CPUs, from 5.000001000 s"
    ]
