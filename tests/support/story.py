"""A notation for traces: a line of text such as ``"B1 B1 2/S7 _ S1"`` is a story.

A story consists of words separated by spaces, in order of time; each event takes STEP_NS.  A
word is one of

==============  ===========================================================================
``B1``          a SEAMCALL: the letter is its answer (STATUS), the digits are the page
``trackB``      ... of another leaf than TDH.MEM.PAGE.AUG, by a word of LEAVES
``2/B1``        ... of another thread than 1
``2/track(``    ... its entry only; it returns at a later
``2/)S``        ... return of that thread's call
``>X``          an entry of the vCPU and its exit, as kvm_entry and kvm_exit show it (EXITS)
``?3``          kvm_page_fault on page 3
``out14``       kvm_userspace_exit with errno 14 (a memory fault)
``exit3``       ... with a reason, KVM_EXIT_* (3: a hypercall)
``mark``        kvm_pio: the firmware writes to port 0xf4
``attr3``       kvm_vm_set_mem_attributes of 3 pages
``install(``    a call of SEAMLDR.INSTALL begins on the CPU ``@2``
``install)S``   ... returns there: S success, I interrupted, F another error
``_``  ``_7s``  a pause of one millisecond, of 7 s, 20ms, 300us
``lost@1``      events of CPU 1 were lost here; ``lost`` alone: of any CPU
``overwritten`` events of CPU 1 (``@1``) before its first event were overwritten
``full@1``      the buffer of CPU 1 is full from here
``midway``      the trace was started while calls were in progress
==============  ===========================================================================

After a SEAMCALL: ``@2`` its CPU, ``@2>3`` the CPUs of its entry and of its return, ``#2`` its
TD, ``^1`` its level, ``*5`` its vCPU, ``~`` only the return was recorded, without arguments,
``!`` in hard interrupt context.  After an entry: ``f`` for an exit after FAST_NS.

Numbers are those of the headers of the TDX module and the kernel, independent of the code under
test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tdxtrace.tables.events import (
    HOST_EVENTS,
    LOADER_CALLS,
    LOSSES,
    PAGE_FAULTS,
    SEAMCALLS,
    THREADS,
    VM_ENTRIES,
)
from tdxtrace.tables.trace import Provenance, Source, Trace

STEP_NS = 10_000
FAST_NS = 1_000

LEAVES = {
    "": 6,
    "enter": 0,
    "add": 2,
    "sept": 3,
    "block": 7,
    "create": 9,
    "demote": 15,
    "extend": 16,
    "flush": 18,
    "init": 21,
    "reclaim": 28,
    "finalize": 17,
    "remove": 29,
    "track": 38,
    "promote": 23,
    "septrd": 25,
    "relocate": 5,
    "sremove": 30,
    "unblock": 39,
    "cachewb": 40,
    "wbinvd": 41,
    "blockw": 65,
    "exporttrack": 71,
    "unblockw": 75,
}
TAKES_GPA = {
    "",
    "add",
    "sept",
    "block",
    "demote",
    "extend",
    "promote",
    "relocate",
    "remove",
    "sremove",
    "septrd",
    "unblock",
}
TAKES_TD = TAKES_GPA | {"create", "init", "track", "finalize", "blockw", "exporttrack", "unblockw"}
TAKES_VP = {"enter", "flush"}
TAKES_PAGE = {"reclaim", "wbinvd"}

STATUS = {
    "S": 0,
    "B": 0x8000_0200_0000_0092,  # OPERAND_BUSY, SEPT tree (on TDH.VP.ENTER: zero-step)
    "G": 0xB000_0200_0000_0092,  # ... with bits 61 and 60, which the module sets at run time
    "K": 0x8000_0200_0000_0001,  # OPERAND_BUSY, RCX: the SEPT entry
    "W": 0x8000_0200_0000_0008,  # OPERAND_BUSY, R8: the PAMT entry of the page
    "D": 0x8000_0200_0000_00A9,  # OPERAND_BUSY, TD_EPOCH
    "P": 0x8000_0201_0000_0000,  # PREVIOUS_TLB_EPOCH_BUSY
    "Y": 0x8000_0202_0000_0000,  # SYS_BUSY
    "N": 0x8000_0203_0000_0000,  # RND_NO_ENTROPY
    "I": 0x8000_0003_0000_0000,  # INTERRUPTED_RESUMABLE
    "J": 0x8000_0004_0000_0000,  # INTERRUPTED_RESTARTABLE
    "E": 0xC000_0100_0000_0001,  # OPERAND_INVALID, RCX
    "T": 0xC000_0B08_0000_0001,  # TLB_TRACKING_NOT_DONE, RCX
    "Z": 0x9000_0205_0000_0000,  # an exit: HOST_PRIORITY_BUSY_TIMEOUT
    "X": 48,  # an exit: EPT violation
    "H": 12,  # an exit: HLT
    "C": 77,  # an exit: TDCALL
    "Q": 1,  # an exit: external interrupt
    "U": None,  # never returned
}
# Letter: exit reason, exit qualification.
EXITS: dict[str, tuple[int | None, int]] = {
    "X": (48, 1),  # EPT violation by a read
    "W": (48, 2),  # ... by a write, as the module's emulated ones look
    "H": (12, 0),
    "C": (77, 0),
    "Q": (1, 0),
    "M": (49, 0),  # EPT_MISCONFIG: a TDVMCALL for MMIO, normal
    "F": (0xFFFF_FFFF, 0),  # FAILED_VMENTRY: reason -1
    "U": (None, 0),  # its exit was not seen
}
_UNITS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000}
_CALL = re.compile(
    r"(?:(?P<thread>\d+)/)?(?P<leaf>[a-z]*)(?P<status>[A-Z(])(?P<page>\d*)"
    r"(?P<options>(?:@\d+(?:>\d+)?|#\d+|\^\d|\*\d+|~|!)*)"
)
_END = re.compile(r"(?:(?P<thread>\d+)/)?\)(?P<status>[A-Z])(?:@(?P<cpu>\d+))?")
_ENTRY = re.compile(r"(?:(?P<thread>\d+)/)?>(?P<exit>[A-Z])(?P<fast>f?)")
_FAULT = re.compile(r"(?:(?P<thread>\d+)/)?\?(?P<page>\d+)")
_OUT = re.compile(r"(?:(?P<thread>\d+)/)?(?:out(?P<errno>\d+)|exit(?P<reason>\d+))")
_LOSS = re.compile(r"(?P<kind>lost|overwritten|full|midway)(?:@(?P<cpu>\d+))?")
_KVM = re.compile(r"(?:(?P<thread>\d+)/)?(?P<what>mark|attr)(?P<n>\d*)")
_INSTALL = re.compile(r"install(?P<end>[()])(?P<status>[SIF]?)@(?P<cpu>\d+)")
_LOADER = {"S": 0, "I": 0x8000_0000_0003_0000, "F": 0x8000_0000_0001_0002}
_PAUSE = re.compile(r"_(?:(?P<n>\d+)(?P<unit>s|ms|us))?")
_KINDS = {
    "lost": "lost_events",
    "overwritten": "overwritten",
    "full": "buffer_full",
    "midway": "started_midway",
}

Row = dict[str, Any]


@dataclass(slots=True)
class Story:
    """The event tables of a story."""

    processes: Mapping[int, int] = field(default_factory=dict)
    """Process ID by thread ID; null for other threads."""
    calls: list[Row] = field(default_factory=list)
    entries: list[Row] = field(default_factory=list)
    faults: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    installs: list[Row] = field(default_factory=list)
    gaps: list[tuple[str, int | None, int]] = field(default_factory=list)
    times: list[tuple[int, int]] = field(default_factory=list)
    """Time and CPU of every event."""
    now: int = 1_000_000_000
    line: int = 0
    _open: dict[int, Row] = field(default_factory=dict)

    @property
    def seamcalls(self) -> pl.DataFrame:
        """The ``seamcalls`` table."""
        return pl.DataFrame(self.calls, schema=SEAMCALLS.schema)

    @property
    def vm_entries(self) -> pl.DataFrame:
        """The ``vm_entries`` table."""
        return pl.DataFrame(self.entries, schema=VM_ENTRIES.schema)

    @property
    def page_faults(self) -> pl.DataFrame:
        """The ``page_faults`` table."""
        return pl.DataFrame(self.faults, schema=PAGE_FAULTS.schema)

    @property
    def host_events(self) -> pl.DataFrame:
        """The ``host_events`` table."""
        return pl.DataFrame(self.events, schema=HOST_EVENTS.schema)

    @property
    def loader_calls(self) -> pl.DataFrame:
        """The ``loader_calls`` table."""
        return pl.DataFrame(self.installs, schema=LOADER_CALLS.schema)

    @property
    def losses(self) -> pl.DataFrame:
        """The ``losses`` table: gaps between the last event before and the next one."""
        return pl.DataFrame([self._loss(*gap) for gap in self.gaps], schema=LOSSES.schema)

    @property
    def trace(self) -> Trace:
        """The trace, as if read from a file ``story.txt``."""
        tids = sorted({row["tid"] for row in (*self.calls, *self.entries, *self.faults)})
        threads = [
            {"source": 0, "tid": tid, "tgid": self.processes.get(tid), "comm": f"CPU {tid}/KVM"}
            for tid in tids
        ]
        times = [ns for ns, _ in self.times]
        source = Source(
            path="story.txt",
            format="ftrace",
            compression="none",
            n_bytes=0,
            n_lines=self.line,
            n_headers=0,
            first_ns=min(times, default=None),
            last_ns=max(times, default=None),
            clock="unnamed",
            clock_resolution_ns=1000,
            kernel=None,
            tool=None,
            events={},
        )
        return Trace(
            seamcalls=self.seamcalls,
            vm_entries=self.vm_entries,
            page_faults=self.page_faults,
            host_events=self.host_events,
            loader_calls=self.loader_calls,
            threads=pl.DataFrame(threads, schema=THREADS.schema),
            losses=self.losses,
            provenance=Provenance((source,), 0, "given", "0"),
        )

    def add(self, word: str) -> None:
        """Add the events of one word."""
        for pattern, add in (
            (_PAUSE, self._pause),
            (_LOSS, self._lose),
            (_ENTRY, self._enter),
            (_FAULT, self._fault),
            (_OUT, self._out),
            (_KVM, self._kvm),
            (_INSTALL, self._install),
            (_END, self._end),
            (_CALL, self._call),
        ):
            found = pattern.fullmatch(word)
            if found is not None:
                add(found)
                return
        raise ValueError(f"not a word of a story: {word!r}")

    def _pause(self, found: re.Match[str]) -> None:
        self.now += int(found["n"] or 1) * _UNITS[found["unit"] or "ms"]

    def _lose(self, found: re.Match[str]) -> None:
        cpu = None if found["cpu"] is None else int(found["cpu"])
        self.line += 1
        self.gaps.append((_KINDS[found["kind"]], cpu, self.now))
        self.now += STEP_NS

    def _loss(self, kind: str, cpu: int | None, at: int) -> Row:
        here = [ns for ns, where in self.times if cpu in (None, where)]
        before = max((ns for ns in here if ns < at), default=None)
        after = min((ns for ns in here if ns >= at), default=None)
        return {
            "source": 0,
            "line_no": None if kind in ("overwritten", "buffer_full") else 1,
            "kind": kind,
            "severity": "data_loss",
            "cpu": cpu,
            "start_ns": before if kind in ("lost_events", "buffer_full") else None,
            "end_ns": None if kind == "buffer_full" else after,
            "n_events": None,
            "n_lines": int(kind == "lost_events"),
            "detail": f"CPU {cpu} {at}",
            "advice": "",
        }

    def _place(self, thread: str | None, cpu: int = 0) -> Row:
        tid = int(thread or 1)
        return {"source": 0, "cpu": cpu, "tid": tid, "tgid": self.processes.get(tid)}

    def _event(self, cpu: int) -> int:
        """Record an event on ``cpu`` now; return its time and advance the clock."""
        self.line += 1
        self.times.append((self.now, cpu))
        self.now += STEP_NS
        return self.now - STEP_NS

    def _call(self, found: re.Match[str]) -> None:
        options = found["options"]
        cpus = re.search(r"@(\d+)(?:>(\d+))?", options)
        first = int(cpus[1]) if cpus else 0
        row = self._place(found["thread"], int(cpus[2] or first) if cpus else 0)
        row |= self._arguments(found, row["tid"])
        row |= {"leaf": LEAVES[found["leaf"]], "probe": "wrapper", "n_lines": 1}
        row["in_irq"] = "!" in options
        if "~" not in options:
            row |= {"start_ns": self._event(first), "start_cpu": first}
        if found["status"] == "(":
            self._open[row["tid"]] = row
        else:
            self._finish(row, found["status"])

    def _arguments(self, found: re.Match[str], tid: int) -> Row:
        leaf, options = found["leaf"], found["options"]
        if "~" in options:
            return {}
        td, level, vp = (
            int(got[1]) if (got := re.search(rf"\{mark}(\d+)", options)) else None for mark in "#^*"
        )
        page = int(found["page"] or 1) * 0x1000
        return {
            "td_id": 0x7D000 + (td or 0) if leaf in TAKES_TD else None,
            "gpa": page if leaf in TAKES_GPA else None,
            "level": (level or 0) if leaf in TAKES_GPA else None,
            "vp_id": 0x5B000 + (vp or tid) if leaf in TAKES_VP else None,
            "page": page if leaf in TAKES_PAGE else None,
        }

    def _end(self, found: re.Match[str]) -> None:
        row = self._open.pop(int(found["thread"] or 1))
        row["cpu"] = int(found["cpu"] or row["cpu"])
        self._finish(row, found["status"])

    def _finish(self, row: Row, status: str) -> None:
        row["status"] = STATUS[status]
        if row["status"] is not None:
            row |= {"end_ns": self._event(row["cpu"])}
            row["n_lines"] += "start_ns" in row
        self.calls.append(row | {"seq": self.line})

    def _enter(self, found: re.Match[str]) -> None:
        reason, qualification = EXITS[found["exit"]]
        row = self._place(found["thread"])
        row |= {"vcpu_id": row["tid"], "start_ns": self._event(0), "n_lines": 1}
        if found["fast"]:
            self.now += FAST_NS - STEP_NS
        if reason is not None:
            row |= {"end_ns": self._event(0), "exit_reason": reason, "n_lines": 2}
            row |= {"info1": qualification, "info2": 0}
        self.entries.append(row | {"seq": self.line})

    def _fault(self, found: re.Match[str]) -> None:
        row = self._place(found["thread"])
        row |= {"ts_ns": self._event(0), "gpa": int(found["page"]) * 0x1000, "error_code": 2}
        self.faults.append(row | {"seq": self.line, "vcpu_id": row["tid"], "n_lines": 1})

    def _out(self, found: re.Match[str]) -> None:
        row = self._place(found["thread"]) | {
            "ts_ns": self._event(0),
            "event": "kvm_userspace_exit",
        }
        row |= {n: int(found[n]) for n in ("errno", "reason") if found[n] is not None}
        self.events.append(row | {"seq": self.line, "n_lines": 1})

    def _kvm(self, found: re.Match[str]) -> None:
        row = self._place(found["thread"]) | {"ts_ns": self._event(0), "n_lines": 1}
        if found["what"] == "mark":
            row |= {"event": "kvm_pio", "port": 0xF4, "is_write": True, "n_bytes": 1, "value": 1}
        else:
            n_bytes = 4096 * int(found["n"])
            row |= {"event": "kvm_vm_set_mem_attributes", "gpa": 0x1000, "n_bytes": n_bytes}
        self.events.append(row | {"seq": self.line})

    def _install(self, found: re.Match[str]) -> None:
        cpu = int(found["cpu"])
        if found["end"] == "(":
            row: Row = {"source": 0, "start_ns": self._event(cpu), "start_cpu": cpu, "cpu": cpu}
            row |= {"tid": 100 + cpu, "loader_leaf": 1, "probe": "seamcall", "n_lines": 1}
            self.installs.append(row | {"seq": self.line})
            return
        row = next(r for r in reversed(self.installs) if r["cpu"] == cpu)
        row |= {"end_ns": self._event(cpu), "status": _LOADER[found["status"]], "n_lines": 2}
        row["seq"] = self.line


def story(text: str, processes: Mapping[int, int] | None = None) -> Story:
    """Return the event tables of a story.

    Args:
        text: Words of the language above.
        processes: Process ID by thread ID, where recorded.
    """
    parsed = Story(processes or {})
    for word in text.split():
        parsed.add(word)
    # Calls still in progress at the end of the story have no return.
    for tid in list(parsed._open):
        parsed._finish(parsed._open.pop(tid), "U")
    return parsed


def without(frame: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """Return the table with these columns null, as if they were not recorded."""
    return frame.with_columns(pl.lit(None, frame.schema[name]).alias(name) for name in columns)
