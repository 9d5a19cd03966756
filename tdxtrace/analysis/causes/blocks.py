"""Calls that failed because a busy TDH.MEM.RANGE.BLOCK of their page was not retried."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tdx import word
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

_BLOCK: Final = parse_leaf("TDH.MEM.RANGE.BLOCK")[0]
# Leaves that require a page to have been blocked and tracked: the module's is_tlb_tracked.
_REQUIRE_BLOCK: Final = numbers_of(
    [
        *("TDH.MEM.PAGE.REMOVE", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE"),
        *("TDH.MEM.SEPT.REMOVE", "TDH.MEM.PAGE.RELOCATE", "TDH.MEM.RANGE.UNBLOCK"),
    ]
)
# Leaves that leave the page not blocked when they succeed.
_RESETS: Final = [
    *_REQUIRE_BLOCK,
    *numbers_of(["TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.ADD", "TDH.MEM.SEPT.ADD"]),
]
# Statuses of a range that was not blocked, or not tracked: 1.5.01 helpers.h is_tlb_tracked;
# public reports: canonical/tdx issue 213, Chen Yu on the kvm list, 2024-05-26.
NOT_PREPARED: Final = (word.TDX_TLB_TRACKING_NOT_DONE, word.TDX_GPA_RANGE_NOT_BLOCKED)
_LEVELS: Final = (0, 1, 2)
_PAGE_SHIFT: Final = 12
_LEVEL_SHIFT: Final = 9


def dropped_blocks(calls: pl.DataFrame) -> pl.DataFrame:
    """Find the calls that failed because a busy BLOCK was not retried.

    Args:
        calls: Columns row, td_id, gpa, level, leaf, status, begins (ns) of one source.

    Returns:
        Columns row (of the failed call), block (row of the last BLOCK, which was busy),
        dropped_ns and failed_ns (start of the BLOCK and of the failed call).  The caller must
        check for lost events between the two.
    """
    code = word.status_code(pl.col("status"))
    named = pl.col("td_id").is_not_null() & pl.col("gpa").is_not_null()
    failed = calls.filter(pl.col("leaf").is_in(_REQUIRE_BLOCK), code.is_in(NOT_PREPARED), named)
    if failed.is_empty():  # the common case
        return failed.select("row", block="row", dropped_ns="begins", failed_ns="begins")
    calls = calls.filter(named)
    is_block, passed = pl.col("leaf") == _BLOCK, pl.col("status") < word.ERROR_BIT
    fate = (
        pl.when(is_block & (code == word.TDX_OPERAND_BUSY))
        .then(pl.lit("dropped"))
        .when(is_block & (pl.col("status").is_null() | passed))
        .then(pl.lit("blocked"))
        .when(pl.col("leaf").is_in(_RESETS) & passed)
        .then(pl.lit("reset"))
    )
    events = calls.with_columns(fate=fate)
    dropped, blocked, reset = (
        _last_of(failed, events.filter(fate=name)) for name in ("dropped", "blocked", "reset")
    )
    blocked_ns, reset_ns = pl.col("blocked_ns"), pl.col("reset_ns")
    return (
        pl.concat(
            [
                failed.select("row", failed_ns="begins"),
                dropped.select(block="event", dropped_ns="event_ns"),
                blocked.select(blocked_ns="event_ns"),
                reset.select(reset_ns="event_ns"),
            ],
            how="horizontal",
        )
        .filter(
            pl.col("dropped_ns") > reset_ns.fill_null(-1),
            (blocked_ns < reset_ns).fill_null(blocked_ns.is_null()),
        )
        .select("row", "block", "dropped_ns", "failed_ns")
    )


def _last_of(failed: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Return the last event on each failed call's page or enclosing range: event, event_ns."""
    parts = []
    # Level 0 is always included, so that the result has its columns even without events.
    levels = {_LEVELS[0], *events["level"].fill_null(0).unique()}
    for level in filter(levels.__contains__, _LEVELS):
        shift = 1 << (_PAGE_SHIFT + _LEVEL_SHIFT * level)
        of_level = events.filter(pl.col("level").fill_null(0) == level).select(
            "td_id", at="begins", range=pl.col("gpa") // shift, event="row", event_ns="begins"
        )
        wanted = failed.select("row", "td_id", at="begins", range=pl.col("gpa") // shift)
        parts.append(
            wanted.sort("at").join_asof(
                of_level.sort("at"),
                on="at",
                by=["td_id", "range"],
                check_sortedness=False,
                allow_exact_matches=False,
            )
        )
    latest = pl.concat(parts).sort("event_ns", nulls_last=False).unique("row", keep="last")
    return failed.select("row").join(latest, on="row", how="left", maintain_order="left")
