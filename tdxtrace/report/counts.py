"""Numbers of TDs, vCPUs, requests and episodes, shared by terminal, page and mail."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from tdxtrace.report.units import plural, total
from tdxtrace.tables.trace import Findings


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals over all inputs."""

    seamcalls: int
    requests: int
    retried: int
    n_vms: int
    """Number of TDs; if no call names its TD, number of processes that made calls."""
    vms: str
    """``n_vms`` with its noun, such as "2 TDs"."""
    vcpus: int
    episodes: int
    """Number of zero-step episodes, without those of weak evidence."""


def counts(findings: Findings) -> Counts:
    """Return the totals of the findings."""
    stats = findings.leaf_stats
    of_vms = findings.vm_stats.filter(pl.col("n_requests") > 0)
    n_tds, n_vms = (of_vms.select("source", c).drop_nulls().n_unique() for c in ("td_id", "tgid"))
    return Counts(
        seamcalls=total(stats, "n_seamcalls"),
        requests=total(stats, "n_requests"),
        retried=total(stats, "retried_seamcalls"),
        n_vms=n_tds or n_vms,
        vms=plural(n_tds, "TD") if n_tds else plural(n_vms, "VM"),
        vcpus=findings.vcpu_stats.height,
        episodes=findings.zero_steps.filter(pl.col("strength") != "weak").height,
    )


def facts(findings: Findings) -> list[str]:
    """Return the totals as short texts, for the head of a page."""
    found = counts(findings)
    return [
        plural(found.seamcalls, "SEAMCALL"),
        plural(found.requests, "request"),
        f"{found.retried:,} retried",
        found.vms,
        plural(found.vcpus, "vCPU"),
        plural(found.episodes, "zero-step episode"),
    ]


def n_cut_by_losses(findings: Findings) -> int:
    """Return the number of chains that were cut by lost events."""
    if not total(findings.leaf_stats, "cut"):
        return 0
    is_cut = pl.col("cut_by") == "lost_events"
    return int(findings.scan("retry_chains").select(is_cut.sum()).collect().item())
