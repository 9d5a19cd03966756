"""Retry chains and busy answers of a stored trace, computed and written segment by segment.

Memory holds only the state that later calls depend on: open chains, threads, and the calls that
began while another call was in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

import polars as pl

from tdxtrace.analysis.busy_answers import EPISODE_COLUMNS, add_episodes, episodes_in_order
from tdxtrace.analysis.call_order import TIMES, BeginsOfParts, calls_in_order
from tdxtrace.analysis.retry_chains import SURVEYED, finish, start, step, survey_parts, take_answers
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tables.store import SortedFile, StoredTable
from tdxtrace.tables.temporary import TemporaryFolder
from tdxtrace.tables.trace import Trace


@dataclass(frozen=True)
class StoredChains:
    """Tables on disk, kept as long as this object, or a query of one of the tables, exists."""

    chains: StoredTable
    """The ``retry_chains`` table."""
    _unsorted_answers: SortedFile
    _folder: TemporaryFolder = field(repr=False)

    def scan_answers(self) -> pl.LazyFrame:
        """Return a query of the ``busy_answers`` table."""
        return self.answers.scan()

    @cached_property
    def answers(self) -> StoredTable:
        """The ``busy_answers`` table, created on first access."""
        narrow = RETRY_CHAINS.pick(self.chains.scan(), *EPISODE_COLUMNS)
        add = partial(add_episodes, of_chain=episodes_in_order(narrow))
        return self._unsorted_answers.finish(self._folder, add)


def store_chains(trace: Trace) -> StoredChains:
    """Compute the tables of :func:`~.retry_chains.retry_chains` for a trace, on disk.

    Args:
        trace: Event tables; its ``seamcalls`` are read in parts, twice.

    Raises:
        InputError: If the trace cannot be read, or the disk is full.
    """
    folder, begins = TemporaryFolder(), BeginsOfParts()
    chains = SortedFile(RETRY_CHAINS, folder.path / "retry_chains.parquet")
    answers = SortedFile(BUSY_ANSWERS, folder.path / "busy_answers.parquet")
    columns = (*SURVEYED, *TIMES)
    known = survey_parts(begins.record(trace.parts("seamcalls", columns)), trace.losses)
    state = start(known, answers=True)
    for calls in calls_in_order(trace.parts("seamcalls"), begins):
        chains.add(step(state, calls))
        answers.add(take_answers(state).with_columns(episode=pl.lit(0, pl.UInt32)))
    chains.add(finish(state))
    return StoredChains(chains.finish(folder), answers, folder)
