"""Recordings that grow in one direction, to find readers whose time grows faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from support.perf_recorder import PerfRecording
from support.recorder import FORMATS, Machine, Recording, format_file
from support.texts import ONE_CALL, aug, aug_ret, line

import tdxtrace

_M: Final = Machine(page_size=512)
_START: Final = 10**9
_PAIR: Final = aug("2.000001") + aug_ret("2.000003")


def _page(start: int = _START, lost: int | None = 0) -> bytes:
    return _M.page(start, _M.event(5, _M.enter(7, 1 << 12)) + _M.event(5, _M.leave(7, 0)), lost)


def _dat(**options: object) -> Recording:
    return Recording(_M, (_page(),), **options)  # type: ignore[arg-type]


def _formats(*files: bytes) -> bytes:
    return _dat(formats={**FORMATS, "more": list(files)}).v6()


def _overlapping(n: int) -> bytes:
    pages = b"".join(_page(_START + 100 * i) for i in range(64))
    made = bytearray(Recording(_M, (pages, *[b""] * n)).v6())
    table = made.index(b"flyrecord\0") + 10
    for cpu in range(1, n):
        made[table + 16 * cpu : table + 16 * cpu + 16] = made[table : table + 16]
    return bytes(made)


def _stats(n: int) -> bytes:
    pages = b"".join(_page(_START + 100 * i, lost=3) for i in range(n))
    made = Recording(_M, (pages,))
    made.options = [(2, b"CPU: 0\noverrun: 5\n" * n + b"\0")]
    return made.v6()


def _perf(make: Callable[[PerfRecording], bytes]) -> bytes:
    made = PerfRecording()
    made.body = make(made)
    return made.file()


def _renamed(n: int, made: PerfRecording) -> bytes:
    """Threads with two names each, that all call in one round."""
    names = b"".join(made.comm(t, tid, f"a{tid}") for t in (_START, _START + n) for tid in range(n))
    return names + b"".join(made.call(_START + 20 * i, i, 1 << 12, 0) for i in range(n))


def _attributes(n: int) -> bytes:
    made = bytearray(_perf(lambda p: p.call(_START, 7, 1 << 12, 0)))
    size = 8 * n
    ids, attrs = len(made), len(made) + size
    entry = made[104 + 24 : 104 + 24 + 96]
    made += bytes(size) + (bytes(entry) + _M.pack("QQ", ids, size)) * n
    made[24:40] = _M.pack("QQ", attrs, 112 * n)
    return bytes(made)


def _lost_lines(n: int) -> str:
    """Markers on a CPU that is never heard of again, between lines of another."""
    return "".join(f"CPU:3 [LOST {i + 1} EVENTS]\n{_PAIR}" for i in range(n))


def _other_lines(n: int) -> str:
    return "".join(
        line(f"3.{i:06}", f"event{i}", task=f"t{i}-{i + 9}", cpu=i % 99) for i in range(n)
    )


def _unfinished(n: int) -> str:
    return "".join(aug(f"3.{i:06}", task=f"t-{i + 9}") for i in range(n))


def _graph(n: int) -> str:
    rows = "   50.000001 |   1)  CPU 0/KVM-7    |   tdh_mem_page_aug() {\n"
    return "# tracer: function_graph\n#\n" + rows * n


def _kernel_log(text: str) -> str:
    return "[    1.000000] virt/tdx: module initialized\n" + text


FAMILIES: Final[dict[str, tuple[int, Callable[[int], bytes | str]]]] = {
    "fields of an event": (
        2000,
        lambda n: _formats(format_file("much", 9, *(f"u32 f{i}@{i}+4" for i in range(n)))),
    ),
    "fields without a name": (2000, lambda n: _formats(format_file("much", 9, *["u32 @8+4"] * n))),
    "events": (500, lambda n: _formats(*(format_file(f"e{i}", i, "u32 x@8+4") for i in range(n)))),
    "empty formats": (1500, lambda n: _formats(*[b""] * n)),
    "systems": (1000, lambda n: _dat(formats=FORMATS | {f"s{i}": [] for i in range(n)}).v6()),
    "CPUs that overlap": (60, _overlapping),
    "CPUs": (20, lambda n: Recording(_M, (_page(),) * n).v6()),
    "buffers": (20, lambda n: _dat(buffers={f"b{i}": (_page(),) for i in range(n)}).v6()),
    "command lines": (4000, lambda n: _dat(cmdlines=b"7 vcpu\n" * n).v6()),
    "empty command lines": (50000, lambda n: _dat(cmdlines=b"\n" * n).v6()),
    "blanks in command lines": (50000, lambda n: _dat(cmdlines=b" " * n + b"\n").v6()),
    "counters of CPUs": (300, _stats),
    "lost pages": (200, lambda n: Recording(_M, (_page(lost=None) * n,)).v6()),
    "odd records": (
        1000,
        lambda n: Recording(_M, (_M.page(_START, _M.long_event(1, b"\1\2\3")) * n,)).v6(),
    ),
    "names in falling order": (
        1000,
        lambda n: _perf(
            lambda p: (
                b"".join(p.comm(_START - i, 7, f"n{i}") for i in range(n))
                + p.call(_START, 7, 1 << 12, 0)
            )
        ),
    ),
    "threads with two names": (100, lambda n: _perf(lambda p: _renamed(n, p))),
    "forks": (
        1000,
        lambda n: _perf(
            lambda p: (
                b"".join(p.fork(i, i + 1, i) for i in range(n)) + p.call(_START, 7, 1 << 12, 0)
            )
        ),
    ),
    "lost samples": (
        100,
        lambda n: _perf(
            lambda p: b"".join(
                p.lost(_START + 50 * i, i % 3, 2) + p.call(_START + 50 * i, 7, 1 << 12, 0, cpu=1)
                for i in range(n)
            )
        ),
    ),
    "odd sample lengths": (
        1000,
        lambda n: _perf(
            lambda p: p.call(_START, 7, 1 << 12, 0) + (_M.pack("IHH", 9, 0, 11) + b"\0\0\0") * n
        ),
    ),
    "attributes and their ids": (40, _attributes),
    "rounds": (
        150,
        lambda n: _perf(
            lambda p: b"".join(
                p.call(_START + 50 * i, 7, 1 << 12, 0) + p.end_round() for i in range(n)
            )
        ),
    ),
    "packed records": (
        20,
        lambda n: _perf(
            lambda p: p.compressed(
                b"".join(p.call(_START + 50 * i, 7, 1 << 12, 0) for i in range(n)), [9] * (n * 10)
            )
        ),
    ),
    "lost lines": (80, _lost_lines),
    "other events": (500, _other_lines),
    "calls that never return": (150, _unfinished),
    "unreadable lines": (600, lambda n: ONE_CALL + "what?\n" * n),
    "one long line": (20000, lambda n: ONE_CALL + "x" * n + "\n"),
    "a line of blanks": (20000, lambda n: ONE_CALL + " " * n + "x\n"),
    "graph": (150, lambda n: _graph(n) + ONE_CALL),
    "kernel log": (150, lambda n: _kernel_log("[    2.000000] SEAMCALL (0x6) failed: 0x8\n" * n)),
    "lines of a kernel log": (
        500,
        lambda n: _kernel_log("me[12]: tdx: module " + "tdx: module " * n + "\n"),
    ),
}
"""By name: a size that takes some ms to read, and what makes a recording of a size."""


def seconds(name: str, n: int, path: Path) -> float:
    """The time of the processor that reading a recording of a family takes."""
    made = FAMILIES[name][1](n)
    path.write_bytes(made.encode() if isinstance(made, str) else made)
    begun = time.process_time()
    with suppress(tdxtrace.TdxtraceError):
        tdxtrace.read_trace(path)
    return time.process_time() - begun
