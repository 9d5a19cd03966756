"""Mutations of texts and stores, and checks of reading them."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from support.damage import damaged
from support.mutations import MAX_SECONDS, mutate
from support.running import SAMPLES
from support.stores import sealed
from support.texts import ONE_CALL, is_accounted_for

import tdxtrace
from tdxtrace.cli.config import _settings
from tdxtrace.compiler import compiled, interpreted
from tdxtrace.ingest import read as reading
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.formats import open_input
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.recommend.policy_file import read_policies
from tdxtrace.simulate import scenario
from tdxtrace.tables.settings import read_settings
from tdxtrace.tables.store import PROVENANCE
from tdxtrace.tables.trace import Trace

_LINES: Final = Path(__file__).parent.parent / "lines"
_GRAPH: Final = """# tracer: function_graph
#
   50.000001 |   1)  CPU 0/KVM-7    |   tdh_mem_page_aug(td=0xff11000123456000, gpa=0x1000) {
   50.000002 |   1)  CPU 0/KVM-7    |   1.200 us    |   } /* tdh_mem_page_aug ret=0x1 */
   50.000003 |   0)  CPU 1/KVM-8    |   tdh_mem_track(); /* ret=0x8000020000000092 */
"""
_BPFTRACE: Final = """Attaching 4 probes...
TDH_MNG_INIT
TDH_MEM_PAGE_ADD gpa=0x1000
TDH_MR_EXTEND gpa=0x1000
TDH_MR_FINALIZE
"""
_PERF_SCRIPT: Final = "\n".join(
    f" CPU 0/KVM {7 + n % 2}/{7 + n % 2} [{n % 2:03}]     1.00{n:04}:    probe:"
    f"tdh_mem_page_aug{'' if n % 4 < 2 else '__return'}: (ffffffff81234567) arg1=0x{n // 4:x}000"
    for n in range(12)
)
_KERNEL_LOG: Final = """[    0.000000] Linux version 6.18.0 (me@host) (gcc 14)
[    1.000000] virt/tdx: TDX module 1.5.06, build number 744, build date 20240129
[Mon Jan  1 00:00:00 2026] virt/tdx: module initialized
Dec  1 10:00:00 host kernel: SEAMCALL (0x000000000001000f) failed: 0xc0000b0800000001
<4>[   12.345678] kvm_intel: SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0x8000020000000092, rcx 0x5
6,339,5140900,-;kvm_intel: SEAMCALL TDH_VP_INIT failed: 0x8000020000000080
2026-12-01T10:00:00.000001+01:00 host kernel: WARNING: CPU: 3 PID: 4 at arch/x86/kvm/vmx/tdx.c:99
[   13.000000] RAX: 8000020000000092 RBX: 0000000000000000
[   13.000001] net_ratelimit: 12 callbacks suppressed
[   14.000000] tdx: SEAMCALL (11) failed: 0x1
"""
_JOURNAL: Final = "".join(
    json.dumps(
        {
            "__REALTIME_TIMESTAMP": str(1_764_000_000_000_000 + n),
            "__MONOTONIC_TIMESTAMP": str(1_000_000 + n),
            "_TRANSPORT": "kernel",
            "_BOOT_ID": "0" * 32,
            "MESSAGE": "SEAMCALL TDH_VP_INIT failed: 0x8000020000000080",
        }
    )
    + "\n"
    for n in range(4)
)
_EXPORT: Final = "".join(
    f"__REALTIME_TIMESTAMP=176400000000000{n}\n_TRANSPORT=kernel\n"
    "MESSAGE=SEAMCALL TDH_VP_INIT failed: 0x8000020000000080\n\n"
    for n in range(4)
)
_POLICIES: Final = """[policy.mine]
calls = 3
budget = "1ms"
answers = "sept"
then = "kill"
leaves = ["TDH.MEM.PAGE.AUG"]
[policy.rising]
initial = 2
factor = 2
bug = 1024
source = "a mail"
"""
_SETTINGS: Final = """at-most = "1 in 1000"
confidence = 0.99
fail-on = ["max-attempts>16"]
module = "1.5.06"
"""


def _head(name: str, n_lines: int) -> bytes:
    return b"".join((SAMPLES / name).read_bytes().splitlines(keepends=True)[:n_lines])


TEXTS: Final[dict[str, bytes]] = {
    "ftrace text": _head("contended.txt", 40),
    "entries": _head("zerostep.txt", 40),
    "one call": ONE_CALL.encode() * 3,
    "perf script": _PERF_SCRIPT.encode(),
    "function graph": _GRAPH.encode() * 3,
    "bpftrace": _BPFTRACE.encode(),
    "kernel log": _KERNEL_LOG.encode(),
    "journal as JSON": _JOURNAL.encode(),
    "journal as export": _EXPORT.encode(),
    **{path.stem: path.read_bytes()[:4000] for path in sorted(_LINES.iterdir())},
}
_NUMBER: Final = re.compile(rb"(?<![\w.])(?:0x[0-9a-f]+|\d+)")
_ABSURD: Final = (
    *(b"0", b"1", b"-1", b"255", b"256", b"4294967295", b"4294967296", b"9223372036854775807"),
    *(b"9223372036854775808", b"18446744073709551615", b"18446744073709551616", b"9" * 30),
    *(b"0x0", b"0xffffffffffffffff", b"0x8000000000000000", b"0x1" + b"0" * 16, b"1e308", b"nan"),
)


def mutate_text(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Damage a text in one to four ways: bytes, numbers, lines and their order, other formats."""
    made = data
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        lines = made.splitlines(keepends=True) or [b""]
        at, way = chance.randrange(len(lines)), chance.randrange(9)
        if way < 3:
            lines[at] = damaged(lines[at].rstrip(b"\n"), chance) + b"\n"
        elif way < 5 and (numbers := list(_NUMBER.finditer(lines[at]))):
            start, end = chance.choice(numbers).span()
            lines[at] = lines[at][:start] + chance.choice(_ABSURD) + lines[at][end:]
        elif way == 5:
            lines.insert(chance.randrange(len(lines)), lines.pop(at))
        elif way == 6:
            lines[at:at] = chance.choice(others).splitlines(keepends=True)[:6]
        elif way == 7:
            lines[at] = lines[at].rstrip(b"\n")
        else:
            lines[at:at] = [lines[at]] * chance.choice((1, 2, 40))
        made = b"".join(lines)
    if not chance.randrange(40):
        made = made.decode("latin-1").encode(chance.choice(("utf-8", "utf-16", "utf-16-be")))
    return made


