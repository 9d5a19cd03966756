"""Retry chains of calls that go on coming: those that ended, and those in flight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import polars as pl

from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS

# A thread that asked for something and was not heard of for so long is not coming back to
# it.  A choice; what is given up so is counted.
_STALE_NS: Final = 60 * 1_000_000_000
# Chains in flight: two at most of a thread (a fault and an entry), so this is 32,768 vCPUs.
_MOST_IN_FLIGHT: Final = 1 << 16
_NONE_BEFORE: Final = pl.DataFrame(
    schema={"seq": pl.UInt64, "attempts": pl.UInt32, "busy": pl.UInt32, "began": pl.Int64}
)


@dataclass(slots=True)
class Chains:
    """Joins attempts across looks, keeping of each chain in flight only its last call.

    The chains are those of :func:`tdxtrace.analysis.retry_chains.retry_chains` over the whole,
    but: ``resolved_elsewhere`` is told only where the other call came in the same look, and is
    ``abandoned`` else; ``n_segments`` and ``identity`` are those of the last look, and ``td_id``
    is not filled in from calls of other looks; a chain not heard of for 60 s of trace time is
    given up, and counted.
    """

    n_given_up: int = 0
    _last: pl.DataFrame = field(default_factory=SEAMCALLS.empty)
    """The last call of each chain in flight."""
    _before: pl.DataFrame = field(default_factory=_NONE_BEFORE.clone)
    """Of each of those: attempts and busy answers before it, and when the chain began."""

    def feed(
        self, seamcalls: pl.DataFrame, losses: pl.DataFrame, now_ns: int | None
    ) -> pl.DataFrame:
        """Take calls; return the ``retry_chains`` rows of the chains that ended.

        Args:
            seamcalls: Calls that returned since the last time.
            losses: What was lost since then.
            now_ns: Time of the newest event.
        """
        calls = pl.concat([self._last, seamcalls], how="diagonal")
        if calls.is_empty():
            return RETRY_CHAINS.empty()
        chains = self._whole(retry_chains(calls, losses))
        flying = (pl.col("cut_by") == "trace_end").fill_null(False)
        if _ends_in_loss(losses):
            flying = pl.lit(False)
        in_flight, ended = chains.filter(flying), chains.filter(~flying)
        if now_ns is not None:
            stale = in_flight.filter(pl.col("end_ns") < now_ns - _STALE_NS)
            in_flight = in_flight.filter(pl.col("end_ns") >= now_ns - _STALE_NS)
            excess = in_flight.height - _MOST_IN_FLIGHT
            if excess > 0:
                in_flight = in_flight.sort("end_ns").tail(_MOST_IN_FLIGHT)
            self.n_given_up += stale.height + max(0, excess)
        self._keep(calls, in_flight)
        return ended

    @property
    def n_in_flight(self) -> int:
        """Chains in flight."""
        return self._last.height

    @property
    def most_in_flight(self) -> int:
        """Attempts so far of the chain in flight that has most; 0 if there is none."""
        most = self._before["attempts"].max()
        return most + 1 if isinstance(most, int) else 0

    def _whole(self, chains: pl.DataFrame) -> pl.DataFrame:
        """Add what was left out of the chains that go on."""
        before = self._before.rename({"seq": "first_seq"})
        both = chains.join(before, on="first_seq", how="left", maintain_order="left")
        earlier = pl.coalesce("began", "start_ns")
        return both.with_columns(
            took_ns=pl.col("took_ns") + (pl.col("start_ns") - earlier),
            start_ns=earlier,
            n_attempts=pl.col("n_attempts") + pl.col("attempts").fill_null(0),
            n_busy=pl.col("n_busy") + pl.col("busy").fill_null(0),
        ).select(chains.columns)

    def _keep(self, calls: pl.DataFrame, in_flight: pl.DataFrame) -> None:
        self._before = in_flight.select(
            seq="last_seq",
            attempts=pl.col("n_attempts") - 1,
            busy=(pl.col("n_busy").cast(pl.Int64) - 1).clip(0).cast(pl.UInt32),
            began="start_ns",
        )
        self._last = calls.join(self._before.select("seq"), on="seq", how="semi")


def _ends_in_loss(losses: pl.DataFrame) -> bool:
    """Whether what came last was lost: no chain can be followed beyond it."""
    kinds = losses.filter(
        pl.col("kind").cast(pl.String).is_in(["lost_events", "overwritten", "buffer_full"]),
        pl.col("end_ns").is_null(),
    )
    return not kinds.is_empty()
