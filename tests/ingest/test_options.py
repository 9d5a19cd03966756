"""Output of perf script and trace-cmd report with any options, against the recording.

The tools that are installed here print every option and every pair of options. Their text
gives the tables of the recording, but for what the options leave out; or it is refused in a
line that names the option. ``python tests/ingest/test_options.py`` prints the matrix.
"""

from __future__ import annotations

import itertools
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.dmesg import printed_by_dmesg
from support.recordings import SAMPLES, as_ns, cut_to_us, rounded_to_us

import tdxtrace
from tdxtrace.errors import TdxtraceError

# perf script of Linux 6.1 and later (tools/perf/Documentation/perf-script.txt): the options that
# change what is printed of an event, and every field of -F.
_FIELDS = (
    "comm tid pid time cpu event trace ip sym dso addr symoff srcline period iregs uregs brstack "
    "brstacksym flags data_src weight bpf-output brstackinsn brstackinsnlen brstackoff "
    "callindent insn insnlen synth phys_addr metric misc srccode ipc tod data_page_size "
    "code_page_size ins_lat machine_pid vcpu cgroup retire_lat dsoff"
).split()
_PERF_OPTIONS = (
    *"--ns --deltatime --reltime -I -L --header -G -v --show-task-events".split(),
    *"--show-mmap-events --show-lost-events --show-switch-events".split(),
    *(f"-F +{name}" for name in _FIELDS),
    *(f"-F -{name}" for name in ("comm", "tid", "time", "cpu", "event", "trace")),
)
# trace-cmd report 3.1.6: the options that print events, and of the others one or two.
_REPORT_OPTIONS = (
    *"-t -R -l -N -L -V -G -q --ts-diff --ts-check --nodate --raw-ts --align-ts".split(),
    *("--cpu 0", "--ts-offset 1000000", "--ts2secs 1000000000", "--profile", "-w", "--stat"),
)
# What a refusal has to name.
_PID_ALONE = {"-F +pid", "-F -tid"}
_NAMED = {
    **{"--deltatime": "--deltatime", "-F -time": "-F +time", "-F -event": "-F +event"},
    **{"-F -trace": "-F +trace", "--profile": "--profile", "--stat": "--stat"},
}
# Columns of tables that an option leaves out.
_HIDES = {
    "-F -comm": ("comm",),
    "-F -tid": ("tid", "tgid", "comm"),
    "-F -cpu": ("cpu", "start_cpu"),
}
_PLACES = ("seq", "line_no", "n_lines")
_TIMES = ("start_ns", "end_ns", "ts_ns")


@dataclass(frozen=True)
class Recording:
    """A recording, the tool that prints it, and what is known of its text."""

    name: str
    command: tuple[str, ...]
    options: tuple[str, ...]
    never_printed: tuple[str, ...]

    def path(self, folder: Path) -> Path:
        """Unpack it."""
        data = (SAMPLES / self.name).read_bytes()
        path = folder / self.name.removesuffix(".xz")
        path.write_bytes(lzma.decompress(data) if self.name.endswith(".xz") else data)
        return path

    def print(self, path: Path, options: Sequence[str]) -> bytes:
        """Return what the tool prints; nothing if it does not know an option."""
        words = " ".join(options).split()
        done = subprocess.run(
            [*self.command, "-i", str(path), *words], capture_output=True, check=False
        )
        return done.stdout if done.returncode == 0 else b""


# Without the kernel's symbols, which no option prints of these recordings: perf needs 0.15 s to
# read them.
_PERF = "perf", "script", "--kallsyms", "/dev/null"
_TRACE_CMD = "trace-cmd", "report"
_PERF_RECORD_SAMPLE = 9
RECORDINGS = (
    Recording("qemu.perf.data.xz", _PERF, _PERF_OPTIONS, ("in_irq",)),
    Recording("tracecmd-v7.dat", _TRACE_CMD, _REPORT_OPTIONS, ("in_irq",)),
    # Of an instance, of which --profile and --cpu print nothing.
    Recording(
        "lost.dat.xz",
        _TRACE_CMD,
        tuple(o for o in _REPORT_OPTIONS if o not in ("--profile", "--cpu 0")),
        ("in_irq",),
    ),
)


