"""A story with a kernel log, and a hypothesis strategy for the words of stories."""

from __future__ import annotations

import dataclasses
from typing import Any

import polars as pl
from hypothesis import strategies as st
from support.story import Story

from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.trace import Trace

WORDS = st.lists(
    st.sampled_from(
        "B1 K1 S1 S2 blockK1 blockS1 trackD trackS removeK1 demoteT1 demoteJ1 cachewbI enterZ "
        "enterC 2/blockS1 2/demoteT1 2/S1#7 >X ?1 >C _ _5ms createN lost@0 midway reclaimS1".split()
    ),
    max_size=30,
)


def with_log(scenario: Story, *said: dict[str, Any], clock: str = "printk") -> Trace:
    """The trace of a story, with kernel messages as a second source."""
    trace = scenario.trace
    source = dataclasses.replace(
        trace.provenance.sources[0], path="dmesg.txt", format="kernel-log", clock=clock
    )
    sources = (*trace.provenance.sources, source)
    rows = [
        {"source": 1, "seq": i, "message": "seamcall_failed", "text": "", "n_lines": 1} | row
        for i, row in enumerate(said, 1)
    ]
    return dataclasses.replace(
        trace,
        provenance=dataclasses.replace(trace.provenance, sources=sources),
        kernel_messages=pl.DataFrame(rows, schema=KERNEL_MESSAGES.schema),
    )
