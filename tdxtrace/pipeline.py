"""The composition: a Trace in, Findings out; only here do the rooms meet."""

from __future__ import annotations

import polars as pl

from tdxtrace.analysis.leaf_stats import leaf_stats
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.analysis.selection import Selection
from tdxtrace.analysis.vcpu_stats import vcpu_stats
from tdxtrace.analysis.vm_stats import vm_stats
from tdxtrace.analysis.zero_steps import zero_steps
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.sql import ask
from tdxtrace.tables.trace import Findings, Trace


def analyze(trace: Trace, selection: Selection | None = None) -> Findings:
    """Answer every question that ``trace`` can answer.

    Chains and episodes are always found over the whole trace, since what a thread
    did in between decides what belongs together; ``selection`` then picks among
    the findings.

    Args:
        trace: What was recorded.
        selection: Which TDs, leaves and times to keep; all by default.

    Returns:
        One finding table per question, and the losses that bound the answers.

    Raises:
        QueryError: If the selection names a TD or leaf that the trace does not have.
        TableError: If a table of ``trace`` is not what it is declared to be.

    Example:
        >>> import tdxtrace
        >>> findings = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> findings.retry_chains["n_attempts"].max()
        64
    """
    chosen = selection or Selection()
    chains = chosen.of(retry_chains(trace.seamcalls, trace.losses), trace)
    steps = zero_steps(trace.seamcalls, trace.vm_entries, trace.page_faults, trace.host_events)
    steps = chosen.of(steps, trace)
    entries = chosen.of(trace.vm_entries, trace)
    calls = chosen.of(trace.seamcalls, trace)
    return Findings(
        retry_chains=chains,
        leaf_stats=leaf_stats(chains),
        zero_steps=steps,
        vm_stats=vm_stats(chains, steps),
        vcpu_stats=vcpu_stats(calls, entries, steps),
        threads=trace.threads,
        losses=trace.losses,
        provenance=trace.provenance,
        options=chosen.to_dict(),
    )


def query(trace: Trace, statement: str, selection: Selection | None = None) -> pl.DataFrame:
    """Answer a question in SQL, over every event and finding table of ``trace``.

    Args:
        trace: What was recorded; it is analysed only if the statement names a finding.
        statement: One SELECT in the dialect of polars.
        selection: Which TDs, leaves and times the tables hold; all by default.

    Raises:
        QueryError: If the statement is not understood, or the selection names a TD or
            leaf that the trace does not have.

    Example:
        >>> import tdxtrace
        >>> trace = tdxtrace.read_trace("sample_traces/contended.txt")
        >>> tdxtrace.query(trace, "select count(*) from seamcalls").item()
        2011
    """
    chosen = selection or Selection()
    findings: list[Findings] = []

    def find(name: str) -> pl.DataFrame:
        if name in _EVENTS:
            return chosen.of(getattr(trace, name), trace)
        if not findings:
            findings.append(analyze(trace, chosen))
        found: pl.DataFrame = getattr(findings[0], name)
        return found

    return ask(statement, _EVENTS | {table.name: table for table in FINDING_TABLES}, find)


_EVENTS = {table.name: table for table in EVENT_TABLES}
