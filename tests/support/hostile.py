"""A trace with names that are dangerous unless they are escaped."""

from __future__ import annotations

import dataclasses

import polars as pl
from support.story import story

from tdxtrace.tables.trace import Trace

NAMES = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "a|b",
    "](http://x)",
    "[a](javascript:alert(1))",
    "=cmd()",
    "\x1b[31mred\x1b]0;t\x07",
    "a\u202eb",
    "{{ 7 * 7 }}",
    "`code` *x* _y_",
    "</style>",
)


def hostile() -> Trace:
    """Return a small trace in which every name is one of NAMES."""
    words = " ".join(f"{n}/B{n} {n}/S{n}" for n in range(1, len(NAMES) + 1))
    entries = " ".join(["enterS ?5"] * 7) + " enterB enterB enterB enterS >X lost@1"
    trace = story(f"{words} {entries}").trace
    sources = tuple(
        dataclasses.replace(source, path=NAMES[0], kernel=NAMES[4], tool=NAMES[6], clock=NAMES[3])
        for source in trace.provenance.sources
    )
    names = pl.col("tid").map_elements(lambda tid: NAMES[tid - 1], return_dtype=pl.String)
    return dataclasses.replace(
        trace,
        threads=trace.threads.with_columns(comm=names),
        losses=trace.losses.with_columns(detail=pl.lit(NAMES[0]), advice=pl.lit(NAMES[2])),
        provenance=dataclasses.replace(trace.provenance, sources=sources, notes=(NAMES[1],)),
    )