@dataclass
class Matrix:
    """What became of each printed form of one recording."""

    recording: Recording
    folder: Path
    cells: dict[tuple[str, ...], str] = field(default_factory=dict)
    """By options: equal, the same text as another, not printed, refused; or what differs."""
    _texts: set[bytes] = field(default_factory=set)

    def fill(self) -> None:
        """Print and read every option, and every pair of those that change the text.

        Pairs are printed of the first samples of a perf.data file.
        """
        self.path = self.recording.path(self.folder)
        self.whole = tdxtrace.read_trace(self.path)
        self._add([(), *((option,) for option in self.recording.options)])
        same = ("not printed", "the same text")
        changing = [o for o in self.recording.options if self.cells[o,] not in same]
        if self.recording.command == _PERF:
            self._cut()
        self._add(itertools.combinations(changing, 2))

    def _cut(self) -> None:
        """Leave a fifth of the samples; what each option prints of them is no new text."""
        self.path.write_bytes(_beginning(self.path.read_bytes(), 5))
        self.whole = tdxtrace.read_trace(self.path)
        for options in list(self.cells):
            self._texts.add(self.recording.print(self.path, options))

    def _add(self, forms: Iterable[tuple[str, ...]]) -> None:
        """Print some forms, ahead in threads of their own, and read each."""
        forms = list(forms)
        with ThreadPoolExecutor(2) as pool:
            texts = pool.map(lambda options: self.recording.print(self.path, options), forms)
            for options, text in zip(forms, texts, strict=True):
                if not text.strip():
                    self.cells[options] = "not printed"
                elif text in self._texts:
                    self.cells[options] = "the same text"
                else:
                    self._texts.add(text)
                    self.cells[options] = self._compare(options, text)

    def _compare(self, options: tuple[str, ...], text: bytes) -> str:
        path = self.folder / "printed.txt"
        path.write_bytes(text)
        try:
            read = tdxtrace.read_trace(path)
        except TdxtraceError as error:
            named = [_NAMED[o] for o in options if o in _NAMED]
            named += ["-F +tid"] if set(options) >= _PID_ALONE else []
            return "refused" if any(o in str(error) for o in named) else f"refused: {error}"
        read.check()
        if any(o in _NAMED for o in options):
            return "is not refused"
        if "-F -tid" in options and "-F +pid" not in options:
            return _without_threads(self.whole, read)
        if "--cpu 0" in options:
            return self._of_one_cpu(options, read)
        try:
            _assert_same(self._expected(self.whole, options), read, self._hidden(options))
        except AssertionError as error:
            return " ".join(str(error).split())[:300]
        return "equal"

    def _of_one_cpu(self, options: tuple[str, ...], read: tdxtrace.Trace) -> str:
        """Compare with the lines of that CPU among those of all."""
        others = tuple(o for o in options if o != "--cpu 0")
        lines = self.recording.print(self.path, others).splitlines(keepends=True)
        is_mine = [b"[001]" not in line and b"  1d" not in line for line in lines]
        (self.folder / "some.txt").write_bytes(b"".join(itertools.compress(lines, is_mine)))
        some = tdxtrace.read_trace(self.folder / "some.txt")
        try:
            assert read.seamcalls.height > 100
            for name in ("seamcalls", "threads"):
                mine, other = (getattr(t, name).drop(_PLACES, strict=False) for t in (read, some))
                assert_frame_equal(mine, other)
        except AssertionError as error:
            return " ".join(str(error).split())[:300]
        return "equal"

    def _hidden(self, options: tuple[str, ...]) -> tuple[str, ...]:
        hidden = set(self.recording.never_printed)
        for option in options:
            hidden.update(_HIDES.get(option, ()))
        if self.recording.command == _PERF and "-F +pid" not in options:
            hidden.add("tgid")
        if "-l" in options:
            hidden -= {"in_irq"}
        return tuple(sorted(hidden))

    def _expected(self, trace: tdxtrace.Trace, options: tuple[str, ...]) -> dict[str, pl.DataFrame]:
        """The tables as the text has them."""
        first = trace.provenance.sources[0].first_ns or 0
        is_perf = self.recording.command == _PERF
        printed: Callable[[pl.Expr], pl.Expr] = cut_to_us if is_perf else rounded_to_us
        if {"--ns", "-t", "--raw-ts"} & set(options):
            printed = as_ns
        shift = 0
        if "--reltime" in options:
            shift = -self._first_printed(options)
        elif "--align-ts" in options and "--raw-ts" not in options:
            shift = -first
        if "--ts-offset 1000000" in options and "--raw-ts" not in options:
            shift += 1_000_000
        tables = {}
        for name, frame in trace.tables().items():
            times = [c for c in _TIMES if c in frame.columns]
            made = frame.with_columns(printed(pl.col(c) + shift) for c in times)
            if name == "threads" and "-L" in options and is_perf:
                made = made.with_columns(pl.col("comm").str.head(8))
            tables[name] = made
        return tables

    def _first_printed(self, options: tuple[str, ...]) -> int:
        """The time of what perf prints first, which may be no event."""
        others = [o for o in options if o not in ("--reltime", "--ns")]
        text = self.recording.print(self.path, [*others, "--ns"]).decode()
        stamps = re.findall(r"(\d+)\.(\d{9}): ", text)
        return next(ns for s, frac in stamps if (ns := int(s + frac)))


