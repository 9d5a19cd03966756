"""Watched histograms: the newest counts become the running totals."""

from __future__ import annotations

import json

import pytest

from tdxtrace.errors import FormatError
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.watch.counts import CountTicker
from tdxtrace.watch.totals import RunningTotals

(AUG,) = numbers_of(["TDH.MEM.PAGE.AUG"])
# OPERAND_BUSY of the SEPT tree: bits 63:32, and the operand.
BUSY = f"{0x80000200},{0x92}"


def lines(*printed: tuple[str, object]) -> bytes:
    made = [json.dumps({"type": kind, "data": data}) + "\n" for kind, data in printed]
    return "".join(made).encode()


HEAD = ("printf", "tdxtrace histogram 1 6.18.2 1000000000\n")


def maps(n: int) -> tuple[str, object]:
    return (
        "map",
        {
            "@requests": {f"7,{AUG},0,1": n, f"7,{AUG},0,3": 1, f"8,{AUG},3,65": 2},
            "@done": {f"7,{AUG}": n + 4},
            "@status": {f"7,{AUG},0,0": n + 1, f"7,{AUG},{BUSY}": 132},
            "@cannot": {f"{AUG},2": 5},
        },
    )


def test_the_newest_counts_are_the_totals() -> None:
    ticker, totals = CountTicker("standard input"), RunningTotals()
    totals.replace_counts(ticker.tick(lines(HEAD, ("printf", "at 2000000000\n"), maps(10))))
    assert totals.rates["busy"] == 132
    took = ("hist", {"@took_ns": {str(AUG): [{"min": 512, "max": 1023, "count": 1}]}})
    totals.replace_counts(ticker.tick(lines(("printf", "at 4000000000\n"), maps(30), took)))
    aug = totals.leaves["TDH.MEM.PAGE.AUG"]
    assert (aug.n_requests, aug.n_retried, aug.n_busy, aug.n_calls) == (33, 3, 132, 163)
    # 65 counts requests of 65 to 127 attempts.
    assert (aug.max_attempts, aug.quantile(1.0), aug.quantile(0.5)) == (65, 127, 1)
    assert aug.max_ns == 512
    assert dict(aug.outcomes) == {"succeeded": 31, "abandoned": 2}
    # 30 + 4 requests ended and 33 are in the map; 5 calls could not be joined.
    assert totals.n_lost == 6
    assert totals.rates == {"events": 10.0, "seamcalls": 10.0, "busy": 0.0, "lost": 0.0}
    assert totals.busy == {("TDH.MEM.PAGE.AUG", "SEPT tree"): 132}


def test_an_incomplete_print_changes_no_counts() -> None:
    ticker, totals = CountTicker("standard input"), RunningTotals()
    totals.replace_counts(ticker.tick(lines(HEAD)))
    assert (totals.leaves, totals.rates) == ({}, {})
    totals.replace_counts(ticker.tick(lines(("printf", "at 2000000000\n"), maps(10))))
    before = totals.to_dict()["leaves"], dict(totals.rates)
    totals.replace_counts(ticker.tick(b""))
    assert (totals.to_dict()["leaves"], dict(totals.rates)) == before


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ({"@requests": {f"7,{AUG},9,1": 1}}, "unknown outcome"),
        ({"@status": {"7,99999,0,0": 1}}, "a leaf has 16 bits"),
        ({"@status": {f"7,{AUG},{1 << 32},0": 1}}, "each half of a status 32"),
    ],
)
def test_a_damaged_line_is_reported_in_one_line(printed: dict[str, object], why: str) -> None:
    ticker = CountTicker("standard input")
    with pytest.raises(FormatError, match=why):
        ticker.tick(lines(HEAD, ("printf", "at 2000000000\n"), ("map", printed)))
