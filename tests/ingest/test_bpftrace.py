"""Output of bpftrace programs: lines without time, with nsecs, JSON."""

from __future__ import annotations

import json

import pytest
from support.texts import BUSY, is_accounted_for, lost, read_text

from tdxtrace.errors import FormatError
from tdxtrace.tables.trace import Trace

# In the form of the program in docs of edgelesssys/contrast.
MEASURED = """\
Attaching 4 probes...
TDH_MNG_INIT
TDH_MEM_PAGE_ADD gpa=0x1000
TDH_MR_EXTEND gpa=0x1000
TDH_MR_EXTEND gpa=0x1100
TDH_MR_FINALIZE
"""


def read(text: str) -> Trace:
    trace = read_text(text)
    trace.check()
    assert is_accounted_for(trace)
    assert trace.provenance.sources[0].format == "bpftrace"
    return trace


def test_lines_without_time_are_in_order_and_say_so() -> None:
    trace = read(MEASURED)
    assert trace.seamcalls.sort("seq").select("leaf", "gpa").rows() == [
        (21, None),
        (2, 0x1000),
        (16, 0x1000),
        (16, 0x1100),
        (17, None),
    ]
    source = trace.provenance.sources[0]
    assert source.clock == "order"
    assert any("has no times" in note for note in trace.provenance.notes)
    assert trace.losses.select("kind", "n_events").rows() == [
        ("no_thread", 5),
        ("unpaired_entry", 5),
    ]


def test_json_is_the_same() -> None:
    lines = MEASURED.splitlines()[1:]
    said = [{"type": "printf", "data": line + "\n"} for line in lines]
    objects = [{"type": "attached_probes", "data": {"probes": 4}}, *said]
    text = "".join(json.dumps(one) + "\n" for one in objects)
    plain, as_json = read(MEASURED), read(text + '{"type": "map", "data": {"@n": 5}}\n')
    assert as_json.seamcalls.equals(plain.seamcalls)
    lossy = '{"type": "lost_events", "data": {"events": 7}}\n'
    assert ("lost_events", 7) in read(text + lossy).losses.select("kind", "n_events").rows()


TIMED = """\
4212603129463 tdh_mem_page_aug gpa=0x1000, tid=14401, cpu=1
4212603131000 tdh_mem_page_aug_exit: ret=0x8000020000000092 tid=14401 cpu=1
4212603132000 TDH.MEM.PAGE.AUG(gpa=0x1000, tid=14401)
4212603135000 tdh_mem_page_aug retval: 0x0 tid: 14401
"""


def test_times_threads_and_statuses_are_read_where_they_are_printed() -> None:
    trace = read(TIMED)
    assert trace.seamcalls.select("tid", "gpa", "start_ns", "end_ns", "status").rows() == [
        (14401, 0x1000, 4212603129463, 4212603131000, BUSY),
        (14401, 0x1000, 4212603132000, 4212603135000, 0),
    ]
    assert trace.provenance.sources[0].clock == "unnamed"


def test_a_line_without_its_time_is_a_loss() -> None:
    trace = read(TIMED + "tdh_mem_page_aug gpa=0x2000 tid=14401\n")
    assert lost(trace) == {"no_time": 1}


def test_what_else_a_program_prints_is_no_call() -> None:
    trace = read(MEASURED + "done\nLost 12 events\ntdh_frob gpa=0x1\n")
    assert lost(trace) == {"lost_events": 1, "noise": 2}


@pytest.mark.parametrize(
    "text", ["Attaching 1 probe...\n@[tdh_mem_page_aug]: 12\n", "Attaching 1 probe...\n@: 3\n"]
)
def test_sums_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="bpftrace"):
        read_text(text)
