"""Small files of tracefs: names, processes, counters of losses."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from tdxtrace.ingest.records.formats import EventFormat
from tdxtrace.ingest.stats import SourceStats

_CMDLINE: Final = re.compile(r"^[^\S\n]*(?P<tid>\d{1,9}) (?P<comm>.{1,64})$", re.MULTILINE)
_STAT: Final = re.compile(r"^(?P<key>[a-z ]{3,20}): (?P<n>\d{1,18})\s*$", re.MULTILINE)
_CPU: Final = re.compile(r"^CPU: (?P<cpu>\d{1,4})\s*$", re.MULTILINE)

_MAX_JSON: Final = 64 << 20
# PID_MAX_LIMIT: Linux include/linux/threads.h.
_MAX_PID: Final = 1 << 22
_TGID: Final = re.compile(r"^[^\S\n]*(?P<tid>\d{1,9}) (?P<tgid>\d{1,9})$", re.MULTILINE)


def printed_names(events: Mapping[int, EventFormat]) -> Callable[[EventFormat], str]:
    """Return what gives an event's name: with its group only where two have the same."""
    bare = Counter(event.name for event in events.values())

    def name(event: EventFormat) -> str:
        return event.name if bare[event.name] == 1 else f"{event.system}:{event.name}"

    return name


def comms_of(cmdlines: str) -> dict[int, str]:
    """Read tracefs' ``saved_cmdlines``: the last name of each thread that was saved."""
    return {int(found["tid"]): found["comm"] for found in _CMDLINE.finditer(cmdlines)}


def tgids_of(text: str) -> dict[int, int]:
    """Read tracefs' ``saved_tgids``: the process of each thread that was saved."""
    return {int(found["tid"]): int(found["tgid"]) for found in _TGID.finditer(text)}


def cpu_stats(text: str) -> Iterator[tuple[int, dict[str, int]]]:
    """Read ``per_cpu/cpuN/stats`` of one or more CPUs, each headed by ``CPU: N``."""
    parts = _CPU.split(text)
    for cpu, body in zip(parts[1::2], parts[2::2], strict=True):
        yield int(cpu), {found["key"]: int(found["n"]) for found in _STAT.finditer(body)}


def note_stats(
    stats: SourceStats, cpu: int, counters: Mapping[str, int], where: str, n_events: int | None
) -> None:
    """Add what the kernel's counters say was lost and no page tells of.

    ``overrun`` counts what the buffer overwrote, ``dropped events`` what it refused
    (overwrite off), ``commit overrun`` what came while a page was being written,
    ``entries`` what was still in the kernel when the counters were read (Linux
    Documentation/trace/ftrace.rst, per_cpu/cpu0/stats).

    Args:
        stats: Where losses are put.
        cpu: The CPU.
        counters: Its counters.
        where: What goes before "CPU n" in the detail.
        n_events: Events of it that the recording has, if known: trace-cmd extract
            reads what the counters still call entries.
    """
    gaps = [gap for gap in stats.gaps if gap.kind == "lost_events" and gap.cpu == cpu]
    unmarked = counters.get("overrun", 0) - sum(gap.n_events or 0 for gap in gaps)
    uncounted = [gap for gap in gaps if gap.n_events is None]
    if len(uncounted) == 1 and unmarked > 0:
        # A page without room for the count says only that something was lost.
        uncounted[0].n_events, unmarked = unmarked, 0
    stats.record_loss("overwritten", max(0, unmarked), f"{where}CPU {cpu}", cpu=cpu)
    stats.record_loss(
        "buffer_full", counters.get("dropped events", 0), f"{where}CPU {cpu}", cpu=cpu
    )
    stats.record_loss(
        "lost_events", counters.get("commit overrun", 0), f"{where}commit overrun", cpu=cpu
    )
    if n_events is not None:
        left = counters.get("entries", 0)
        unread = max(0, min(left, left + counters.get("read events", 0) - n_events))
        stats.record_loss("unread", unread, f"{where}CPU {cpu}", cpu=cpu)


def tgids_beside(path: str) -> dict[int, int]:
    """Read the process of each thread from what ``tdxtrace capture`` puts beside a trace.dat.

    The format has no place for it, and without it the vCPUs of two VMs look alike.  No such
    file, or a damaged one, tells of no thread.
    """
    try:
        with Path(f"{path}.capture.json").open("rb") as file:
            told = json.loads(file.read(_MAX_JSON))["tgids"]
        pairs = [(int(tid), tgid) for tid, tgid in told.items() if isinstance(tgid, int)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {tid: tgid for tid, tgid in pairs if 0 < tid < _MAX_PID and 0 < tgid < _MAX_PID}
