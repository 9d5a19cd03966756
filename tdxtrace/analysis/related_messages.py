"""Which messages of the kernel can be set beside which trace, and which TDX module ran."""

from __future__ import annotations

import polars as pl

from tdxtrace.tables.clocks import LOG_FORMATS, agreement
from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx.locks import generation_of


def related_messages(trace: Trace) -> pl.DataFrame:
    """Return messages beside each input with events whose clock is that of their log.

    Messages of logs whose times mean something else are withheld.

    Args:
        trace: The events and messages.

    Returns:
        ``kernel_messages`` with ``source`` the trace's input and ``log_source`` the log's; one
        row per message and input that it can be compared with.
    """
    said = KERNEL_MESSAGES.conform(trace.kernel_messages).filter(pl.col("ts_ns").is_not_null())
    sources = trace.provenance.sources
    pairs = [
        (number, log)
        for number, source in enumerate(sources)
        for log, other in enumerate(sources)
        if source.format not in LOG_FORMATS
        and other.format in LOG_FORMATS
        and agreement(source, other).comparable
    ]
    schema = {"source": pl.UInt16, "log_source": pl.UInt16}
    beside = pl.DataFrame(pairs, schema=schema, orient="row")
    return said.rename({"source": "log_source"}).join(beside, on="log_source")


def module_release(messages: pl.DataFrame) -> tuple[str, str | None] | None:
    """Say which release of the TDX module the kernel's log names, and its lock generation.

    Args:
        messages: The ``kernel_messages`` table.

    Returns:
        The release and its generation (A, B or C; None: of a release whose source was not read,
        or not named in full); None if no message names one, or two name different ones.

    Example:
        >>> from tdxtrace.tables.events import KERNEL_MESSAGES
        >>> module_release(KERNEL_MESSAGES.empty()) is None
        True
    """
    named = KERNEL_MESSAGES.conform(messages)["module_version"].drop_nulls().unique()
    if len(named) != 1:
        return None
    return str(named[0]), generation_of(str(named[0]))
