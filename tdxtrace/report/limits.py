"""Limits and policies for a terminal: what to do, how sure, and what is not known."""

from __future__ import annotations

import re
from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tdxtrace.report.units import count, duration, plural, short_duration
from tdxtrace.tdx.leaves import leaf_name

_COUNTED: Final = re.compile(r"(?<![\d,])[\d,]++ requests?")
_BASIS: Final = {
    "observed": "counted",
    "nothing_busy": "none busy",
    "extrapolated": "model",
    "withheld": "withheld",
}


def limits_screen(limits: pl.DataFrame) -> RenderableType:
    """Return recommended limits for reading: one line a leaf, then what they rest on.

    Args:
        limits: The ``limits`` table.
    """
    if limits.is_empty():
        return Text("no limits: the trace has no requests")
    named = limits.with_columns(name=_short(pl.col("leaf")))
    table = _table(("TDH.", "busy by", "requests", "retried", "attempts", "time", "basis"))
    told = named.filter((pl.col("made_by") == "anyone") | _is_split())
    for _, rows in told.group_by("leaf", "made_by", maintain_order=True):
        table.add_row(*map(Text, _limit_cells(rows)))
    first = limits.row(0, named=True)
    return Group(
        Text(_headline(limits)),
        table,
        *_notes(told),
        *_on_makers(named),
        *_bursts(named),
        Text(_rests_on(first, limits)),
        Text(f"would change it: more requests, {first['would_change']}", style="dim"),
    )


def policies_screen(policies: pl.DataFrame) -> RenderableType:
    """Return replayed policies for reading: one line a policy and leaf, then what is not known.

    Args:
        policies: The ``policies`` table.
    """
    if policies.is_empty():
        return Text("no rows: nothing of this kind was found")
    named = policies.with_columns(name=_short(pl.col("leaf")))
    table = _table(("policy", "TDH.", "stops at", "exceed", "95 %", "then", "warn", "time"))
    for _, rows in named.group_by("policy", maintain_order=True):
        for place, row in enumerate(rows.iter_rows(named=True)):
            table.add_row(*map(Text, _policy_cells(row, place == 0)))
    return Group(table, *_unknown(named))


def _table(titles: tuple[str, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    words = {"TDH.", "policy", "busy by", "basis", "then", "stops at"}
    for title in titles:
        table.add_column(Text(title), justify="left" if title in words else "right", no_wrap=True)
    return table


def _short(leaf: pl.Expr) -> pl.Expr:
    named = leaf_name(leaf).str.strip_prefix("TDH.")
    return pl.coalesce(named, leaf.cast(pl.String))


def _limit_cells(rows: pl.DataFrame) -> tuple[str, ...]:
    by_unit = {row["unit"]: row for row in rows.iter_rows(named=True)}
    attempts, time = by_unit["attempts"], by_unit["ns"]
    limit = "-" if attempts["limit"] is None else count(attempts["limit"])
    bases = [_BASIS[row["basis"]] for row in (attempts, time)]
    return (
        attempts["name"],
        attempts["made_by"],
        count(attempts["n_requests"]),
        count(attempts["n_retried"]),
        limit,
        "-" if time["limit"] is None else short_duration(time["limit"]),
        bases[0] if bases[0] == bases[1] else "/".join(bases),
    )


def _headline(limits: pl.DataFrame) -> str:
    targets = limits["target"].unique()
    low, high = float(targets.min()), float(targets.max())  # type: ignore[arg-type]
    target = f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"
    sure = 100 * float(limits["confidence"][0])
    return f"P(a request needs more than the limit) < {target}, with {sure:g} % confidence"


def _is_split() -> pl.Expr:
    """Whether a limit is known for the host or the guest of the row's leaf."""
    is_known = (pl.col("made_by") != "anyone") & (pl.col("basis") != "withheld")
    return is_known.any().over("leaf")


def _on_makers(named: pl.DataFrame) -> list[Text]:
    """Why limits for host and guest apart are missing, where they are."""
    missing = named.filter(~_is_split() & (pl.col("made_by") != "anyone"))
    if missing.is_empty():
        return []
    why = missing["reason"].drop_nulls().filter(missing["reason"].str.starts_with("who made"))
    told = why[0] if len(why) else "as little supported"
    leaves = missing["name"].unique(maintain_order=True)
    which = "" if len(leaves) == named["name"].n_unique() else ", ".join(leaves) + " "
    return [Text(f"for host and guest apart {which}withheld: {told}")]


def _notes(named: pl.DataFrame) -> list[Text]:
    """Why there is no limit, or what to beware of: each reason once, with its leaves."""
    told = named.filter(pl.col("reason").is_not_null(), pl.col("unit") == "attempts")
    notes = []
    for (reason,), rows in told.group_by("reason", maintain_order=True):
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
    """In how many bursts the retried requests came: these are what was counted."""
    retried = named.filter(
        pl.col("made_by") == "anyone", pl.col("unit") == "attempts", pl.col("n_retried") > 0
    )
    told = [
        f"{name} {n:,} in {episodes:,}"
        for name, n, episodes in retried.select("name", "n_retried", "n_episodes").iter_rows()
    ]
    said = f"retried requests in bursts, which are taken as wholes: {', '.join(told)}"
    return [Text(said)] if told else []


def _rests_on(first: dict[str, Any], limits: pl.DataFrame) -> str:
    whole = limits.filter(pl.col("made_by") == "anyone", pl.col("unit") == "attempts")
    seconds = first["observed_s"]
    span = "a time that is not known" if seconds is None else duration(round(seconds * 1e9))
    tds = max(whole["n_tds"].to_list(), default=0)
    return (
        f"rests on {plural(int(whole['n_requests'].sum()), 'request')}, "
        f"{plural(int(whole['n_busy'].sum()), 'busy answer')}, {span}, {plural(tds, 'TD')}, "
        + ("no losses" if not first["n_losses"] else plural(first["n_losses"], "loss"))
    )


def _policy_cells(row: dict[str, Any], is_first: bool) -> tuple[str, ...]:
    undecided = f"+{row['n_undecided']}?" if row["n_undecided"] else ""
    killed = f" {row['n_vms_killed']}" if row["n_vms_killed"] else ""
    return (
        row["policy"] if is_first else "",
        row["name"],
        _stops_at(row),
        count(row["n_exceeding"]) + undecided,
        f"{row['exceeding_low']:.1%}-{row['exceeding_high']:.1%}".replace("%-", "-"),
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
    """What replay cannot know, each thing once."""
    said: dict[str, list[str]] = {}
    for policy, name, text in named.select("policy", "name", "not_known").iter_rows():
        for part in _COUNTED.sub("requests (?)", text).split("; "):
            said.setdefault(part, []).append(f"{policy} {name}")
    notes = []
    for part, where in said.items():
        policies = list(dict.fromkeys(word.split(" ")[0] for word in where))
        whose = "" if len(where) == named.height else f" ({', '.join(policies)})"
        notes.append(Text(f"not known{whose}: {part}", style="dim"))
    return notes
