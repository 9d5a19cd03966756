"""Answers from the findings to questions about retries that were asked on the kernel's list.

P. Bonzini, S. Christopherson and Y. Zhao asked them from September to November 2024
(lore.kernel.org, "KVM: TDX: Retry seamcall when TDX_OPERAND_BUSY with operand SEPT").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from tdxtrace.report.limits_text import UNINFORMATIVE_SHARE, percent, short_leaves
from tdxtrace.report.units import count, duration, plural
from tdxtrace.tables.pace import pace_ns
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.consequences import if_busy_is_final, kills_vm

_UNKNOWN_CONSEQUENCE: Final = "an error of that call"
_LOCKS: Final = {
    "seamcall_lock": "A spinlock of each TD around its S-EPT calls",
    "mmu_lock": "mmu_lock, taken as mainline takes it,",
}
_MAX_LEAVES: Final = 4


def questions(findings: Findings) -> list[tuple[str, str]]:
    """Return each question with its answer.

    Args:
        findings: The findings; tables about causes are computed.

    Example:
        >>> import tdxtrace
        >>> found = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> for question, answer in questions(found)[:1]:
        ...     print(question, answer[:53])
        16 attempts or 1024? MEM.PAGE.AUG: 12 % needed more than 16 (at most 18 %)
    """
    named = short_leaves(findings.limit_statements)
    rows = named.filter(pl.col("n_retried") > 0)
    if rows.is_empty():
        return [("16 attempts or 1024?", _none_retried(named))]
    return [
        ("16 attempts or 1024?", _sixteen(rows)),
        ("What breaks with 5?", _five(rows, findings)),
        ("What would a lock buy?", _lock(findings)),
        ("Is one mmu_lock round trip enough for TDH.VP.ENTER?", _round_trip(findings)),
        ("One limit, or one for each leaf?", _one_limit(rows)),
        ("In attempts, or in time?", _attempts_or_time(findings)),
    ]


def _asked(rows: pl.DataFrame, within: int) -> Iterator[dict[str, Any]]:
    """Yield the statements on ``within`` attempts of the most retried leaves."""
    asked = rows.filter(kind="asked", unit="attempts", within=within)
    yield from asked.head(_MAX_LEAVES).iter_rows(named=True)


def _needed(row: dict[str, Any]) -> str:
    """Return the observed share above the number of attempts, and its upper bound."""
    ratio, within, max_attempts = row["more_ratio"], row["within"], row["max_seen"]
    if not ratio:
        seen = f"none needed more than {within}"
    elif within < max_attempts:
        seen = f"{percent(ratio)} needed more than {within}"
    else:
        seen = f"not known beyond {count(max_attempts)}, where {percent(ratio)} were last seen busy"
    high = row["more_high"]
    bound = f"at most {percent(high)}" if high < UNINFORMATIVE_SHARE else "too few requests to say"
    return f"{seen} ({bound})"


def _none_retried(rows: pl.DataFrame) -> str:
    """Return the bounds of the leaves with most requests, of which none was busy."""
    said = [
        f"{row['name']}, {plural(row['n_requests'], 'request')}: {_needed(row)}"
        for row in _asked(rows.sort("n_requests", descending=True, maintain_order=True), 1)
    ]
    if not said:
        return "No request was answered: this trace cannot answer it."
    return f"{'; '.join(said)}. No request was retried, so no limit would have been reached."


def _sixteen(rows: pl.DataFrame) -> str:
    pairs = list(zip(_asked(rows, 16), _asked(rows, 1024), strict=True))
    parts = [
        f"{few['name']}: {_needed(few)}"
        + ("" if few["max_seen"] <= few["within"] else f", {_needed(many)}")
        + f"; the most seen was {count(few['max_seen'])}"
        for few, many in pairs
    ]
    over = [few["name"] for few, _ in pairs if few["more_ratio"] > 0 and few["max_seen"] > 16]
    verdict = (
        f"16 is too few for {', '.join(over)} in this trace."
        if over
        else "No request was seen to need more than 16."
    )
    max_attempts = max(few["max_seen"] for few, _ in pairs)
    hidden = [many["name"] for _, many in pairs if many["more_ratio"] > 0]
    if hidden and max_attempts < 1024:
        verdict += (
            f" Requests for {', '.join(hidden)} were given up, or lost from sight, before 1024: "
            "only a recording without a limit can show whether that is enough."
        )
    elif max_attempts < 1024:
        verdict += (
            f" No request was seen beyond {count(max_attempts)}: none would have reached a limit "
            "of 1024."
        )
    return f"{'; '.join(parts)}. {verdict}"


def _five(rows: pl.DataFrame, findings: Findings) -> str:
    replayed = findings.policies.filter(pl.col("policy") == "fixed-5")
    undecided = dict(replayed.select("leaf", "n_undecided").iter_rows())
    parts = []
    for row in _asked(rows, 5):
        then = if_busy_is_final().get(row["leaf"], _UNKNOWN_CONSEQUENCE)
        unknown = undecided.get(row["leaf"], 0)
        more = f", {count(unknown)} undecided" if unknown else ""
        parts.append(
            f"{row['name']}, {plural(row['n_requests'], 'request')}: {_needed(row)}{more}; "
            f"then {then}"
        )
    return "; ".join(parts) + "."


def _lock(findings: Findings) -> str:
    sums = findings.lock_values.group_by("lock", maintain_order=True).agg(
        pl.col("n_busy", "n_removed", "n_kept", "n_unknown", "n_waits", "waited_ns").sum(),
        pl.col("max_wait_ns").max(),
    )
    busy = sums.filter(pl.col("n_busy") > 0)
    if busy.is_empty():
        return "Not known: no busy answer of a call that such a lock would protect was recorded."
    return " ".join(
        f"{_LOCKS[row['lock']]} would have prevented {count(row['n_removed'])} of "
        f"{plural(row['n_busy'], 'busy answer')}, and certainly not {count(row['n_kept'])}; the "
        f"other {count(row['n_unknown'])} are unexplained. It would have cost "
        f"{plural(row['n_waits'], 'wait')}, {duration(row['waited_ns'])} in total, the longest "
        f"{duration(row['max_wait_ns'])}."
        for row in busy.iter_rows(named=True)
    )


def _round_trip(findings: Findings) -> str:
    runs = findings.entry_waits
    if runs.is_empty():
        return "Not known: no entry was refused because the S-EPT tree was busy."
    known = runs.filter(pl.col("sufficed").is_not_null())
    enough = known.filter("sufficed").height
    text = (
        f"It would have been enough for {count(enough)} of {plural(known.height, 'run')} of "
        f"refused entries whose holder is known"
    )
    if known.height > enough:
        after = int(known.filter(~pl.col("sufficed"))["n_after"].sum())
        more = plural(after, "more entry was", "more entries were")
        text += f"; in the others {more} refused after it"
    if runs.height > known.height:
        text += f"; {plural(runs.height - known.height, 'more run')} without a known holder"
    return text + "."


def _one_limit(rows: pl.DataFrame) -> str:
    """Return the limits in time by leaf, and the consequences of a last busy answer."""
    if rows["leaf"].n_unique() == 1:
        return f"Not known: only {rows['name'][0]} was retried in this trace."
    smallest = rows.filter(pl.col("kind") == "smallest", pl.col("unit") == "ns")
    informative = smallest.filter(pl.col("more_high") < _INFORMATIVE)
    parts = [
        f"{row['name']} {duration(row['within'])} (at most {percent(row['more_high'])} need more)"
        for row in informative.head(_MAX_LEAVES).iter_rows(named=True)
    ]
    limits = f"Limits in time by leaf: {', '.join(parts)}. " if parts else ""
    then = if_busy_is_final()
    kinds = {then.get(leaf, _UNKNOWN_CONSEQUENCE) for leaf in rows["leaf"].unique()}
    if len(kinds) == 1:
        return f"{limits}All retried leaves have the same consequence: {kinds.pop()}."
    fatal = rows.filter(pl.col("leaf").is_in([leaf for leaf in then if kills_vm(leaf)]))
    return (
        f"{limits}One for each, because the consequences differ. Reaching a limit for "
        f"{', '.join(fatal['name'].unique().sort())} kills the VM; the others are retried by their "
        "callers, so that their limit bounds only how long one call may take."
        if not fatal.is_empty()
        else f"{limits}One for each, because the consequences differ; none kills the VM."
    )


_INFORMATIVE: Final = 0.5
"""Limits whose share has a larger upper bound give little information."""


def _attempts_or_time(findings: Findings) -> str:
    pace = findings.retry_chains.select(pace_ns()).to_series().drop_nulls()
    if pace.is_empty():
        return "In time; the duration of attempts is not known from this trace."
    low, middle, high = (round(pace.quantile(q, "nearest") or 0) for q in (0.1, 0.5, 0.9))
    return (
        f"In time: an attempt of a retried request took {duration(middle)} in the median, and "
        f"{duration(low)} to {duration(high)} from the 10th to the 90th percentile, so that the "
        "time of a given number of attempts varies as much. The time for which a lock is held does "
        "not depend on the polling rate, but the number of attempts does, and probes slow attempts "
        "down: a bare kernel needs more attempts than counted here, but not more time."
    )