def _beginning(data: bytes, part: int) -> bytes:
    """Leave the first of so many parts of the samples of a perf.data file, and all other records.

    struct perf_file_header and perf_file_section of tools/perf/util/header.h, Linux 6.18; a sample
    of this recording begins with IP, TID and TIME.
    """
    start, size = struct.unpack_from("<QQ", data, 40)
    records, place = [], start
    while place < start + size:
        length = struct.unpack_from("<H", data, place + 6)[0]
        records.append(data[place : place + length])
        place += length
    times = sorted(_sample_time(record) for record in records if _sample_time(record))
    kept = b"".join(r for r in records if _sample_time(r) <= times[len(times) // part])
    made = bytearray(data[:start] + kept + data[place:])
    struct.pack_into("<Q", made, 48, len(kept))
    n_features = sum(word.bit_count() for word in struct.unpack_from("<4Q", data, 72))
    for at in range(start + len(kept), start + len(kept) + 16 * n_features, 16):
        struct.pack_into("<Q", made, at, struct.unpack_from("<Q", made, at)[0] - size + len(kept))
    return bytes(made)


def _sample_time(record: bytes) -> int:
    """The time of a sample; 0 of other records."""
    kind, time = struct.unpack_from("<I", record)[0], record[24:32]
    return int.from_bytes(time, "little") if kind == _PERF_RECORD_SAMPLE else 0


def _assert_same(
    tables: dict[str, pl.DataFrame], text: tdxtrace.Trace, hidden: Sequence[str]
) -> None:
    for name, frame in tables.items():
        if name == "losses" or (name == "threads" and "comm" in hidden):
            continue
        mine, other = (f.drop(_PLACES, strict=False) for f in (frame, getattr(text, name)))
        gone = [column for column in hidden if column in mine.columns]
        there = [column for column in gone if column in other.columns]
        for column in there:
            assert other[column].is_null().all(), f"{name}: {column} is printed"
        mine, other = mine.drop(gone), other.drop(there)
        keys = [c for c in mine.columns if c in ("source", "tid", "comm")]
        if name == "threads":
            mine, other = mine.unique(keys).sort(keys), other.unique(keys).sort(keys)
        assert_frame_equal(mine, other, check_column_order=False)


def _without_threads(whole: tdxtrace.Trace, read: tdxtrace.Trace) -> str:
    """Every pair is a call of the recording, and it is said that threads are missing."""
    calls = read.seamcalls.filter(pl.col("start_ns").is_not_null() & pl.col("end_ns").is_not_null())
    if "no_thread" not in read.losses["kind"].to_list():
        return "does not say that threads are missing"
    known = set(whole.seamcalls.select("gpa", "status", "leaf").rows())
    wrong = [row for row in calls.select("gpa", "status", "leaf").rows() if row not in known]
    return f"pairs that were not: {wrong[:3]}" if wrong else "equal"


@cache
def matrix(name: str) -> Matrix:
    """The matrix of one recording, printed and read once."""
    recording = next(r for r in RECORDINGS if r.name == name)
    with tempfile.TemporaryDirectory() as folder:
        made = Matrix(recording, Path(folder))
        made.fill()
    return made


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_every_printed_form_is_read_right_or_refused(recording: Recording) -> None:
    tool = recording.command[0]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: NONE of its printed forms was compared")
    cells = matrix(recording.name).cells
    wrong = {" ".join(o): said for o, said in cells.items() if said not in _RIGHT}
    assert not wrong
    assert sum(said == "equal" for said in cells.values()) > 20


_RIGHT = ("equal", "refused", "the same text", "not printed")


def _main() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        n = sum(1 for _ in printed_by_dmesg(Path(folder), ["virt/tdx: module initialized"]))
    shown = subprocess.run(["dmesg", "--version"], capture_output=True, text=True, check=False)
    yield f"kernel log ({shown.stdout.strip()}): {n} forms; tests/property compares them"
    for recording in RECORDINGS:
        tool = recording.command[0]
        shown = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
        version = next(line for line in (shown.stdout + shown.stderr).splitlines() if line.strip())
        cells = matrix(recording.name).cells
        counts = Counter(said if said in _RIGHT else "WRONG" for said in cells.values())
        yield f"{recording.name} ({version}): {len(cells)} forms: " + ", ".join(
            f"{n} {what}" for what, n in counts.most_common()
        )
        for options, said in cells.items():
            if said not in _RIGHT or "--all" in sys.argv:
                yield f"    {' '.join(options) or '(none)'}: {said}"


if __name__ == "__main__":
    print("\n".join(_main()))
