"""Sections on a TD's life cycle: accepting memory, boot, guest calls, module updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from tdxtrace.report.charts import accept_rates as chart
from tdxtrace.report.charts.time_shares import td_label
from tdxtrace.report.names import definition
from tdxtrace.report.section import Figure, Grid, Section, grid, more
from tdxtrace.report.units import count, duration, plural, seconds, share, short_duration, total
from tdxtrace.tables.lifecycle import ACCEPT_RATES, BOOT_PHASES, MODULE_UPDATES, TDVMCALLS
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.facts import facts

_MAX_ROWS: Final = 12
_PAGES_PER_GIB: Final = 1 << 18
_PARTS: Final = {
    "guest_ns": "in the guest",
    "host_ns": "in the host",
    "call_ns": "in SEAMCALLs",
    "retry_ns": "retrying",
    "refused_ns": "refused entries",
}


def sections(findings: Findings) -> list[Section]:
    """Return the life-cycle sections that have content."""
    made = (
        accept_rates(findings),
        boot_phases(findings),
        tdvmcalls(findings),
        module_updates(findings),
    )
    return [section for section in made if section is not None]


def accept_rates(findings: Findings) -> Section | None:
    """Return the section on the rate at which TDs got memory; None if they got none."""
    rows = findings.accept_rates.filter(pl.col("tid").is_null())
    if rows.is_empty():
        return None
    by = rows.group_by("n_vcpus").agg(
        pl.len().alias("n_slices"),
        pl.col("n_pages", *_PARTS).sum(),
        ns=(pl.col("end_ns") - pl.col("start_ns")).sum(),
        withheld=pl.col("withheld").first(),
    )
    by = by.filter(pl.col("n_pages") > 0).sort("n_vcpus")
    first = by.row(0, named=True)
    slowest = first["n_pages"] / first["ns"]
    return Section(
        "accept_rates",
        "How fast memory is accepted",
        definition(ACCEPT_RATES),
        [*_accepted(by), _baselines()],
        figures=_over_time(rows),
        grids=[_by_vcpus(by, slowest)],
    )


def _over_time(rows: pl.DataFrame) -> list[Figure]:
    n_tds = rows.select("source", "td_id", "tgid").n_unique()
    if rows.height < chart.MIN_SLICES:
        return []
    note = f"The {chart.MAX_TDS} TDs with most pages of {count(n_tds)}. "
    return [
        Figure(
            "accept_rates",
            "Pages given to TDs, over time",
            (note if n_tds > chart.MAX_TDS else "") + "Hover for what limits the rate.",
            lambda: chart.pages_over_time(rows),
        )
    ]


def _accepted(by: pl.DataFrame) -> Iterator[str]:
    """Yield the rate with the most vCPUs at a time, and how these spent their time."""
    row = by.row(-1, named=True)
    rate = row["n_pages"] * 1e9 / row["ns"]
    page_ns = round(row["ns"] * row["n_vcpus"] / row["n_pages"])
    yield (
        f"{plural(row['n_vcpus'], 'vCPU')} at a time were given {rate:,.0f} pages of 4K per second "
        f"({rate / _PAGES_PER_GIB:.2g} GiB/s), {short_duration(page_ns)} of a vCPU's time per page."
    )
    if row["withheld"]:
        yield f"What limits it is not known: {row['withheld']}."
        return
    whole = row["ns"] * row["n_vcpus"]
    named = [(int(row[name]), what) for name, what in _PARTS.items()]
    shares = ", ".join(f"{share(ns, whole)} {what}" for ns, what in sorted(named, reverse=True))
    yield f"Their time: {shares}."


def _baselines() -> str:
    """Return Intel's own figures, by the number of vCPUs that accept at the same time."""
    table = facts(
        "accept_baselines", vcpus=pl.UInt32, workers=pl.UInt32, gib=pl.UInt32, seconds=pl.UInt32
    )
    table = table.with_columns(n=pl.min_horizontal("vcpus", "workers"))
    rate = pl.col("gib") * _PAGES_PER_GIB / pl.col("seconds")
    ranges = [
        f"{n} of {vcpus} vCPUs {low:,.0f} to {high:,.0f}"
        for vcpus, n, low, high in table.group_by("vcpus", "n", maintain_order=True)
        .agg(rate.min().alias("low"), rate.max().alias("high"))
        .iter_rows()
    ]
    return (
        f"Intel's tests expect, in pages of 4K per second: {'; '.join(ranges)} (intel/lkvs "
        "tdx_mem_test.sh; in whole seconds, including the guest's own work)."
    )


def _by_vcpus(by: pl.DataFrame, slowest: float) -> Grid:
    titles = ("vCPUs at a time", "slices", "pages", "pages/s", "speed-up", "per page and vCPU")
    return grid(
        titles + tuple(_PARTS.values()),
        [
            (
                count(row["n_vcpus"]),
                count(row["n_slices"]),
                count(row["n_pages"]),
                f"{row['n_pages'] * 1e9 / row['ns']:,.0f}",
                f"{row['n_pages'] / row['ns'] / slowest:.2f}",
                duration(round(row["ns"] * row["n_vcpus"] / row["n_pages"])),
                *(_part(row, name) for name in _PARTS),
            )
            for row in by.tail(_MAX_ROWS).iter_rows(named=True)
        ],
        right=range(11),
        droppable=(1, 10, 9),
        caption="Speed-up: relative to the smallest number of vCPUs at a time in this trace.",
        more=more(by.height - _MAX_ROWS, "accept-rates"),
    )


