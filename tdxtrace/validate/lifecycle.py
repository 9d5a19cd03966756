"""Scores of the tables about a TD's life cycle: accepting, boot, TDVMCALLs, module updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import polars as pl

from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record.symbols import CLOCK_START_NS, td_address
from tdxtrace.validate.captured import CapturedRun, Score

_AUG: Final = "TDH.MEM.PAGE.AUG"
_FAULT: Final = (_AUG, "TDH.MEM.SEPT.ADD")
_WITH_ENTRIES: Final = ("wrappers", "capture")
# Functions that the simulated guest calls, by the exit reason in KVM's event; TDCALL is MapGPA.
_FUNCTIONS: Final = {
    abi.EXIT_CPUID: "Instruction.CPUID",
    abi.EXIT_HLT: "Instruction.HLT",
    abi.EXIT_IO: "Instruction.IO",
    abi.EXIT_MSR_WRITE: "Instruction.WRMSR",
    abi.EXIT_TDCALL: "MapGPA",
}


def _add(score: Score, what: str, found: Any, true: Any) -> None:  # noqa: ANN401 - numbers or names
    """Count an answer as right or wrong."""
    score.counts["right" if found == true else "wrong"] += 1
    if found != true:
        score.add_example(f"{what}: {found}, truly {true}")


def score_tdvmcalls(captured: CapturedRun) -> Score:
    """Compare the number of exits by function with those of the simulated guests.

    ``missing`` counts exits without a name or a row; in a capture without losses that has exits to
    userspace, only exits at its end are missing.
    """
    score = Score()
    true: Counter[str] = Counter()
    for call in captured.run.journal.calls:
        if call.vmcall_reason:
            true[_FUNCTIONS[call.vmcall_reason]] += id(call) in captured.exits
    rows = captured.findings.tdvmcalls.filter(pl.col("basis") != "unnamed")
    found = dict(rows.group_by("function").agg(pl.col("n_exits").sum()).iter_rows())
    for function in sorted({*true, *found}):
        have, n = found.get(function, 0), true[function]
        score.counts["right"] += min(have, n)
        score.counts["missing"] += max(0, n - have)
        score.counts["wrong"] += max(0, have - n)
        if have > n:
            score.add_example(f"{function}: {have} exits, truly {n}")
    return score


def score_accept_rates(captured: CapturedRun) -> Score:
    """Compare pages and busy answers of each vCPU with the run, for complete captures."""
    score = Score()
    if not captured.cell.is_clean or captured.cell.probes not in _WITH_ENTRIES:
        return score
    vcpus = {state.thread.tid for vm in captured.run.vms for state in vm.vcpus}
    calls = [
        call
        for call in captured.run.journal.calls
        if call.leaf in _FAULT and call.thread is not None and call.thread.tid in vcpus
        if id(call) in captured.returns
    ]
    entered = {
        c.thread.tid for c in captured.run.journal.calls if c.leaf == "TDH.VP.ENTER" and c.thread
    }
    given = [call for call in calls if call.leaf == _AUG and call.status == abi.SUCCESS]
    rows = captured.findings.accept_rates.filter(pl.col("tid").is_not_null())
    last = max((call.end_ns for call in given), default=-1)
    for tid in sorted(vcpus & entered):
        own = [call for call in calls if call.thread is not None and call.thread.tid == tid]
        pages = sum(512**call.level for call in own if call in given)
        of_vcpu = rows.filter(tid=tid)
        _add(score, f"pages of {tid}", of_vcpu["n_pages"].sum(), pages)
        for name, operand in (("n_busy_tree", "SEPT_TREE"), ("n_busy_entry", "RCX")):
            n = _n_busy((call for call in own if call.end_ns <= last), operand)
            _add(score, f"{name} of {tid}", of_vcpu[name].sum(), n)
    return score


def _n_busy(calls: Iterable[Call], operand: str) -> int:
    return sum(call.status == abi.OPERAND_BUSY | abi.OPERAND[operand] for call in calls)


def score_boot_phases(captured: CapturedRun) -> Score:
    """Compare the start of each phase of a TD with the run, for complete captures."""
    score = Score()
    if (
        not captured.cell.is_clean
        or captured.cell.probes not in _WITH_ENTRIES
        or not captured.cell.vp_enter
    ):
        return score
    step = captured.trace.provenance.sources[0].clock_resolution_ns
    rows = captured.findings.boot_phases
    marks = any(seen.spec.name == "kvm_pio" for seen in captured.lines.values())
    for vm, spec in zip(captured.run.vms, captured.run.scenario.tds, strict=False):
        if not spec.build or spec.count > 1:
            continue
        true = _true_begins(captured, vm.number, marks=marks)
        own = rows.filter(td_id=td_address(vm.number))
        found = dict(own.select(pl.col("phase").cast(pl.String), "start_ns").iter_rows())
        for phase in sorted({*true, *found}):
            have, when = found.get(phase), true.get(phase)
            near = have is not None and when is not None and abs(have - when) <= step
            _add(score, f"{phase} of TD {vm.number}", when if near else have, when)
    return score


def _true_begins(captured: CapturedRun, td: int, *, marks: bool) -> dict[str, int]:
    """Return the start of each phase of a TD in ns, on the clock of the trace."""
    calls = [c for c in captured.run.journal.calls if c.td is not None and c.td.number == td]
    leaves = {call.leaf for call in calls}

    def first(*names: str, since: int = 0) -> int:
        return min(c.start_ns for c in calls if c.leaf in names and c.start_ns >= since)

    begins = {"build": first("TDH.MNG.CREATE"), "measure": first("TDH.MEM.PAGE.ADD")}
    begins["finalize"] = first("TDH.MR.FINALIZE")
    ready = max(c.end_ns for c in calls if c.leaf == "TDH.MR.FINALIZE")
    pios = [e.ts_ns for e in captured.run.journal.events if e.name == "kvm_pio"] if marks else []
    since = pios[-1] + 1 if pios else ready
    augs = sorted((c.start_ns, c.end_ns) for c in calls if c.leaf == _AUG and c.start_ns >= since)
    running = since
    if augs:
        begins["accept"] = since if pios else augs[0][0]
        running = augs[0][1]
        for start, end in augs:
            if start - running > 10_000_000:
                break
            running = max(running, end)
    if augs or pios:
        begins["firmware"] = ready
    begins["running"] = running
    if "TDH.MNG.VPFLUSHDONE" in leaves:
        begins["teardown"] = first("TDH.MNG.VPFLUSHDONE")
    return {phase: CLOCK_START_NS + ns for phase, ns in begins.items()}


def score_module_updates(captured: CapturedRun) -> Score:
    """Compare each update with the run, for captures with entries and returns of SEAMCALLs."""
    score = Score()
    if captured.cell.probes != "capture-seamcalls" or not captured.cell.is_clean:
        return score
    n_cpus = captured.run.scenario.cpus
    calls = captured.run.journal.loader_calls
    whole = [calls[at : at + n_cpus] for at in range(0, len(calls) - n_cpus + 1, n_cpus)]
    step = captured.trace.provenance.sources[0].clock_resolution_ns
    rows = captured.findings.module_updates.filter(n_cpus=n_cpus)
    _add(score, "updates", rows.height, len(whole))
    for row, own in zip(rows.iter_rows(named=True), whole, strict=False):
        for name, at in (("start_ns", own[0].start_ns), ("end_ns", own[-1].end_ns)):
            true = CLOCK_START_NS + at
            _add(score, name, true if abs(row[name] - true) <= step else row[name], true)
        _add(score, "stopped", row["stopped"], "all")
    return score
