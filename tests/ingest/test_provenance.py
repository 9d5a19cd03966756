"""Metadata from the comments at the start of a text."""

from __future__ import annotations

import pytest
from support.texts import ONE_CALL, read_text

from tdxtrace.ingest.stats import read_comments

TRACEFS = b"# tracer: nop\n#\n# entries-in-buffer/entries-written: 156/41484   #P:2\n"
LATENCY = b"# tracer: nop\n#\n# nop latency trace v1.1.5 on 6.18.44-foo\n# -----\n"
PERF = (
    b"# ========\n# hostname : host\n# os release : 6.18.44\n# perf version : 6.1.187\n"
    b"# clockid: monotonic (1)\n"
)


def test_entries_kept_and_written() -> None:
    header = read_comments(TRACEFS)
    assert (header.entries_kept, header.entries_written) == (156, 41484)
    assert (header.tool, header.kernel, header.clock) == ("tracefs trace", None, None)


def test_the_kernel_of_a_latency_trace() -> None:
    assert read_comments(LATENCY).kernel == "6.18.44-foo"


def test_kernel_tool_and_clock_of_perf() -> None:
    header = read_comments(PERF)
    assert (header.kernel, header.tool, header.clock) == ("6.18.44", "perf 6.1.187", "monotonic")
    assert (header.entries_kept, header.entries_written) == (None, None)


def test_trace_cmd_is_known_by_its_first_line() -> None:
    assert read_comments(b"cpus=2\n  a-1 [000] 1.000001: x: y\n").tool == "trace-cmd report"


@pytest.mark.parametrize("head", [b"", b"\xff\xfe\n", b"cpus=x\n", b"# os release\n", b"#\n"])
def test_without_comments_the_provenance_is_empty(head: bytes) -> None:
    header = read_comments(head)
    assert (header.kernel, header.tool, header.clock) == (None, None, None)
    assert (header.entries_kept, header.entries_written) == (None, None)


def test_the_provenance_has_the_comments() -> None:
    source = read_text(PERF.decode() + ONE_CALL).provenance.sources[0]
    assert (source.kernel, source.tool, source.clock) == ("6.18.44", "perf 6.1.187", "monotonic")
    assert source.n_headers == 5


def test_bytes_that_are_no_text_do_no_harm() -> None:
    source = read_text(b"# os release : 6.\xff\xfe\n" + ONE_CALL.encode()).provenance.sources[0]
    assert source.kernel is not None
    assert source.kernel.startswith("6.")