def _read(way: Any, path: Path, **options: Any) -> Trace | str:  # noqa: ANN401
    """What reading gives with loops run in one way: a trace, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "choose", lambda _: way)
        try:
            return tdxtrace.read_trace(path, **options)
        except tdxtrace.TdxtraceError as error:
            return str(error)


def ended_by(error: tdxtrace.TdxtraceError) -> str:
    """How an input ended that is refused, which must be in one line."""
    assert "\n" not in str(error), error
    return "refused"


def survive_text(path: Path, whole: bool, **options: Any) -> str:  # noqa: ANN401
    """Read a damaged text; return how it ended.

    It must end in time, in an answer or in an error that is the user's to mend.

    Args:
        path: The text.
        whole: Read it in both ways, which must give the same; account for every line; ask all
            questions.  Else only take its lines apart.
        options: Of :func:`tdxtrace.read_trace`.
    """
    begin = time.process_time()
    if not whole:
        return _lines(path, begin)
    found = _read(interpreted, path, **options)
    ended = "refused" if isinstance(found, str) else "read"
    if isinstance(found, str):
        assert "\n" not in found
    else:
        assert is_accounted_for(found)
        ask_everything(found)
    assert time.process_time() - begin < MAX_SECONDS
    _assert_same(found, _read(compiled, path, **options))
    return ended


def _lines(path: Path, begin: float) -> str:
    """Take the lines of a text apart."""
    stats = SourceStats()
    try:
        with open_input(str(path)) as given:
            reader = given.reader(EventRegistry(), stats)
            for _ in reader.batches(interpreted):
                pass
            reader.header()
            stats.losses(0)
            ended = "read"
    except tdxtrace.TdxtraceError as error:
        ended = ended_by(error)
    assert time.process_time() - begin < MAX_SECONDS
    return ended


def ask_everything(trace: Trace) -> None:
    """Make every table of the answers, where the trace does not refuse."""
    trace.check()
    try:
        tdxtrace.analyze(trace).tables()
    except tdxtrace.TdxtraceError as error:
        ended_by(error)


def _assert_same(one: Trace | str, other: Trace | str) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert one.provenance == other.provenance
    for name, rows in one.tables().items():
        assert rows.equals(other.tables()[name]), name


_READERS: Final[tuple[tuple[bytes, Callable[[Path], object]], ...]] = (
    (_POLICIES.encode(), read_policies),
    (_SETTINGS.encode(), lambda path: _settings(path.parent)),
    (
        scenario.named("quiet").to_toml().encode(),
        lambda path: scenario.load(read_settings(path)),
    ),
)
SETTINGS: Final = dict(zip(("policies", "settings", "scenario"), _READERS, strict=True))


def survive_settings(path: Path, read: Callable[[Path], object]) -> str:
    """Read damaged settings."""
    begin = time.process_time()
    try:
        read(path)
        ended = "read"
    except tdxtrace.TdxtraceError as error:
        ended = ended_by(error)
    assert time.process_time() - begin < MAX_SECONDS
    return ended


def mutate_settings(data: bytes, chance: random.Random) -> bytes:
    """Damage TOML: its bytes, its numbers, its lines, or how deep it is."""
    if not chance.randrange(30):
        value = chance.choice((b"[" * 3000, b"{a=" * 3000, b"a." * 3000, b"9" * 5000, b'"\\u0000"'))
        return re.sub(rb"(?<== ).*", lambda _: value, data, count=chance.choice((1, 2)))
    return mutate_text(data, chance, [data])


def mutate_store(folder: Path, chance: random.Random) -> Callable[[], None]:
    """Damage one file of a store, mostly so that its sums fit; return what undoes it."""
    path = chance.choice(sorted(folder.iterdir()))
    whole, facts = path.read_bytes(), (folder / PROVENANCE).read_bytes()
    is_table = path.name != PROVENANCE
    path.write_bytes(mutate(whole, chance) if is_table else mutate_provenance(whole, chance))
    if is_table and chance.randrange(8):
        sealed(folder)

    def undo() -> None:
        path.write_bytes(whole)
        (folder / PROVENANCE).write_bytes(facts)

    return undo


def mutate_provenance(data: bytes, chance: random.Random) -> bytes:
    """Damage JSON: values of other types, missing keys, or its bytes."""
    if chance.randrange(2):
        return mutate_text(data, chance, [data])
    facts = json.loads(data)
    place: Any = facts
    while isinstance(place, (dict, list)) and place:
        key = chance.choice(list(place)) if isinstance(place, dict) else 0
        if not isinstance(place[key], (dict, list)) or not chance.randrange(4):
            if chance.randrange(4):
                place[key] = chance.choice((None, -1, 1 << 70, 1.5, "x", [], {}, [[]], True))
            elif isinstance(place, dict):
                del place[key]
            break
        place = place[key]
    return json.dumps(facts).encode()


def survive_store(folder: Path, whole: bool) -> str:
    """Open a damaged store and read all of it."""
    begin = time.process_time()
    try:
        trace = tdxtrace.read_trace(folder)
        trace.tables()
        if whole:
            ask_everything(trace)
        ended = "read"
    except tdxtrace.TdxtraceError as error:
        ended = ended_by(error)
    assert time.process_time() - begin < MAX_SECONDS
    return ended
