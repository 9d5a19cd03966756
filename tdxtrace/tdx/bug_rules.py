"""Rules that a correct kernel never breaks, whatever guests and interrupts do."""

from __future__ import annotations

from functools import cache

import polars as pl

from tdxtrace.tdx.facts import facts


@cache
def bug_rule_table() -> pl.DataFrame:
    """Return the rules, one row each.

    Returns:
        Columns rule (its name, as in ``busy_causes`` and ``broken_rules``), statement (what holds
        in a correct kernel) and source.
    """
    return facts("bug_rules")
