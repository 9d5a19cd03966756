"""Incremental retry chains: those that ended in a tick, and those still in flight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import polars as pl

from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import CUTS, OUTCOMES, RETRY_CHAINS

# Time without a new attempt after which a chain is dropped from tracking, and counted.  A choice.
_STALE_NS: Final = 60 * 1_000_000_000
# Maximum chains in flight: a fault and an entry of 32,768 vCPUs.  A choice.
_MAX_IN_FLIGHT: Final = 1 << 16
_NO_EARLIER: Final = pl.DataFrame(
    schema={
        **{"seq": pl.UInt64, "attempts": pl.UInt32, "busy": pl.UInt32, "began": pl.Int64},
        "left": pl.Boolean,
    }
)


@dataclass(slots=True)
class ChainTracker:
    """Joins attempts across ticks; of each chain in flight only the last call is kept.

    The chains are those that :func:`tdxtrace.analysis.retry_chains.retry_chains` finds in the
    whole trace, except: ``resolved_elsewhere`` needs the other call in the same tick, otherwise
    the chain is ``abandoned`` and has no ``settled_seq``; ``first_seq``, ``n_segments`` and
    ``identity`` are those of the last tick; ``td_id`` is not inferred from calls of other ticks;
    a chain without a new attempt for 60 s of trace time is dropped, and counted, unless its
    thread began another request meanwhile: then it is ``abandoned``, until when it is in flight.
    """

    n_given_up: int = 0
    """Chains dropped."""
    _last: pl.DataFrame = field(default_factory=SEAMCALLS.empty)
    """The last call of each chain in flight."""
    _earlier: pl.DataFrame = field(default_factory=_NO_EARLIER.clone)
    """For each of these: attempts and busy answers before it, start of the chain, and whether its
    thread began another request since."""

    def feed(
        self, seamcalls: pl.DataFrame, losses: pl.DataFrame, now_ns: int | None
    ) -> pl.DataFrame:
        """Add calls; return the ``retry_chains`` rows of the chains that ended.

        Args:
            seamcalls: Calls that returned since the last tick.
            losses: Losses since the last tick.
            now_ns: Time of the newest event.
        """
        calls = pl.concat([self._last, seamcalls], how="diagonal")
        if calls.is_empty():
            return RETRY_CHAINS.empty()
        chains = self._with_earlier(retry_chains(calls, losses))
        is_open = (pl.col("cut_by") == "trace_end").fill_null(False)
        is_open |= pl.col("outcome") == "abandoned"
        if _ends_in_loss(losses):
            is_open = pl.lit(False)
        in_flight, ended = chains.filter(is_open), chains.filter(~is_open)
        if now_ns is not None:
            is_stale = pl.col("end_ns") < now_ns - _STALE_NS
            stale, in_flight = in_flight.filter(is_stale), in_flight.filter(~is_stale)
            excess = in_flight.height - _MAX_IN_FLIGHT
            if excess > 0:
                in_flight = in_flight.sort("end_ns").tail(_MAX_IN_FLIGHT)
            left = _abandoned(stale.filter("left"))
            self.n_given_up += stale.height - left.height + max(0, excess)
            ended = pl.concat([ended, left])
        self._keep(calls, in_flight)
        return ended.drop("left")

    @property
    def n_in_flight(self) -> int:
        """Number of chains in flight."""
        return self._last.height

    @property
    def max_attempts_in_flight(self) -> int:
        """Maximum attempts so far of a chain in flight; 0 if there is none."""
        most = self._earlier["attempts"].max()
        return most + 1 if isinstance(most, int) else 0

    def _with_earlier(self, chains: pl.DataFrame) -> pl.DataFrame:
        """Add the attempts of earlier ticks to chains that continue."""
        earlier = self._earlier.rename({"seq": "first_seq"})
        both = chains.join(earlier, on="first_seq", how="left", maintain_order="left")
        start = pl.coalesce("began", "start_ns")
        is_same = (pl.col("n_attempts") == 1) & pl.col("left").fill_null(False)
        return both.with_columns(
            left=(pl.col("outcome") == "abandoned") | is_same,
            took_ns=pl.col("took_ns") + (pl.col("start_ns") - start),
            start_ns=start,
            n_attempts=pl.col("n_attempts") + pl.col("attempts").fill_null(0),
            n_busy=pl.col("n_busy") + pl.col("busy").fill_null(0),
        ).select(*chains.columns, "left")

    def _keep(self, calls: pl.DataFrame, in_flight: pl.DataFrame) -> None:
        self._earlier = in_flight.select(
            seq="last_seq",
            attempts=pl.col("n_attempts") - 1,
            busy=(pl.col("n_busy").cast(pl.Int64) - 1).clip(0).cast(pl.UInt32),
            began="start_ns",
            left="left",
        )
        self._last = calls.join(self._earlier.select("seq"), on="seq", how="semi")


def _abandoned(chains: pl.DataFrame) -> pl.DataFrame:
    """Chains that their threads left for good."""
    return chains.with_columns(
        outcome=pl.lit("abandoned", pl.Enum(OUTCOMES)), cut_by=pl.lit(None, pl.Enum(CUTS))
    )


def _ends_in_loss(losses: pl.DataFrame) -> bool:
    """Whether events were lost at the end of the tick, so that every chain is cut."""
    kinds = losses.filter(
        pl.col("kind").cast(pl.String).is_in(["lost_events", "overwritten", "buffer_full"]),
        pl.col("end_ns").is_null(),
    )
    return not kinds.is_empty()
