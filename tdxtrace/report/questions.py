"""Answers to the questions of the kernel's list about retries, a paragraph each, from the findings.

The questions are those of P. Bonzini, S. Christopherson and Y. Zhao, September to November 2024
(lore.kernel.org, "KVM: TDX: Retry seamcall when TDX_OPERAND_BUSY with operand SEPT").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from tdxtrace.report.limits_text import SAYS_NOTHING, percent, short_leaves
from tdxtrace.report.units import count, duration, plural
from tdxtrace.tables.pace import pace_ns
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.consequences import if_busy_is_final, kills_vm

_UNKNOWN_CONSEQUENCE: Final = "an error of that call"
_LOCKS: Final = {
    "seamcall_lock": "A spinlock of each TD around its S-EPT calls",
    "mmu_lock": "mmu_lock, taken as mainline takes it,",
}
_MOST: Final = 4


def questions(findings: Findings) -> list[tuple[str, str]]:
    """Return each question and its answer; findings about causes are used.

    Args:
        findings: The findings.

    Example:
        >>> import tdxtrace
        >>> found = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> for question, answer in questions(found)[:1]:
        ...     print(question, answer[:53])
        16 attempts or 1024? MEM.PAGE.AUG: 12 % needed more than 16 (at most 18 %)
    """
    rows = short_leaves(findings.limit_statements.filter(pl.col("n_retried") > 0))
    if rows.is_empty():
        return [
            ("16 attempts or 1024?", "No request was retried: this trace answers none of them.")
        ]
    return [
        ("16 attempts or 1024?", _sixteen(rows)),
        ("What breaks with 5?", _five(rows, findings)),
        ("What would a lock buy?", _lock(findings)),
        ("Is one mmu_lock round trip enough for TDH.VP.ENTER?", _round_trip(findings)),
        ("One limit, or one for each leaf?", _one_limit(rows)),
        ("In attempts, or in time?", _attempts_or_time(findings)),
    ]


def _asked(rows: pl.DataFrame, within: int) -> Iterator[dict[str, Any]]:
    """Rows of the leaves retried most, for a number of attempts."""
    asked = rows.filter(kind="asked", unit="attempts", within=within)
    yield from asked.head(_MOST).iter_rows(named=True)


def _needed(row: dict[str, Any]) -> str:
    """How many needed more than the number, as far as that was seen, and at most how many do."""
    ratio, within, most = row["more_ratio"], row["within"], row["max_seen"]
    if not ratio:
        seen = f"none needed more than {within}"
    elif within < most:
        seen = f"{percent(ratio)} needed more than {within}"
    else:
        seen = f"not known beyond {count(most)}, where {percent(ratio)} were last seen busy"
    high = row["more_high"]
    bound = f"at most {percent(high)}" if high < SAYS_NOTHING else "too few requests to say"
    return f"{seen} ({bound})"


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
    most = max(few["max_seen"] for few, _ in pairs)
    hidden = [many["name"] for _, many in pairs if many["more_ratio"] > 0]
    if hidden and most < 1024:
        verdict += (
            f" Of {', '.join(hidden)} requests were given up, or lost from sight, before 1024: "
            "whether that is enough, only a recording without a limit tells."
        )
    elif most < 1024:
        verdict += (
            f" Nothing was seen beyond {count(most)}: a limit of 1024 would have met no request."
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
        return "Not known: no busy answer of a call that such a lock would go around was recorded."
    return " ".join(
        f"{_LOCKS[row['lock']]} would have prevented {count(row['n_removed'])} of "
        f"{plural(row['n_busy'], 'busy answer')}, and {count(row['n_kept'])} surely not; the other "
        f"{count(row['n_unknown'])} are unexplained. It would have cost "
        f"{plural(row['n_waits'], 'wait')}, {duration(row['waited_ns'])} in all and "
        f"{duration(row['max_wait_ns'])} the longest."
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
        text += f"; in the others {plural(after, 'entry', 'entries')} more were refused after it"
    if runs.height > known.height:
        text += f"; of {plural(runs.height - known.height, 'more run')} no holder is known"
    return text + "."


def _one_limit(rows: pl.DataFrame) -> str:
    """Whether leaves differ by more than chance: the worst and the best by their shares."""
    if rows["leaf"].n_unique() == 1:
        return f"Only {rows['name'][0]} was retried: this trace does not tell."
    smallest = rows.filter(pl.col("kind") == "smallest", pl.col("unit") == "ns")
    told = smallest.filter(pl.col("more_high") < _TELLS)
    parts = [
        f"{row['name']} {duration(row['within'])} (at most {percent(row['more_high'])} need more)"
        for row in told.head(_MOST).iter_rows(named=True)
    ]
    limits = f"Limits in time by leaf: {', '.join(parts)}. " if parts else ""
    then = if_busy_is_final()
    kinds = {then.get(leaf, _UNKNOWN_CONSEQUENCE) for leaf in rows["leaf"].unique()}
    if len(kinds) == 1:
        return f"{limits}What follows is the same for the leaves that were retried: {kinds.pop()}."
    fatal = rows.filter(pl.col("leaf").is_in([leaf for leaf in then if kills_vm(leaf)]))
    return (
        f"{limits}One for each: what follows differs. A limit for "
        f"{', '.join(fatal['name'].unique().sort())} kills the VM when it is met; the others are "
        "tried again by themselves, so that theirs bounds only how long one call may take."
        if not fatal.is_empty()
        else f"{limits}One for each: what follows differs, though none kills the VM."
    )


_TELLS: Final = 0.5
"""Above this share a limit says little of a leaf."""


def _attempts_or_time(findings: Findings) -> str:
    pace = findings.retry_chains.select(pace_ns()).to_series().drop_nulls()
    if pace.is_empty():
        return "In time; the trace does not tell how long an attempt took."
    low, middle, high = (round(pace.quantile(q, "nearest") or 0) for q in (0.1, 0.5, 0.9))
    return (
        f"In time: an attempt took {duration(middle)} in the middle, and {duration(low)} to "
        f"{duration(high)} from the 10th to the 90th percentile of retried requests, so that one "
        "number of attempts is as different a time. How long a lock is held does not depend on how "
        "often it is asked for, but the number of attempts does, and probes make each slower: "
        "attempts counted here are too few for a bare kernel, times are not."
    )
