"""Kernel messages comparable with each trace, and the TDX module release that they name."""

from __future__ import annotations

import polars as pl

from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.trace import Trace, agreement
from tdxtrace.tdx.locks import generation_of


def related_messages(trace: Trace) -> pl.DataFrame:
    """Return the kernel messages whose clock is comparable with that of an input with events.

    Messages of logs whose clock differs are left out.

    Args:
        trace: The events and messages.

    Returns:
        ``kernel_messages`` with ``source`` the trace's input and ``log_source`` the log's; one
        row per message and comparable input.
    """
    messages = KERNEL_MESSAGES.conform(trace.kernel_messages).filter(pl.col("ts_ns").is_not_null())
    sources = trace.provenance.sources
    pairs = [
        (number, log)
        for number, source in enumerate(sources)
        for log, other in enumerate(sources)
        if not source.is_log and other.is_log and agreement(source, other).comparable
    ]
    schema = {"source": pl.UInt16, "log_source": pl.UInt16}
    comparable_pairs = pl.DataFrame(pairs, schema=schema, orient="row")
    return messages.rename({"source": "log_source"}).join(comparable_pairs, on="log_source")


def module_release(messages: pl.DataFrame) -> tuple[str, str | None] | None:
    """Return the release of the TDX module that the kernel's log names, and its lock generation.

    Args:
        messages: The ``kernel_messages`` table.

    Returns:
        The release and its generation (A, B or C; None: unknown release, or not named in
        full); None if no message names a release, or two name different ones.

    Example:
        >>> from tdxtrace.tables.events import KERNEL_MESSAGES
        >>> module_release(KERNEL_MESSAGES.empty()) is None
        True
    """
    named = KERNEL_MESSAGES.conform(messages)["module_version"].drop_nulls().unique()
    if len(named) != 1:
        return None
    return str(named[0]), generation_of(str(named[0]))
