"""Enumerations shared by the tables and the command line; importing them is fast.

The tables take their ``pl.Enum`` types from here, the command line its choices.
"""

from __future__ import annotations

from enum import StrEnum


class EventTable(StrEnum):
    """Names of the event tables, in the catalog's order."""

    seamcalls = "seamcalls"
    vm_entries = "vm_entries"
    page_faults = "page_faults"
    host_events = "host_events"
    loader_calls = "loader_calls"
    kernel_messages = "kernel_messages"
    threads = "threads"
    losses = "losses"


class Outcome(StrEnum):
    """How a request ended: ``retry_chains.outcome``."""

    succeeded = "succeeded"
    failed = "failed"
    resolved_elsewhere = "resolved_elsewhere"
    abandoned = "abandoned"
    cut = "cut"


class Cause(StrEnum):
    """Who made a SEAMCALL busy: ``busy_causes.cause``."""

    host_conflict = "host_conflict"
    armed_entry = "armed_entry"
    guest = "guest"
    kernel_bug = "kernel_bug"
    unexplained = "unexplained"


class View(StrEnum):
    """How requests or busy answers are grouped into curves: ``attempts.by``."""

    leaf = "leaf"
    td = "td"
    resource = "resource"
    cause = "cause"
    maker = "maker"


class Unit(StrEnum):
    """What a curve counts: ``attempts.unit``."""

    attempts = "attempts"
    ns = "ns"


class Dependence(StrEnum):
    """Cluster within which requests are correlated: ``unit_of_dependence``."""

    request = "request"
    burst = "burst"
    period = "period"
    td = "td"
    source = "source"
    host = "host"


class Counted(StrEnum):
    """How requests that another thread settled are counted: ``attempt_counts.settled``."""

    none = "none"
    busy = "busy"
    done = "done"


def names(values: type[StrEnum]) -> tuple[str, ...]:
    """Return the values of an enumeration in the order declared, as plain text."""
    return tuple(value.value for value in values)


def listed(values: type[StrEnum], but: StrEnum | None = None) -> str:
    """Return the values as text, "a, b or c", leaving out ``but``."""
    *first, last = (value.value for value in values if value is not but)
    return f"{', '.join(first)} or {last}"
