"""Which vCPUs were in their guest while an SEPT entry was found locked?"""

from __future__ import annotations

import numpy as np
import polars as pl

from tdxtrace.analysis.causes import keys
from tdxtrace.analysis.causes.conflicts import VP_ENTER
from tdxtrace.analysis.causes.overlaps import Spans, meetings

INSIDE = {"attempt": pl.UInt32, "holder": pl.UInt32, "overlap_ns": pl.Int64}


def guests_inside(done: pl.DataFrame, attempts: pl.Series, slack_ns: int) -> pl.DataFrame:
    """Find the entries of a TD whose guest may have run during each attempt on that TD.

    A guest takes the lock of an SEPT entry in TDG.MEM.PAGE.ACCEPT, ATTR.RD and ATTR.WR, for
    which no host call shows; all that a trace has is that its vCPU was in.

    Args:
        done: What the threads of one source did.
        attempts: Rows of ``done``.
        slack_ns: Resolution of the clock.

    Returns:
        Columns of INSIDE, one row per attempt and entry.
    """
    rows = attempts.to_numpy().astype(np.intp)
    entries = np.flatnonzero((done["leaf"] == VP_ENTER).to_numpy())
    asked_key, held_key = keys.keys(done, "td", rows, entries)
    begins, ends = done["begins"].to_numpy(), done["ends"].to_numpy()
    tid = done["tid"].fill_null(-1).to_numpy()
    mine, theirs = np.flatnonzero(asked_key >= 0), np.flatnonzero(held_key >= 0)
    rows, entries = rows[mine], entries[theirs]
    asked = Spans(asked_key[mine], begins[rows], ends[rows])
    held = Spans(held_key[theirs], begins[entries], ends[entries])
    parts = [pl.DataFrame(schema=INSIDE)]
    for i, j in meetings(asked, held, slack_ns):
        attempt, entry = rows[i], entries[j]
        other = tid[attempt] != tid[entry]
        attempt, entry = attempt[other], entry[other]
        overlap = np.minimum(ends[attempt], ends[entry]) - np.maximum(
            begins[attempt], begins[entry]
        )
        columns = {"attempt": attempt, "holder": entry, "overlap_ns": overlap}
        parts.append(pl.DataFrame(columns, schema_overrides=INSIDE))
    return pl.concat(parts)
