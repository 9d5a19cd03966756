"""The Perfetto export, read back."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support.running import SAMPLES, refused, tdxtrace
from support.story import Story, story

from tdxtrace.pipeline import analyze
from tdxtrace.report.perfetto import with_chains, write_perfetto
from tdxtrace.tables.trace import Trace

proto = pytest.importorskip(
    "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="perfetto is not installed"
)


@dataclass
class Shown:
    """A trace as Perfetto's processor understands it."""

    slices: dict[str, list[tuple[str, int, int]]] = field(default_factory=lambda: defaultdict(list))
    """By path of the track: name, start and end; an instant ends where it starts."""
    flows: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Starts of the slices of each flow."""
    details: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """By name of the slice."""


def _tracks(trace: Any) -> dict[int, str]:  # noqa: ANN401 - generated
    """Path of each track by its number."""
    tracks: dict[int, str] = {}
    for packet in sorted(trace.packet, key=lambda p: p.timestamp):
        if packet.HasField("track_descriptor"):
            described = packet.track_descriptor
            parent = tracks[described.parent_uuid] + "/" if described.parent_uuid else ""
            assert described.uuid not in tracks
            # Lanes have one name; each is a track.
            name = parent + described.name
            tracks[described.uuid] = name + "'" * list(tracks.values()).count(name)
    return tracks


def read_back(data: bytes) -> Shown:
    trace = proto.Trace()
    trace.ParseFromString(data)
    shown = Shown()
    tracks = _tracks(trace)
    names: dict[int, str] = {}
    keys: dict[int, str] = {}
    open_: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for packet in trace.packet:
        names |= {name.iid: name.name for name in packet.interned_data.event_names}
        keys |= {name.iid: name.name for name in packet.interned_data.debug_annotation_names}
        if not packet.HasField("track_event"):
            continue
        event, track = packet.track_event, packet.track_event.track_uuid
        if event.type == event.TYPE_SLICE_END:
            name, start = open_[track].pop()
            shown.slices[tracks[track]].append((name, start, packet.timestamp))
            continue
        for flow in event.flow_ids:
            shown.flows[flow].append(packet.timestamp)
        shown.details[names[event.name_iid]].append(
            {keys[d.name_iid]: d.string_value or d.int_value for d in event.debug_annotations}
        )
        here = names[event.name_iid], packet.timestamp
        if event.type == event.TYPE_SLICE_BEGIN:
            open_[track].append(here)
        else:
            shown.slices[tracks[track]].append((*here, packet.timestamp))
    assert not any(open_.values())
    for path, slices in shown.slices.items():
        assert _nest(slices), path
    return shown


def _nest(slices: list[tuple[str, int, int]]) -> bool:
    """Whether slices of one track lie within each other or apart, as the format demands."""
    around: list[int] = []
    for _, start, end in sorted(slices, key=lambda one: (one[1], -one[2])):
        while around and around[-1] <= start:
            around.pop()
        if around and end > around[-1]:
            return False
        around.append(end)
    return True


def exported(trace: Trace) -> Shown:
    file = io.BytesIO()
    write_perfetto(trace, analyze(trace), file)
    return read_back(file.getvalue())


def test_each_seamcall_is_a_slice_of_its_thread() -> None:
    shown = exported(story("B1 S1 2/track( S2 2/)S", {1: 100, 2: 100}).trace)
    start = 1_000_000_000
    first = shown.slices["story.txt/process 100/CPU 1/KVM 1/SEAMCALL"]
    assert first == [
        ("TDH.MEM.PAGE.AUG: TDX_OPERAND_BUSY", start, start + 10_000),
        ("TDH.MEM.PAGE.AUG", start + 20_000, start + 30_000),
        ("TDH.MEM.PAGE.AUG", start + 50_000, start + 60_000),
    ]
    second = shown.slices["story.txt/process 100/CPU 2/KVM 2/SEAMCALL"]
    assert second == [("TDH.MEM.TRACK", start + 40_000, start + 70_000)]
    assert shown.details["TDH.MEM.PAGE.AUG: TDX_OPERAND_BUSY"][0] == {
        "status": "OPERAND_BUSY SEPT tree",
        "raw status": "0x8000020000000092",
        "seq": 2,
        "td_id": "0x7d000",
        "gpa": "0x1000",
        "level": 0,
        "cpu": 0,
        "outcome": "succeeded",
        "cause": "unexplained",
        "confidence": "none",
        "resource": "SEPT tree",
    }


def test_attempts_at_one_request_are_connected_by_a_flow() -> None:
    shown = exported(story("B1 2/B2 B1 2/S2 S1 S3").trace)
    step = 20_000
    starts = [[(ns - 1_000_000_000) // step for ns in flow] for flow in shown.flows.values()]
    assert sorted(starts) == [[0, 2, 4], [1, 3]]


def test_each_retry_chain_is_a_slice_above_its_attempts() -> None:
    file = io.BytesIO()
    trace = story("B1 2/S3 B1 S1 S2").trace
    write_perfetto(trace, analyze(trace), file)
    shown = read_back(file.getvalue())
    start = 1_000_000_000
    assert shown.slices["story.txt/CPU 1/KVM 1/retry chain"] == [
        ("TDH.MEM.PAGE.AUG: 3 attempts, succeeded", start, start + 70_000)
    ]
    assert len([path for path in shown.slices if path.endswith("retry chain")]) == 1
    read = proto.Trace()
    read.ParseFromString(file.getvalue())
    ranks = {
        p.track_descriptor.name: p.track_descriptor.sibling_order_rank
        for p in read.packet
        if p.track_descriptor.HasField("sibling_order_rank")
    }
    assert ranks["retry chain"] < ranks["SEAMCALL"]


def test_chains_of_one_thread_that_overlap_are_on_different_tracks() -> None:
    shown = exported(story("B1 B2 S1 S2").trace)
    assert [len(s) for path, s in shown.slices.items() if "retry chain" in path] == [1, 1]


def test_the_call_that_held_the_lock_is_named_and_connected() -> None:
    trace = story("2/block( B1 2/)S S1").trace
    (cause,) = analyze(trace).busy_causes.filter(rank=1).iter_rows(named=True)
    assert cause["cause"] == "host_conflict"
    shown = exported(trace)
    (busy,) = shown.details["TDH.MEM.PAGE.AUG: TDX_OPERAND_BUSY"]
    assert busy["cause"] == "host_conflict"
    assert busy["holder"] == "TDH.MEM.RANGE.BLOCK"
    assert (busy["holder_tid"], busy["holder_seq"]) == (2, cause["holder_seq"])
    holder, attempt = shown.flows[max(shown.flows)]
    assert holder == cause["start_ns"] - 10_000
    assert attempt == cause["start_ns"]


def test_the_call_that_completes_a_request_elsewhere_is_in_its_flow() -> None:
    shown = exported(story("B1 2/S1 S2").trace)
    assert [len(flow) for flow in shown.flows.values()] == [2]


def test_a_call_that_never_returned_is_an_instant() -> None:
    shown = exported(story("trackS 1/track(").trace)
    (calls,) = shown.slices.values()
    assert calls[1][0] == "TDH.MEM.TRACK: never returned"
    assert calls[1][1] == calls[1][2]


def test_entries_faults_and_losses_have_separate_tracks() -> None:
    shown = exported(story(">X ?3 S3 >H lost@1").trace)
    thread = "story.txt/vCPU 1: CPU 1/KVM 1"
    assert [name for name, *_ in shown.slices[f"{thread}/guest"]] == ["EPT_VIOLATION", "HLT"]
    assert [name for name, *_ in shown.slices[f"{thread}/page faults"]] == ["EPT violation 0x3000"]
    assert [n for n, *_ in shown.slices["story.txt/losses"]] == ["lost events"]


def test_a_zero_step_episode_is_a_slice() -> None:
    text = " ".join(["enterS ?5"] * 7) + " enterB enterB enterB enterS"
    trace = story(text).trace
    (episode,) = analyze(trace).zero_steps.iter_rows(named=True)
    shown = exported(trace)
    (track,) = [name for name in shown.slices if name.endswith("/zero-step")]
    assert shown.slices[track] == [
        ("zero-step: busy_sept (proof)", episode["start_ns"], episode["end_ns"])
    ]


@pytest.mark.parametrize("name", ["contended.txt", "zerostep.txt", "lost.dat.xz"])
def test_an_exported_sample_has_all_calls_and_chains(name: str, tmp_path: Path) -> None:
    from tdxtrace.ingest.read import read_trace

    path = tmp_path / "out.pftrace"
    done = tdxtrace("export", SAMPLES / name, "--perfetto", path)
    assert done.status == 0
    assert "packets" in done.stderr
    trace = read_trace(SAMPLES / name)
    shown = read_back(path.read_bytes())
    calls = [s for track, all_ in shown.slices.items() if track.endswith("SEAMCALL") for s in all_]
    assert len(calls) == trace.seamcalls.height
    both = trace.seamcalls.drop_nulls(["start_ns", "end_ns"])
    assert sum(end - start for _, start, end in calls) == (both["end_ns"] - both["start_ns"]).sum()
    chains = analyze(trace).retry_chains.filter(pl.col("n_attempts") > 1)
    joined = with_chains(trace.seamcalls, chains.with_columns(settled_seq=pl.lit(None, pl.UInt64)))
    sizes = joined.drop_nulls("flow").group_by("flow").len().sort("flow")["len"]
    assert sizes.to_list() == chains["n_attempts"].to_list()
    assert refused(1, "export", SAMPLES / name, "--perfetto", path).endswith(
        "exists; use --force to overwrite"
    )


HOSTILE = "<script>alert(1)</script>\x1b[31m|](http://x)=cmd()"


def hostile(scenario: Story) -> Trace:
    import dataclasses

    trace = scenario.trace
    source = dataclasses.replace(trace.provenance.sources[0], path=HOSTILE)
    return dataclasses.replace(
        trace,
        threads=trace.threads.with_columns(comm=pl.lit(HOSTILE)),
        provenance=dataclasses.replace(trace.provenance, sources=(source,)),
    )


def test_untrusted_names_are_escaped() -> None:
    file = io.BytesIO()
    trace = hostile(story("B1 S1 >X lost@1"))
    write_perfetto(trace, analyze(trace), file)
    assert b"\x1b" not in file.getvalue()
    assert b"<script>alert(1)</script>\\x1b[31m|](http://x)=cmd()" in file.getvalue()


def test_an_empty_trace_gives_a_valid_file() -> None:
    assert exported(story("").trace).slices == {}


def test_the_same_trace_gives_the_same_bytes() -> None:
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        trace = story("B1 S1 2/S2 >X ?3").trace
        write_perfetto(trace, analyze(trace), file)
    assert files[0].getvalue() == files[1].getvalue()


def test_threads_and_processes_have_descriptors_that_join_sched_events() -> None:
    file = io.BytesIO()
    trace = story("B1 S1", {1: 40}).trace
    write_perfetto(trace, analyze(trace), file)
    read = proto.Trace()
    read.ParseFromString(file.getvalue())
    described = [p.track_descriptor for p in read.packet if p.HasField("track_descriptor")]
    threads = [d for d in described if d.HasField("thread")]
    assert [(d.thread.pid, d.thread.tid) for d in threads] == [(40, 1)]
    (process,) = (d for d in described if d.HasField("process"))
    assert process.process.pid == 40
    assert threads[0].parent_uuid == process.uuid
