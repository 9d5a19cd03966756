"""Export of a trace for ui.perfetto.dev: threads, SEAMCALLs, retry chains, losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, Final

import polars as pl

from tdxtrace.errors import InputError
from tdxtrace.report.perfetto_packets import PacketWriter, Slice
from tdxtrace.report.units import word
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tdx.exit_reasons import exit_reason_name
from tdxtrace.tdx.leaves import leaf_name
from tdxtrace.tdx.loader import loader_leaf_name, loader_status_name
from tdxtrace.tdx.status import describe_status, status_name

if TYPE_CHECKING:
    from collections.abc import Callable


_HEX: Final = frozenset(
    {"td_id", "vp_id", "gpa", "page", "error_code", "info1", "rip", "port", "value"}
)
_CHAINS: Final = "retry chain"
_CALLS: Final = "SEAMCALL"
_GUEST: Final = "guest"
_ZERO_STEPS: Final = "zero-step"
_FAULTS: Final = "page faults"
_EVENTS: Final = "host events"
_LOADER: Final = "P-SEAMLDR"
_LOSSES: Final = "losses"
_ORDER: Final = (_CHAINS, _CALLS, _GUEST, _ZERO_STEPS, _FAULTS, _EVENTS, _LOADER, _LOSSES)
# Details about the cause of a busy attempt.
_CAUSE: Final = ("cause", "confidence", "resource", "holder", "holder_tid", "holder_seq", "rule")


def write_perfetto(trace: Trace, findings: Findings, file: IO[bytes]) -> int:
    """Write the events of ``trace`` and its findings as a Perfetto trace.

    Each thread has tracks for its retry chains (a slice from the first attempt to the last), its
    SEAMCALLs (slices named by leaf and status, with the cause of a busy answer), its guest
    execution, its zero-step episodes, page faults and other events.  Flows connect the attempts at
    one request, and a call that held a lock with each attempt that it made busy.  Losses have
    their own track.  Times are those of the trace's clock; a call with only an entry or only a
    return recorded is an instant.

    Args:
        trace: The events; with a selection, the selected rows.
        findings: Findings of the same selection.
        file: File opened for writing bytes.

    Returns:
        Number of packets written.

    Raises:
        InputError: If the package ``perfetto`` is not installed.

    Sources:
        perfetto, protos/perfetto/trace/track_event/track_event.proto and
        track_descriptor.proto; docs/reference/synthetic-track-event.md.
    """
    try:
        packets = PacketWriter(file, _ORDER)
    except ImportError:
        raise InputError(
            "the Perfetto export needs the package perfetto: pip install '.[perfetto]' in a "
            "checkout"
        ) from None
    for number, source in enumerate(trace.provenance.sources):
        _describe_threads(packets, trace, number, one_line(source.path.rpartition("/")[2], 60))
    answers = first_causes(findings.busy_causes, findings.retry_chains.height + 1)
    calls = with_chains(trace.seamcalls, findings.retry_chains)
    for rows, make in (
        (with_lanes(findings.retry_chains.filter(pl.col("n_attempts") > 1)), _chain),
        (with_causes(calls, answers), _call),
        (with_causes(trace.vm_entries, answers), _entry),
        (findings.zero_steps, _zero_step),
        (trace.page_faults, _fault),
        (trace.host_events, _host_event),
        (trace.loader_calls, _loader_call),
    ):
        for made in _slices(rows, make):
            packets.add(made)
    for row in findings.losses.iter_rows(named=True):
        packets.add(_loss(row, trace.provenance.sources[row["source"]].first_ns or 0))
    return packets.n_packets


def _describe_threads(packets: PacketWriter, trace: Trace, source: int, name: str) -> None:
    """Describe every thread once, in the order of the threads table, with its vCPU number."""
    of = pl.col("source") == source
    vcpus = dict(
        trace.vm_entries.filter(of, pl.col("vcpu_id").is_not_null())
        .select("tid", "vcpu_id")
        .unique(maintain_order=True)
        .rows()
    )
    for tid, tgid, comm in (
        trace.threads.filter(of)
        .unique("tid", keep="last", maintain_order=True)
        .select("tid", "tgid", "comm")
        .iter_rows()
    ):
        vcpu = f"vCPU {vcpus[tid]}: " if tid in vcpus else ""
        packets.thread(source, tid, tgid, vcpu + one_line(comm, 60), name)


def _slices(rows: pl.DataFrame, make: Callable[[dict[str, Any]], Slice]) -> Iterator[Slice]:
    """Yield a slice per row, ordered by time, with names instead of numbers."""
    begins = next(name for name in ("ts_ns", "start_ns") if name in rows.columns)
    ends = "end_ns" if "end_ns" in rows.columns else begins
    named = rows.sort(pl.coalesce(begins, ends), maintain_order=True)
    if {"status", "leaf"} <= set(rows.columns):
        described = describe_status(pl.col("status"), pl.col("leaf"))
        leaf = pl.coalesce(leaf_name(pl.col("leaf")), pl.col("leaf").cast(pl.String))
        named = named.with_columns(
            described=described, answer=status_name(pl.col("status")), leaf=leaf
        )
    if "loader_leaf" in rows.columns:
        named = named.with_columns(
            leaf=loader_leaf_name(pl.col("loader_leaf")),
            answer=loader_status_name(pl.col("status")),
        )
    if "exit_reason" in rows.columns:
        named = named.with_columns(exit_reason=exit_reason_name(pl.col("exit_reason")))
    return (make(row) for row in named.iter_rows(named=True))


def _chain(row: dict[str, Any]) -> Slice:
    return Slice(
        track=(row["source"], row["tid"], _CHAINS, row["lane"]),
        name=f"{row['leaf']}: {row['n_attempts']:,} attempts, {row['outcome'].replace('_', ' ')}",
        start_ns=row["start_ns"],
        end_ns=row["end_ns"],
        details={"final status": row["described"] or "none"}
        | _details(row, "first_seq", "last_seq", "td_id", "vp_id", "gpa", "level", "identity"),
    )


def _call(row: dict[str, Any]) -> Slice:
    status = row["described"] or "never returned"
    failed = row["status"] != 0
    return Slice(
        track=(row["source"], row["tid"], _CALLS, 0),
        name=row["leaf"] + (f": {row['answer'] or status}" if failed else ""),
        start_ns=row["start_ns"],
        end_ns=row["end_ns"],
        details={"status": status, "raw status": word(row["status"])}
        | _details(row, "seq", "td_id", "vp_id", "gpa", "level", "page", "cpu", "outcome")
        | _details(row, *_CAUSE),
        flows=([] if row["flow"] is None else [row["flow"]]) + (row["held"] or []),
    )


def _entry(row: dict[str, Any]) -> Slice:
    return Slice(
        track=(row["source"], row["tid"], _GUEST, 0),
        name=row["exit_reason"] or "exit not seen",
        start_ns=row["start_ns"],
        end_ns=row["end_ns"],
        details=_details(row, "seq", "vcpu_id", "info1", "cpu"),
        flows=row["held"] or (),
    )


def _zero_step(row: dict[str, Any]) -> Slice:
    return Slice(
        track=(row["source"], row["tid"], _ZERO_STEPS, 0),
        name=f"zero-step: {row['form']} ({row['strength']})",
        start_ns=row["start_ns"],
        end_ns=row["end_ns"],
        details=_details(row, "first_seq", "n_refused", "n_emulated", "gpa", "ended"),
    )


def _fault(row: dict[str, Any]) -> Slice:
    details = _details(row, "seq", "gpa", "error_code", "vcpu_id")
    name = f"EPT violation {word(row['gpa'])}"
    return Slice((row["source"], row["tid"], _FAULTS, 0), name, row["ts_ns"], None, details)


def _host_event(row: dict[str, Any]) -> Slice:
    names = ("seq", "gpa", "n_bytes", "port", "is_write", "value", "reason", "errno", "vcpu_id")
    details = _details(row, *names)
    track = (row["source"], row["tid"], _EVENTS, 0)
    return Slice(track, one_line(row["event"], 60), row["ts_ns"], None, details)


def _loader_call(row: dict[str, Any]) -> Slice:
    details = _details(row, "seq", "answer", "start_cpu", "cpu")
    track = (row["source"], row["tid"], _LOADER, 0)
    return Slice(track, row["leaf"], row["start_ns"], row["end_ns"], details)


def _loss(row: dict[str, Any], first_ns: int) -> Slice:
    """Return the slice of a loss; without a time it is at the start of its recording."""
    start, end = row["start_ns"], row["end_ns"]
    untimed = start is None and end is None
    details = _details(row, "n_events", "n_lines", "cpu", "line_no", "severity", "advice")
    details["time"] = "unknown" if untimed else "approximate"
    details["detail"] = one_line(row["detail"])
    name = row["kind"].replace("_", " ")
    return Slice(
        (row["source"], None, _LOSSES, 0), name, first_ns if untimed else start, end, details
    )


def _details(row: dict[str, Any], *names: str) -> dict[str, str | int]:
    """Return the observed values of these columns, addresses in hex."""
    shown: dict[str, str | int] = {}
    for name in names:
        value = row[name]
        if value is not None:
            shown[name] = word(value) if name in _HEX else value
    return shown


def with_lanes(chains: pl.DataFrame) -> pl.DataFrame:
    """Add ``lane``, from 0, such that overlapping chains of a thread have different lanes.

    The final status is named ``status``, as in tables of calls.

    Args:
        chains: The ``retry_chains`` table.
    """
    ordered = chains.rename({"final_status": "status"}).sort(
        pl.coalesce("start_ns", "end_ns"), maintain_order=True
    )
    ends: dict[tuple[int, int], list[int]] = {}
    lanes = []
    for source, tid, start, end in ordered.select(
        "source", "tid", pl.coalesce("start_ns", "end_ns"), pl.coalesce("end_ns", "start_ns")
    ).iter_rows():
        busy = ends.setdefault((source, tid), [])
        lane = next((i for i, until in enumerate(busy) if until <= start), len(busy))
        busy[lane : lane + 1] = [end]
        lanes.append(lane)
    return ordered.with_columns(lane=pl.Series(lanes, dtype=pl.Int64))


def first_causes(busy_causes: pl.DataFrame, first_flow: int) -> pl.DataFrame:
    """Return the most likely cause of each busy attempt.

    Args:
        busy_causes: The ``busy_causes`` table.
        first_flow: ID of the first flow from a holder to an attempt.

    Returns:
        Columns source, seq, those of the cause, and ``held``: ID of the flow from the holder; null
        without a holder.
    """
    leaf = pl.coalesce(leaf_name(pl.col("holder_leaf")), pl.col("holder_leaf").cast(pl.String))
    has_holder = pl.col("holder_seq").is_not_null()
    flow = has_holder.cum_sum().cast(pl.UInt64) + first_flow - 1
    return busy_causes.filter(pl.col("rank") == 1).select(
        "source",
        "seq",
        *(name for name in _CAUSE if name != "holder"),
        holder=leaf,
        held=pl.when(has_holder).then(flow),
    )


def with_causes(rows: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    """Add the causes of busy answers, and the flows between holders and attempts.

    Args:
        rows: Rows of calls or vCPU entries, with source and seq.
        answers: Result of :func:`first_causes`.

    Returns:
        ``rows`` in the same order, with the columns of the cause, and ``held``: IDs of the flows
        that start or end at the row.
    """
    numbered = answers.drop_nulls("held")
    flows = (
        pl.concat(
            [
                numbered.select("source", pl.col("holder_seq").alias("seq"), "held"),
                numbered.select("source", "seq", "held"),
            ]
        )
        .group_by("source", "seq")
        .agg(pl.col("held").sort())
    )
    keys = ["source", "seq"]
    return rows.join(answers.drop("held"), on=keys, how="left", maintain_order="left").join(
        flows, on=keys, how="left", maintain_order="left"
    )


# Values that replace nulls in the keys of a join, which does not match nulls.
_NULL_KEYS: Final = {"tid": -1, "gpa": 2**64 - 1, "vp_id": 2**64 - 1}


def with_chains(seamcalls: pl.DataFrame, retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Add ``flow`` and ``outcome`` of the retry chain to the attempts of longer chains.

    Args:
        seamcalls: The ``seamcalls`` table.
        retry_chains: The ``retry_chains`` table of the same calls.

    Returns:
        ``seamcalls`` in the same order, with ``flow`` (UInt64, number of the chain from 1; null
        for a chain of one attempt) and ``outcome``.  A call that completed a request of another
        thread has the flow of that request, unless it was retried itself.
    """
    joined = retry_chains.filter(
        (pl.col("n_attempts") > 1) | pl.col("settled_seq").is_not_null()
    ).with_row_index("flow", offset=1)
    own = _members(seamcalls, joined)
    settling = (
        joined.filter(pl.col("settled_seq").is_not_null())
        .select("source", pl.col("settled_seq").alias("seq"), pl.col("flow").alias("settles"))
        .unique(["source", "seq"], keep="first", maintain_order=True)
    )
    return (
        own.join(settling, on=["source", "seq"], how="left", maintain_order="left")
        .with_columns(pl.coalesce("flow", "settles").cast(pl.UInt64).alias("flow"))
        .drop("settles")
    )


def _members(seamcalls: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Add the chain of each call: the last one with its key that started before and is open."""
    keys = [pl.col(name).fill_null(value).alias(f"_{name}") for name, value in _NULL_KEYS.items()]
    # The TD is not part of the key: a chain's TD may be inferred from another call.
    by = ["source", "leaf", "_tid", "_gpa", "_vp_id"]
    begins = chains.with_columns(keys).select(
        *by, "flow", "outcome", "last_seq", pl.col("first_seq").alias("seq")
    )
    found = (
        seamcalls.with_row_index("_row")
        .with_columns(keys)
        .sort("seq")
        .join_asof(begins.sort("seq"), on="seq", by=by, strategy="backward", check_sortedness=False)
        .sort("_row")
    )
    ended = pl.col("seq") > pl.col("last_seq")
    return found.with_columns(
        pl.when(~ended).then("flow").alias("flow"), pl.when(~ended).then("outcome").alias("outcome")
    ).select(*seamcalls.columns, "flow", "outcome")
