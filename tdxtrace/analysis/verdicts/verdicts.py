"""Verdicts: BUG, EXPECTED, HOSTILE or UNDECIDED, per group of findings."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.related_messages import module_release
from tdxtrace.analysis.verdicts.aftermath import on_abandoned, on_loops, on_messages
from tdxtrace.analysis.verdicts.busy import on_broken_rules, on_busy
from tdxtrace.analysis.verdicts.steps import on_zero_steps
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tables.verdicts import VERDICTS

_ORDER: Final = {"BUG": 0, "HOSTILE": 1, "UNDECIDED": 2, "EXPECTED": 3}


def verdicts(
    findings: Findings,
    trace: Trace,
    causes: pl.DataFrame,
    broken: pl.DataFrame,
    *,
    generation: str | None = None,
) -> pl.DataFrame:
    """Judge every busy answer, zero-step episode, abandoned request, loop and message.

    Findings with the same explanation make one group: the verdict, one sentence, up to five
    rows of evidence, the rule that decided and its source.  A wrong accusation is worse than none:
    BUG and HOSTILE need sure evidence; what is not sure is UNDECIDED and says what
    capture would decide it.

    Args:
        findings: Zero-step episodes and their causes, abandoned requests, loops.
        trace: The events they were found in.
        causes: The ``busy_causes`` table.
        broken: The ``broken_rules`` table.
        generation: Lock generation of the module; None: as the kernel's log names it, if it does.

    Returns:
        The ``verdicts`` table: BUG first, then HOSTILE, UNDECIDED, EXPECTED; within each the
        largest group first.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    release = module_release(trace.kernel_messages)
    known = generation or (release[1] if release else None)
    parts = [
        on_busy(causes),
        on_broken_rules(broken, causes),
        on_zero_steps(
            findings.zero_steps,
            findings.zero_step_causes,
            trace.seamcalls,
            trace.vm_entries,
            known,
        ),
        on_abandoned(findings.abandoned_requests),
        on_loops(findings.progress_loops),
        on_messages(trace.kernel_messages),
    ]
    rank = pl.col("verdict").cast(pl.String).replace_strict(_ORDER, return_dtype=pl.Int8)
    found = pl.concat([VERDICTS.empty(), *parts])
    return VERDICTS.conform(
        found.sort(rank, -pl.col("n_rows").cast(pl.Int64), "source", "what", maintain_order=True)
    )
