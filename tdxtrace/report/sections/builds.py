"""Sections on the measurement of TDs, on known weaknesses of the module, and on KVM's counters."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.build_text import gaps
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Section, grid, more
from tdxtrace.report.units import count, plural, seconds, word
from tdxtrace.tables.builds import HOST_CHECKS, MEASUREMENT_LOG
from tdxtrace.tables.findings import COUNTERS
from tdxtrace.tables.trace import Findings

_MAX_ROWS: Final = 12


def measurement_log(findings: Findings) -> Section:
    """Return the section on the calls that built each TD's MRTD, by build."""
    title, about = "Measurement of TDs at build time", definition(MEASUREMENT_LOG)
    log = findings.measurement_log
    if log.is_empty():
        says = ["No call that adds to a measurement was recorded."]
        return Section("measurement_log", title, about, says)
    builds = log.partition_by("source", "td_id", "build", maintain_order=True)
    lost = findings.losses.filter(pl.col("severity") == "data_loss")
    rows = []
    for build in builds[:_MAX_ROWS]:
        source, td_id, first, last = build.select(
            pl.first("source"), pl.first("td_id"), pl.min("seq"), last=pl.max("seq")
        ).row(0)
        counts = dict(build.group_by("leaf", maintain_order=True).len().rows())
        incomplete = "; ".join(gaps(build, lost.filter(pl.col("source") == source).height))
        rows.append(
            (
                word(td_id),
                f"{first} to {last}",
                ", ".join(f"{leaf_label(leaf)} {count(n)}" for leaf, n in counts.items()),
                incomplete or "complete",
            )
        )
    table = grid(
        ("TD", "rows", "calls", "complete"),
        rows,
        caption="To compare two builds of one image: tdxtrace measurement-log TRACE, and diff.",
        more=more(len(builds) - len(rows), "measurement-log"),
    )
    says = [f"Recorded: {plural(len(builds), 'build')}, {plural(log.height, 'call')}."]
    return Section("measurement_log", title, about, says, grids=[table])


def host_checks(findings: Findings) -> Section:
    """Return the section on known weaknesses of the module release named in a kernel log."""
    title, about = "Known weaknesses of the TDX module", definition(HOST_CHECKS)
    checks = findings.host_checks
    if checks.is_empty():
        says = ["No kernel log with a message about TDX was given (--dmesg)."]
        return Section("host_checks", title, about, says)
    says = []
    for version, rows in checks.group_by("module_version", maintain_order=True):
        affected = rows.filter(affected="yes")["weakness"].to_list()
        unknown = rows.filter(affected="unknown").height
        if version[0] is None:
            says.append("The kernel log does not name the release of the module.")
            continue
        text = ", ".join(name.replace("_", " ") for name in affected) or "none that is known"
        more_text = f"; {plural(unknown, 'weakness', 'weaknesses')} undecided" if unknown else ""
        says.append(f"TDX module {version[0]} has: {text}{more_text}.")
    table = grid(
        ("weakness", "affected", "module", "what it is", "source"),
        [
            (
                row["weakness"].replace("_", " "),
                row["affected"],
                row["module_version"] or "not named",
                row["meaning"],
                row["basis"],
            )
            for row in checks.head(_MAX_ROWS).iter_rows(named=True)
        ],
        more=more(checks.height - _MAX_ROWS, "host-check"),
    )
    return Section("host_checks", title, about, says, grids=[table])


def counters(findings: Findings) -> Section:
    """Return the section on the counters that were proposed for kvm->stat, by TD."""
    title, about = "Counters proposed for KVM", definition(COUNTERS)
    steps = findings.counters
    if steps.is_empty():
        return Section("counters", title, about, ["No counter of a TD was raised."])
    by_td = steps.group_by("source", "td_id", "counter", maintain_order=True).agg(
        total=pl.col("total").max(), first=pl.col("ts_ns").min(), last=pl.col("ts_ns").max()
    )
    totals = steps.group_by("counter", maintain_order=True).len().rows()
    says = [f"Steps: {', '.join(f'{name} {count(n)}' for name, n in totals)}."]
    table = grid(
        ("TD", "counter", "total", "first, s", "last, s"),
        [
            (
                word(row["td_id"]),
                row["counter"],
                count(row["total"]),
                seconds(row["first"]),
                seconds(row["last"]),
            )
            for row in by_td.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=(2, 3, 4),
        caption="Each step with its row: tdxtrace counters TRACE.",
        more=more(by_td.height - _MAX_ROWS, "counters"),
    )
    return Section("counters", title, about, says, grids=[table])
