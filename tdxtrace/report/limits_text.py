"""Recommended limits and replayed policies as text for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from tdxtrace.report.columns import TextTable, more_rows
from tdxtrace.report.names import VALID_FOR, leaf_label
from tdxtrace.report.units import count, duration, plural, short_duration
from tdxtrace.tables.limits import MIN_EPISODES, MIN_UNITS
from tdxtrace.tables.text import one_line, round_up_two_digits
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import leaf_name

_COUNTED: Final = re.compile(r"(?<![\d,])[\d,]++ requests?")
BASIS_WORDS: Final = {
    "observed": "counted",
    "nothing_busy": "none busy",
    "no_vm_lost": "no VM lost",
    "extrapolated": "model",
    "withheld": "withheld",
}


UNINFORMATIVE_SHARE: Final = 0.99
"""Bounds from this share on round to 100 % in two digits and give no information."""
NOT_COUNTED: Final = ("extrapolated", "withheld")
"""Bases of limits that were not counted."""


def supported_line(findings: Findings) -> str:
    """Return one line with the limit that the trace supports for the most retried leaf.

    The limit is the one for the smallest share that counting supports. Computing it needs the busy
    answers of the trace, but not their causes.

    Args:
        findings: The findings; ``limit_statements`` is used.

    Example:
        >>> import tdxtrace
        >>> supported_line(tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt")))
        'limit: PAGE.AUG at most 2.7 % need over 6.3 ms, 4.2 % over 60 attempts (95 %)'
    """
    rows = findings.limit_statements.filter(kind="smallest")
    if rows.is_empty():
        why = "has no requests" if findings.retry_chains.is_empty() else "has too few answers"
        return f"limit: none, the trace {why}"
    supported = rows.filter((pl.col("more_high") < UNINFORMATIVE_SHARE).all().over("leaf"))
    if supported.is_empty():
        return "limit: none, the trace has too few requests"
    # The first row belongs to the most retried leaf.
    leaf = supported["leaf"][0]
    by_unit = {row["unit"]: row for row in supported.filter(leaf=leaf).iter_rows(named=True)}
    attempts, time = by_unit["attempts"], by_unit["ns"]
    share = percent(attempts["more_high"])
    confidence = f"({attempts['confidence']:.0%})".replace("%", " %")
    text = f"limit: {leaf_label(leaf).removeprefix('MEM.')} at most"
    if not attempts["n_retried"]:
        return f"{text} {share} need a second attempt, none did {confidence}"
    drifting = "; on average, it changes over the recording" if attempts["drifts"] else ""
    return (
        f"{text} {percent(time['more_high'])} need over {duration(time['within'])}, "
        f"{share} over {plural(attempts['within'], 'attempt')} {confidence}{drifting}"
    )


_RARE: Final = 1e-6
"""Smaller shares are shown as "1 in N", because their many leading zeros are hard to read."""


def percent(share: float) -> str:
    """Return a share in percent, rounded up to at most two significant digits.

    Example:
        >>> percent(0.02431), percent(0.473), percent(0.00001), percent(0.999), percent(2.9e-8)
        ('2.5 %', '48 %', '0.001 %', '100 %', '1 in 34,000,000')
    """
    if 0 < share < _RARE:
        n = math.floor(1 / share + 1e-6)
        return f"1 in {n // (step := 10 ** max(len(str(n)) - 2, 0)) * step:,}"
    return f"{percent_digits(share)} %"


def percent_digits(share: float) -> str:
    """Return :func:`percent` without the percent sign, for the cells of a table."""
    if share <= 0:
        return "0"
    shown = Decimal(repr(round_up_two_digits(100 * share)))
    return f"{shown:f}".rstrip("0").rstrip(".")


def limits_text(limits: pl.DataFrame, rate: str | None = None) -> RenderableType:
    """Return recommended limits for a terminal: a line per leaf, then notes and the basis.

    Args:
        limits: The ``limits`` table.
        rate: The target rate as given by the user; None: the target is a ratio.
    """
    if limits.is_empty():
        return Text("no limits: the trace has no requests")
    named = short_leaves(limits)
    is_paced = named["bare_attempts"].is_not_null().any()
    titles = ("TDH.", "busy by", "requests", "retried", "time", "attempts", "basis")
    table = _table(
        (*titles[:5], "bare", *titles[5:]) if is_paced else titles,
        (0, 4, 7, 6, 1, *((5,) if is_paced else ()), 2, 3),
    )
    listed = named.filter((pl.col("made_by") == "anyone") | _is_split())
    for _, rows in listed.group_by("leaf", "made_by", maintain_order=True):
        table.add_row(*map(Text, _limit_cells(rows, is_paced)))
    anyone = named.filter(pl.col("made_by") == "anyone")
    # Rows for which no number of requests would do are explained in the notes.
    missing = anyone.filter(
        pl.col("unit") == "attempts",
        pl.col("basis").is_in(NOT_COUNTED),
        pl.col("needed_requests").is_not_null(),
    )
    return Group(
        Text(_headline(limits, rate)),
        table,
        *_notes(listed),
        *_on_makers(named),
        *([Text("not counted; to count it"), *recording_text(missing)] if missing.height else []),
        *_bursts(named),
        *worst_text(anyone),
        *pace_text(anyone),
        Text(basis_text(anyone)),
        Text(VALID_FOR, style="dim"),
    )


def short_leaves(rows: pl.DataFrame) -> pl.DataFrame:
    """Add column ``name``: the name of the leaf without TDH., or its number."""
    named = leaf_name(pl.col("leaf")).str.strip_prefix("TDH.")
    return rows.with_columns(name=pl.coalesce(named, pl.col("leaf").cast(pl.String)))


def recording_lines(rows: pl.DataFrame) -> Iterator[str]:
    """Yield how long to record for targets that were not counted; leaves with equal text share one.

    Args:
        rows: Rows of the ``limits`` table in attempts, with ``name``.
    """
    lines: dict[str, list[str]] = {}
    for row in rows.iter_rows(named=True):
        lines.setdefault(_to_record(row), []).append(row["name"])
    for line, names in lines.items():
        yield f"{', '.join(names)}: {line}"


def recording_text(rows: pl.DataFrame) -> Iterator[Text]:
    """Yield the lines of :func:`recording_lines`, indented."""
    yield from (Text(f"  {line}") for line in recording_lines(rows))


def _to_record(row: dict[str, Any]) -> str:
    needed, needed_s = row["needed_requests"], row["needed_s"]
    if row["drifts"]:
        return "the share rises or falls over the recording; analyse a part (--since, --until)"
    if needed is None:
        _, _, why = (row["reason"] or "").partition("no number of requests would do")
        if not why and row["recorded_policy"]:
            why = f": {row['recorded_policy']}"
        return f"no number of requests would do{why.partition(';')[0]}"
    if needed_s is None:
        return f"record about {plural(rounded(needed), 'request')}"
    text = f"record about {span_text(needed_s)} at this rate ({plural(rounded(needed), 'request')})"
    if needed_s <= _LONG_S:
        return text
    return f"{text}, too long for one recording: {_hosts(needed_s)}"


_LONG_S: Final = 7 * 86_400.0
_MAX_HOSTS: Final = 10_000


def _hosts(seconds: float) -> str:
    """Return the number of hosts, and the time that each must record."""
    if seconds > _MAX_HOSTS * _LONG_S:
        return "no fleet can support it by counting"
    hosts = 10 if seconds <= 10 * _LONG_S else 1000 if seconds <= 1000 * _LONG_S else _MAX_HOSTS
    return f"{hosts:,} hosts for {span_text(seconds / hosts)}"


def rounded(n: int) -> int:
    """Round a number up to two significant digits.

    Example:
        >>> rounded(12_842_537), rounded(4494), rounded(7)
        (13000000, 4500, 7)
    """
    return round(round_up_two_digits(n)) if n else 0


_SPANS: Final = (
    (365.25 * 86_400.0, "year"),
    (86_400.0, "day"),
    (3_600.0, "hour"),
    (60.0, "min"),
    (1.0, "s"),
    (1e-3, "ms"),
)


def span_text(seconds: float) -> str:
    """Return a duration as text, rounded up to at most two significant digits.

    Example:
        >>> span_text(0.2), span_text(230.0), span_text(9e4), span_text(8e9)
        ('200 ms', '4 min', '25 hours', '260 years')
    """
    for place, (step, name) in enumerate(_SPANS):
        # Below two of a unit the next smaller unit is more precise; seconds are an exception.
        if seconds >= (step if name == "s" else 2 * step) or place == len(_SPANS) - 1:
            n = rounded(math.ceil(seconds / step - 1e-9) or 1)
            return f"{n:,} {name}" if name in ("min", "s", "ms") else plural(n, name)
    raise AssertionError  # pragma: no cover - the last step ends the loop


def pace_text(anyone: pl.DataFrame) -> list[Text]:
    """Return the warning that traced attempts are slower than others; empty without retries.

    Args:
        anyone: Rows of the ``limits`` table with ``made_by`` anyone, with ``name``.
    """
    rows = anyone.filter(pl.col("unit") == "ns", pl.col("pace_ns").is_not_null())
    if rows.is_empty():
        return []
    row = rows.row(0, named=True)
    text = (
        f"a traced attempt takes longer than one on a bare kernel (TDH.{row['name']}: "
        f"{short_duration(round(row['pace_ns']))} here): the same time is more attempts there"
    )
    if row["bare_attempts"] is None and row["limit"] is not None:
        text += "; --pace TIME converts them"
    return [Text(text)]


def policies_text(policies: pl.DataFrame, limit: int = 0) -> RenderableType:
    """Return replayed policies for a terminal: a line per policy and leaf, then the unknowns.

    Args:
        policies: The ``policies`` table.
        limit: Maximum number of rows; 0: all.
    """
    if policies.is_empty():
        return Text("no rows")
    shown = policies.head(limit) if limit else policies
    named = short_leaves(shown)
    table = _table(("policy", "TDH.", "stops at", "exceed", "95 %", "then", "warn", "time"))
    for _, rows in named.group_by("policy", maintain_order=True):
        for place, row in enumerate(rows.iter_rows(named=True)):
            table.add_row(*map(Text, _policy_cells(row, place == 0)))
    cut = policies.height - shown.height
    more = [Text(more_rows(cut), style="dim")] if cut else []
    return Group(table, *more, *_unknown(named))


def _table(titles: tuple[str, ...], ranks: Sequence[int] | None = None) -> TextTable:
    words = {"TDH.", "policy", "busy by", "basis", "then", "stops at"}
    right = [place for place, title in enumerate(titles) if title not in words]
    return TextTable(titles, right=right, ranks=ranks)


def _limit_cells(rows: pl.DataFrame, is_paced: bool) -> tuple[str, ...]:
    by_unit = {row["unit"]: row for row in rows.iter_rows(named=True)}
    attempts, time = by_unit["attempts"], by_unit["ns"]
    limit = "-" if attempts["limit"] is None else count(attempts["limit"])
    bases = [BASIS_WORDS[row["basis"]] for row in (time, attempts)]
    return (
        attempts["name"],
        attempts["made_by"],
        count(attempts["n_requests"]),
        count(attempts["n_retried"]),
        "-" if time["limit"] is None else short_duration(time["limit"]),
        *([count(time["bare_attempts"])] if is_paced else []),
        limit,
        bases[0] if bases[0] == bases[1] else "/".join(bases),
    )


def _headline(limits: pl.DataFrame, rate: str | None) -> str:
    limits = limits.filter(pl.col("basis") != "no_vm_lost")
    if limits.is_empty():
        return f"at most {one_line(rate or '', 60)}: no call that was recorded loses a VM"
    targets = limits["target"].unique()
    low, high = float(targets.min()), float(targets.max())  # type: ignore[arg-type]
    target = percent(low) if low == high else f"{percent(low)} to {percent(high)}"
    confidence = float(limits["confidence"][0])
    text = (
        f"at most {target} of the requests may need more, with {100 * confidence:.4g} % confidence"
    )
    if rate is None:
        return text if limits["leaf"].n_unique() == 1 else f"{text} for each leaf alone"
    n = limits["leaf"].n_unique()
    return (
        f"at most {one_line(rate, 60)}, for {plural(n, 'leaf', 'leaves')} together with "
        f"{100 * (1 - (1 - confidence) * n):.4g} % confidence: {text}"
    )


def _is_split() -> pl.Expr:
    """Return whether the row's leaf has a separate limit for host or guest."""
    is_known = (pl.col("made_by") != "anyone") & ~pl.col("basis").is_in(["withheld", "no_vm_lost"])
    return is_known.any().over("leaf")


def _on_makers(named: pl.DataFrame) -> list[Text]:
    """Return the reason why separate limits for host and guest are withheld, if they are."""
    missing = named.filter(~_is_split() & (pl.col("made_by") != "anyone"))
    if missing.is_empty():
        return []
    reasons = missing["reason"].drop_nulls()
    reasons = reasons.filter(reasons.str.starts_with("causes of busy answers unknown"))
    reason = reasons[0] if len(reasons) else "for the same reasons"
    leaves = missing["name"].unique(maintain_order=True)
    which = "" if len(leaves) == named["name"].n_unique() else ", ".join(leaves) + " "
    return [Text(f"separate limits for host and guest {which}withheld: {reason}")]


def _notes(named: pl.DataFrame) -> list[Text]:
    """Return each reason or warning once, with its leaves, and a line for each fitted tail."""
    reasons = named.filter(pl.col("reason").is_not_null(), pl.col("unit") == "attempts")
    # The needed recording is printed in its own list below.
    reasons = reasons.with_columns(pl.col("reason").str.replace("; no number of requests .*$", ""))
    notes = []
    for (reason,), rows in reasons.group_by("reason", maintain_order=True):
        leaves = ", ".join(rows["name"].unique(maintain_order=True))
        makers = rows["made_by"].unique(maintain_order=True)
        who = "" if makers.to_list() == ["anyone"] else f" ({', '.join(makers)})"
        notes.append(Text(f"{leaves}{who}: {reason}"))
    models = named.filter(pl.col("model").is_not_null(), pl.col("unit") == "attempts")
    notes += [
        Text(
            f"{row['name']} ({row['made_by']}): {row['model'].replace('_', ' ')} tail above "
            f"{row['threshold']:,}, shape {row['shape']:.2g}, fit p = {row['goodness']:.2g}; "
            f"estimate {row['estimate']:,}, between {row['estimate_low']:,} and "
            + (f"{row['estimate_high']:,}" if row["estimate_high"] is not None else "no bound")
        )
        for row in models.iter_rows(named=True)
    ]
    return notes


def _bursts(named: pl.DataFrame) -> list[Text]:
    """Return the number of retried requests and of their bursts by leaf."""
    retried = named.filter(
        pl.col("made_by") == "anyone", pl.col("unit") == "attempts", pl.col("n_retried") > 0
    )
    parts = [
        f"{name} {n:,} in {episodes:,}"
        for name, n, episodes in retried.select("name", "n_retried", "n_episodes").iter_rows()
    ]
    text = f"retried requests in bursts, each counted as one observation: {', '.join(parts)}"
    few = retried.filter(pl.col("n_episodes") < MIN_EPISODES)["name"].to_list()
    if few:
        text += (
            f"; fewer than {MIN_EPISODES} for {', '.join(few)}: if rare bursts are larger, bounds "
            "are too low"
        )
    return [Text(text)] if parts else []


def basis_text(anyone: pl.DataFrame) -> str:
    """Return the data basis of the limits: requests, busy answers, time, TDs, losses.

    Args:
        anyone: Rows of the ``limits`` table with ``made_by`` anyone.
    """
    whole = anyone.filter(pl.col("unit") == "attempts")
    first = whole.row(0, named=True)
    seconds = first["observed_s"]
    span = "unknown duration" if seconds is None else duration(round(seconds * 1e9))
    tds = max(whole["n_tds"].to_list(), default=0)
    n_losses = first["n_losses"]
    return (
        f"based on {plural(int(whole['n_requests'].sum()), 'request')}, "
        f"{plural(int(whole['n_busy'].sum()), 'busy answer')}, {span}, {plural(tds, 'TD')}, "
        + (plural(n_losses, "loss", "losses") if n_losses else "no losses")
        + ("" if tds >= MIN_UNITS else f"; fewer than {MIN_UNITS} TDs: not valid for another TD")
    )


def worst_text(anyone: pl.DataFrame) -> Iterator[Text]:
    """Yield, per retried leaf, the share above the limit in its worst TD and its worst input.

    Args:
        anyone: Rows of the ``limits`` table with ``made_by`` anyone, with ``name``.
    """
    rows = anyone.filter(pl.col("unit") == "attempts", pl.col("n_retried") > 0, pl.col("n_tds") > 1)
    for row in rows.drop_nulls("worst_td").iter_rows(named=True):
        more = "a second attempt"
        if row["limit"] is not None:
            more = f"more than {plural(row['limit'], 'attempt')}"
        text = (
            f"{row['name']}: of the worst of {row['n_tds']:,} TDs {_share(row['worst_td_ratio'])}"
        )
        if row["worst_source"] is not None:
            worst = _share(row["worst_source_ratio"])
            text += f", of the worst input ({row['worst_source'] + 1}) {worst}"
        yield Text(f"{text} needed {more}")


def _share(ratio: float) -> str:
    """Return a ratio in percent with two significant digits."""
    return f"{float(f'{100 * ratio:.2g}'):g} %"


def _policy_cells(row: dict[str, Any], is_first: bool) -> tuple[str, ...]:
    undecided = f"-{row['n_dependent']}?" if row["n_dependent"] else ""
    undecided += f"+{row['n_undecided']}?" if row["n_undecided"] else ""
    killed = f" {row['n_vms_killed']}" if row["n_vms_killed"] else ""
    return (
        row["policy"] if is_first else "",
        row["name"],
        _stops_at(row),
        count(row["n_exceeding"]) + undecided,
        f"{100 * row['exceeding_low']:.2g}-{100 * row['exceeding_high']:.3g}%",
        ("kill" if killed else row["then"]) + killed,
        count(row["n_warnings"]),
        short_duration(row["waited_ns"]),
    )


def _stops_at(row: dict[str, Any]) -> str:
    if row["rising"] is not None:
        return str(row["rising"])
    if row["budget_ns"] is not None:
        return short_duration(row["budget_ns"])
    if row["calls"] is None:
        return "never" if not row["n_exceeding"] else "other answer"
    return f"{row['calls']:,}" + (" + kick" if row["kicks"] else "")


def _unknown(named: pl.DataFrame) -> list[Text]:
    """Return what the replay cannot determine: each text once, with the policies it is for."""
    rows_of: dict[str, list[str]] = {}
    for policy, name, text in named.select("policy", "name", "not_known").iter_rows():
        for part in _COUNTED.sub("requests (?)", text).split("; "):
            rows_of.setdefault(part, []).append(f"{policy} {name}")
    notes = []
    for part, rows in rows_of.items():
        policies = list(dict.fromkeys(row.split(" ")[0] for row in rows))
        which = "" if len(rows) == named.height else f" ({', '.join(policies)})"
        notes.append(Text(f"unknown{which}: {part}", style="dim"))
    return notes
