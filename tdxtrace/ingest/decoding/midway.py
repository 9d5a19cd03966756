"""Whether tracing was switched on while TDs ran: then the first requests are not whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.ingest.decoding.pairing import Index
from tdxtrace.ingest.raw import BoolArray
from tdxtrace.tdx import leaves, word

VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
_SEPT_ADD: Final = leaves.parse_leaf("TDH.MEM.SEPT.ADD")[0]
_PAGE_AUG: Final = leaves.parse_leaf("TDH.MEM.PAGE.AUG")[0]
_PAGE_ADDS: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.ADD"))
_FAULT_LEAVES: Final = leaves.numbers_of(("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"))
_NAMED: Final = leaves.numbers_of(
    ("TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.ADD", "TDH.MEM.SEPT.ADD")
    + ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE")
)
IS_NAMED: Final[BoolArray] = np.isin(np.arange(1 << 16), _NAMED)
_OF_MAPPED: Final = leaves.numbers_of(("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE"))
# A Secure EPT page has 512 entries: an entry of the next level covers 9 bits more.
_SHIFT_2M: Final = 21
_TID: Final = pl.col("tid")
_WHEN: Final = pl.coalesce("start_ns", "end_ns")
_PAGE: Final = ("td_id", "gpa")
_REFUSED: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT


_CALL: Final = (
    *("seq", "tid", "leaf", "status", "start_ns", "end_ns"),
    *("td_id", "vp_id", "gpa", "level", "page"),
)
_ENTRY: Final = ("seq", "tid", "start_ns", "end_ns")
_DONE: Final = ("leaf", "td_id", "gpa", "level", "start_ns", "end_ns")
# Successful calls that are looked at: pages used before they were made are met early.
_MAX_DONE: Final = 1 << 18


@dataclass(slots=True)
class Beginning:
    """What the calls and entries of a source tell of its beginning, batch by batch.

    Any of these shows that TDs ran before the capture began: a vCPU that handles a
    fault before it was seen to enter, is refused by zero-step mitigation at its first
    entry, or comes out without having gone in; a call that returns without having
    started; a page that is blocked or removed but was not seen to be added, or added
    where no Secure EPT page was, though such calls were captured.  None of them proves
    the contrary.
    """

    _has_entries: bool = False
    _vcpus: set[int] = field(default_factory=set)
    _calls: pl.DataFrame | None = None
    """The first call of each thread."""
    _since: int | None = None
    """When the last of them was, and of which threads they are, if that was asked for."""
    _tids: frozenset[int] = frozenset()
    _entries: pl.DataFrame | None = None
    _done: list[pl.DataFrame] = field(default_factory=list)
    _n_done: int = 0

    def look(self, seamcalls: pl.DataFrame, threads: pl.DataFrame) -> None:
        """Look at further ``seamcalls`` rows and at their :func:`threads_of`."""
        self._calls = _first_of_threads(self._calls, seamcalls, threads, _CALL)
        self._since = None

    def knows(self, seamcalls: pl.DataFrame, threads: pl.DataFrame) -> bool:
        """Whether all threads are known, with first calls before any of these, which are whole."""
        if self._calls is None:
            return False
        if self._since is None:
            self._since = int(self._calls.select(_WHEN.max()).item())
            self._tids = frozenset(self._calls["tid"])
        least = int(seamcalls["start_ns"].to_numpy().min())
        return least > self._since and self._tids.issuperset(threads["tid"].to_list())

    def look_at_done(
        self, seamcalls: pl.DataFrame, threads: pl.DataFrame, done: Index | None = None
    ) -> None:
        """Look at which threads enter vCPUs and which calls were done: ``done``, if known."""
        self._has_entries |= seamcalls["start_ns"].null_count() < seamcalls.height
        if threads["enters"].any():
            self._vcpus |= set(threads["tid"].filter(threads["enters"]).drop_nulls())
        if self._n_done >= _MAX_DONE:
            return
        rows = _done_of(seamcalls) if done is None else done
        made = pl.DataFrame([seamcalls[name].gather(rows) for name in _DONE])
        made = made.filter(pl.col("gpa").is_not_null())
        self._done.append(made)
        self._n_done += made.height

    def look_at_entries(self, vm_entries: pl.DataFrame) -> None:
        """Look at further ``vm_entries`` rows."""
        threads = vm_entries.group_by("tid").agg(when=_WHEN.min())
        self._entries = _first_of_threads(self._entries, vm_entries, threads, _ENTRY)

    def is_midway(self) -> bool:
        """Tell whether the capture, which lost nothing, began while TDs ran."""
        if self._entries is not None and self._entries["start_ns"].is_null().any():
            return True
        if self._calls is None:
            return False
        signs = (
            _TID.is_in(list(self._vcpus)) & pl.col("leaf").is_in(_FAULT_LEAVES),
            (pl.col("leaf") == VP_ENTER) & (pl.col("status") == _REFUSED),
            bare_return() & self._has_entries,
        )
        if self._calls.select(pl.any_horizontal(sign.any() for sign in signs)).item():
            return True
        done = pl.concat(self._done)
        return _unmapped_before(done) or _without_sept_page(done)


def _done_of(seamcalls: pl.DataFrame) -> Index:
    """The calls of pages without an error."""
    is_done = seamcalls["status"].fill_null(word.ERROR_BIT).to_numpy() < word.ERROR_BIT
    is_done &= IS_NAMED[seamcalls["leaf"].to_numpy()]
    return np.flatnonzero(is_done)


def bare_return() -> pl.Expr:
    """A return without entry, which names nothing: not a one-line probe with arguments."""
    names = ("gpa", "td_id", "vp_id", "page")
    nothing = pl.all_horizontal(pl.col(name).is_null() for name in names)
    return pl.col("start_ns").is_null() & nothing


def threads_of(seamcalls: pl.DataFrame, **more: pl.Expr) -> pl.DataFrame:
    """One row per thread: when its first call was, whether it enters a vCPU, and what is asked."""
    enters = (pl.col("leaf") == VP_ENTER).any()
    return seamcalls.group_by("tid").agg(when=_WHEN.min(), enters=enters, **more)


def _first_of_threads(
    known: pl.DataFrame | None,
    rows: pl.DataFrame,
    threads: pl.DataFrame,
    columns: tuple[str, ...],
) -> pl.DataFrame:
    """The first row of each thread, of those known and further ``rows`` with their ``threads``."""
    if known is not None:
        # Rows come in order: hardly ever is one of them before those that are known.
        since = known.select("tid", since=_WHEN)
        fresh = pl.col("since").is_null() | (pl.col("when") <= pl.col("since"))
        beside = threads.lazy().join(since.lazy(), on="tid", how="left")
        threads = beside.filter(fresh & _TID.is_not_null()).collect()
        if threads.is_empty():
            return known
        rows = rows.filter(_TID.is_in(threads["tid"].implode()))
    told = rows.select(columns)
    first = told.filter(_TID.is_not_null() & (_WHEN.min().over("tid") == _WHEN))
    both = first if known is None else pl.concat([known, first])
    return both.sort(_WHEN, "seq").unique(subset="tid", keep="first")


def _unmapped_before(done: pl.DataFrame) -> bool:
    """Whether a page was blocked or removed that was not seen to be added."""
    used = done.filter(pl.col("leaf").is_in(_OF_MAPPED))
    added = done.filter(pl.col("leaf").is_in(_PAGE_ADDS))
    return _earlier(used, added, _PAGE)


def _without_sept_page(done: pl.DataFrame) -> bool:
    """Whether a 4K page was added in 2 MB for which no Secure EPT page was seen to be."""
    region = ("td_id", "region")
    numbered = done.with_columns(region=pl.col("gpa") // (1 << _SHIFT_2M))
    pages = (pl.col("leaf") == _PAGE_AUG) & (pl.col("level") == 0)
    tables = (pl.col("leaf") == _SEPT_ADD) & (pl.col("level") == 1)
    return _earlier(numbered.filter(pages), numbered.filter(tables), region)


def _earlier(used: pl.DataFrame, made: pl.DataFrame, key: tuple[str, str]) -> bool:
    """Whether something was used before it was made, though making was captured.

    Its thread may be held up on the way back from making it, and others use it meanwhile:
    only what was used before its making even began shows anything.
    """
    if used.is_empty() or made.is_empty():
        return False
    uses = used.group_by(key).agg(when=pl.col("end_ns").min())
    makes = made.group_by(key).agg(began=_WHEN.min())
    both = uses.join(makes, on=key, how="left", nulls_equal=True)
    before = pl.col("began").is_null() | (pl.col("when") < pl.col("began"))
    return bool(both.select(before.any()).item())