def _part(row: dict[str, Any], name: str) -> str:
    if row["withheld"] and name in ("guest_ns", "host_ns", "refused_ns"):
        return "-"
    return share(row[name], row["ns"] * row["n_vcpus"])


def boot_phases(findings: Findings) -> Section | None:
    """Return the section on the time of each TD by phase of its life; None if no TD is known."""
    rows = findings.boot_phases
    if rows.is_empty() or rows["phase"].n_unique() == 1:
        return None
    longest = rows.sort("took_ns", descending=True).row(0, named=True)
    calls, retried = total(rows, "call_ns"), total(rows, "retry_ns") + total(rows, "wait_ns")
    says = [
        f"Longest: {longest['phase']} of {td_label(longest['td_id'])}, "
        f"{short_duration(longest['took_ns'])}.",
        f"Retries took {share(retried, calls + retried)} of the time that threads spent "
        "on SEAMCALLs.",
        *(f"{row[0]}: {row[1]}." for row in _reasons(rows)),
    ]
    return Section(
        "boot_phases",
        "Where the boot's time went",
        definition(BOOT_PHASES),
        says,
        grids=[_phases(rows)],
    )


def _reasons(rows: pl.DataFrame) -> list[tuple[str, str]]:
    withheld = rows.drop_nulls("withheld").select(pl.col("phase").cast(pl.String), "withheld")
    pairs = withheld.unique(maintain_order=True).iter_rows()
    return [(str(phase), str(reason)) for phase, reason in pairs]


def _phases(rows: pl.DataFrame) -> Grid:
    titles = ("TD", "phase", "length", "SEAMCALLs", "retries", "completing", "retrying", "between")
    return grid(
        (*titles, "in the guest", "pages"),
        [
            (
                td_label(row["td_id"]),
                row["phase"],
                duration(row["took_ns"]),
                count(row["n_calls"]),
                count(row["n_retries"]),
                *(duration(row[f"{name}_ns"]) for name in ("call", "retry", "wait", "guest")),
                count(row["n_pages"]),
            )
            for row in rows.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=range(2, 10),
        droppable=(9, 7),
        caption="SEAMCALLs without VP.ENTER; their times are summed over threads.",
        more=more(rows.height - _MAX_ROWS, "boot-phases"),
    )


def tdvmcalls(findings: Findings) -> Section | None:
    """Return the section on the guests' calls of their host; None if there were none."""
    rows = findings.tdvmcalls
    if rows.is_empty():
        return None
    by = rows.group_by("function").agg(
        pl.col("n_exits", "handled_ns").sum(),
        pl.col("longest_ns").max(),
        pl.col("withheld").first(),
    )
    by = by.sort("n_exits", "function", descending=[True, False])
    span = int(rows.select(pl.col("end_ns").max() - pl.col("start_ns").min()).item())
    n = total(by, "n_exits")
    says = [f"{plural(n, 'exit')} by TDG.VP.VMCALL, {n * 1e9 / span:,.0f} per second."]
    says += [f"{why}." for why in by["withheld"].drop_nulls().unique().sort()]
    shown = grid(
        ("function", "exits", "share", "until the next entry", "longest"),
        [
            (
                row["function"],
                count(row["n_exits"]),
                share(row["n_exits"], n),
                duration(row["handled_ns"]),
                duration(row["longest_ns"]),
            )
            for row in by.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=range(1, 5),
        caption="Until the next entry: total time; for HLT, the time that the vCPU was halted.",
        more=more(by.height - _MAX_ROWS, "tdvmcalls"),
    )
    title = "Calls from guests to their host"
    return Section("tdvmcalls", title, definition(TDVMCALLS), says, grids=[shown])


def module_updates(findings: Findings) -> Section | None:
    """Return the section on updates of the TDX module; None if there were none."""
    rows = findings.module_updates
    if rows.is_empty():
        return None
    says = [_update(row) for row in rows.head(_MAX_ROWS).iter_rows(named=True)]
    title = "Updates of the TDX module"
    return Section("module_updates", title, definition(MODULE_UPDATES), says)


def _update(row: dict[str, Any]) -> str:
    took = short_duration(row["end_ns"] - row["start_ns"])
    head = (
        f"From {seconds(row['start_ns'])} s SEAMLDR.INSTALL ran on {plural(row['n_cpus'], 'CPU')} "
        f"for {took}"
    )
    if row["stopped"] == "unknown":
        return f"{head}; whether all CPUs stopped is not known: {row['withheld']}."
    if row["stopped"] == "not_all":
        return f"{head}; not all CPUs stopped: {plural(row['n_meanwhile'], 'event')} meanwhile."
    waited = ""
    if row["n_vcpus"]:
        longest = short_duration(row["longest_wait_ns"])
        waited = f"; {plural(row['n_vcpus'], 'vCPU')} waited, for up to {longest}"
    return f"{head}; all CPUs stopped, for at most {short_duration(row['stopped_ns'])}{waited}."
