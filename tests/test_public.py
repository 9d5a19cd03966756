"""Published traces of others: read or rejected cleanly, with every line accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.rig import CAPTURES
from support.texts import is_accounted_for, read_text

from tdxtrace.errors import FormatError, TdxtraceError
from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze

PUBLIC = CAPTURES / "public"
FILES = sorted(path for path in PUBLIC.glob("*") if path.suffix != ".md")
TEXTS = [path for path in FILES if path.suffix == ".txt"]
# Lines of kvm_entry and kvm_exit, of kvm_page_fault and of kvm_userspace_exit that are x86 and
# have a time; counted with grep.  Other files have none.
KVM = {
    "ftrace-kvm-issue-gvisor-6757.txt": (2, 1, 2),
    "ftrace-kvm-mail-nested-repro-6.12rc7.txt": (6, 2, 0),
    "ftrace-kvm-mail-pagefault-comm-with-space.txt": (0, 7, 0),
    "ftrace-kvm-tracepipe-mykvm.txt": (10, 4, 5),
    "kvm-lines.txt": (26, 4, 4),
    "tdx-lines.txt": (0, 2, 0),
}
KVM_HOST = "tracedat-v7-kvm-host-x86tsc-6.5.dat"
pytestmark = pytest.mark.skipif(
    not FILES, reason="the public captures are not beside this checkout"
)


def by_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", TEXTS, ids=by_name)
def test_a_published_text_is_read_or_rejected_in_one_line(path: Path) -> None:
    message = "a trace"
    try:
        trace = read_trace(path)
    except TdxtraceError as error:
        message = str(error)
        assert path.name not in KVM, message
    else:
        trace.check()
        assert is_accounted_for(trace)
        analyze(trace).check()
        assert path.name in KVM
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("name", KVM)
def test_kvm_events_become_rows(name: str) -> None:
    trace = read_trace(PUBLIC / name)
    tables = (trace.vm_entries, trace.page_faults, trace.host_events)
    assert tuple(table["n_lines"].sum() for table in tables) == KVM[name]


@pytest.mark.parametrize("path", [p for p in FILES if p not in TEXTS], ids=by_name)
def test_a_published_recording_is_read_or_rejected_with_its_events(path: Path) -> None:
    if path.name != KVM_HOST:
        with pytest.raises(FormatError, match="has no SEAMCALL and no KVM event; it has"):
            read_trace(path)
        return
    trace = read_trace(path)
    trace.check()
    assert is_accounted_for(trace)
    analyze(trace).check()


def test_a_text_that_is_no_trace_is_refused_and_recognised() -> None:
    with pytest.raises(FormatError, match="strace"):
        read_trace(PUBLIC / "negative-strace-not-ftrace.txt")


def test_losses_in_published_traces_are_reported() -> None:
    for name, cpu, n in (
        ("ftrace-lost-events-openrisc-trace.txt", 0, None),
        ("slice-trappy-events-dropped.txt", 7, 204600),
    ):
        text = (PUBLIC / name).read_text()
        line = "            CPU-7     [000]  1000.000001: kvm_entry: vcpu 0\n"
        gap = read_text(text + line).losses.filter(kind="lost_events").row(0, named=True)
        assert (gap["cpu"], gap["n_events"]) == (cpu, n)
