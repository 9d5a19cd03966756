"""Recipes as bpftrace scripts that count requests in the kernel.

The script joins attempts to requests by the definition of the table retry_chains: calls of one
thread for one request, until a call returns a status that is not retried, or another thread
completes the same request.  The maps have a bounded size; calls that do not fit, or cannot be
joined, are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tdxtrace.capture.probes import Fetch, Probe
from tdxtrace.capture.recipe import Recipe
from tdxtrace.tables.attempt_cells import DOUBLINGS, EXACT
from tdxtrace.tdx.facts import records
from tdxtrace.tdx.wrappers import leaf_of

VERSION: Final = 1
"""Version of the format that the script prints."""
MAX_KEYS: Final = 65_536
"""Maximum number of keys of each map: of open requests, or of kinds of requests."""
SUCCEEDED, FAILED, RESOLVED, UNDONE = range(4)
"""Outcomes of requests: the second last part of a key of @requests."""
NO_ENTRY, OPEN_FULL, THREADS_FULL, OVERWRITTEN = range(1, 5)
"""Reasons why a call could not be joined: the last part of a key of @cannot."""
# Mask of the slots of the hash tables of pages; pages with the same slot overwrite each other.
_SLOTS: Final = 0x7FFF
# Bits 63:32 of a status without bits 61 and 60: tdx/word.py, CODE_BITS.
_CODE: Final = 0xCFFF_FFFF
# Values of host_retry after which a caller makes the same call again: tdx/status.py, RETRIED.
_RETRIED: Final = ("same", "resume", "restart", "kick")
_IPI_LEAVES: Final = ("TDH.VP.FLUSH", "TDH.PHYMEM.CACHE.WB")
_BLOCKED_PAGE_LEAVES: Final = tuple(
    f"TDH.MEM.PAGE.{name}" for name in ("DEMOTE", "PROMOTE", "RELOCATE", "REMOVE")
)
_UNBLOCK: Final = "TDH.MEM.RANGE.UNBLOCK"
_MAPS: Final = ("requests", "done", "calls", "status", "cannot", "took_ns")


# By map: number of parts of its key, and of its value.
_MAP_SHAPES: Final = {
    "@open": (5, 5),
    "@won": (1, 5),
    "@undone": (1, 5),
    "@in": (2, 5),
    "@turn": (1, 1),
}
_ENTRY_MAP_SHAPES: Final = {"@vcpu": (1, 1), "@entered": (1, 1)}


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Leaf that a function calls: number, name and kind of request."""

    number: int
    name: str
    request: str


def script(recipe: Recipe, heading: Sequence[str], every_s: int = 60) -> Iterator[str]:
    """Yield the lines of the script.

    Args:
        recipe: Its probes of wrappers are counted; tracepoints are used for vCPU entries only.
        heading: Comment lines at the top.
        every_s: Seconds between two prints of all counts.
    """
    counted = [(probe, leaf) for probe in recipe.probes if (leaf := _leaf(probe.function))]
    functions = dict.fromkeys(probe.function for probe, _ in counted)
    yield from (f"//{line[1:]}" for line in heading)
    left_out = sorted({p.function for p in recipe.probes} - set(functions) - {"tdx_vcpu_run"})
    if left_out:
        yield f"// not counted, any leaf goes through it: {', '.join(left_out)}"
    yield f"// run it: BPFTRACE_MAP_KEYS_MAX={MAX_KEYS} bpftrace -q -f json -o FILE THIS"
    yield "// counts grow from the first to the last print; nothing of a single call is printed"
    release = recipe.release or "unknown"
    yield f'BEGIN {{ printf("tdxtrace histogram {VERSION} {release} %llu\\n", nsecs);'
    yield from _map_declarations(enters=any(p.function == "tdx_vcpu_run" for p in recipe.probes))
    yield "}"
    for function in functions:
        sides = {p.is_return: p for p, _ in counted if p.function == function}
        leaf = next(leaf for p, leaf in counted if p.function == function)
        # If the recipe fetches a request on return, its entry has the same arguments.
        yield from _WrapperProbes(leaf, sides.get(False, sides[True]), sides[True]).lines()
    yield from _entries(recipe)
    shown = " ".join(f"print(@{name});" for name in _MAPS)
    yield f'interval:s:{every_s} {{ printf("at %llu\\n", nsecs); {shown} }}'
    # bpftrace prints all maps at the end; these hold calls in progress, not counts.
    forgotten = [
        *_MAP_SHAPES,
        *(_ENTRY_MAP_SHAPES if "tdx_vcpu_run" in {p.function for p in recipe.probes} else ()),
    ]
    cleared = " ".join(f"clear({name});" for name in forgotten if name != "@open")
    yield f'END {{ printf("end %llu\\n", nsecs); {cleared} }}'


def _map_declarations(*, enters: bool) -> Iterator[str]:
    """Yield lines that define the types of keys and values of the maps of calls in progress."""
    for name, (n_keys, n_values) in (_MAP_SHAPES | (_ENTRY_MAP_SHAPES if enters else {})).items():
        key = ", ".join(["(uint64)0"] * n_keys)
        value = ", ".join(["(uint64)0"] * n_values)
        value = f"({value})" if n_values > 1 else value
        yield f"  {name}[{key}] = {value}; delete({name}[{key}]);"


def retried_codes() -> list[int]:
    """Return bits 63:32, without 61 and 60, of the statuses after which a call is retried."""
    rows = records("status_codes")
    words = (int(row["status"] or "0", 0) for row in rows if row["host_retry"] in _RETRIED)
    return sorted({(word >> 32) & _CODE for word in words})


def _leaf(function: str) -> _Leaf | None:
    number = leaf_of(function)
    rows = (row for row in records("leaves") if int(row["leaf"] or "-1", 0) == number)
    row = next(rows, None)
    if row is None or number is None:
        return None
    return _Leaf(number, row["name"] or "", row["request"] or "")


def _entries(recipe: Recipe) -> Iterator[str]:
    """Yield probes for TDH.VP.ENTER, which the kernel calls in tdx_vcpu_run.

    KVM traces kvm_entry before TDH.VP.ENTER; a return without kvm_entry made no call.
    """
    probe = next((p for p in recipe.probes if p.function == "tdx_vcpu_run"), None)
    if probe is None:
        return
    leaf = next(row for row in records("leaves") if row["name"] == "TDH.VP.ENTER")
    own = _Leaf(int(leaf["leaf"] or "0", 0), "TDH.VP.ENTER", "vcpu")
    place = next(fetch.offset for fetch in probe.fetches if fetch.name == "status")
    yield "kprobe:tdx_vcpu_run { @vcpu[(uint64)tid] = arg0; @entered[(uint64)tid] = (uint64)0; }"
    yield "tracepoint:kvm:kvm_entry / @vcpu[(uint64)tid] / { @entered[(uint64)tid] = nsecs; }"
    yield "kretprobe:tdx_vcpu_run / @entered[(uint64)tid] /"
    yield "{ $w = (uint64)tid; @turn[$w] = @turn[$w] + 1;"
    entered = "@entered[(uint64)tid], @turn[$w]"
    yield f"  $i = ((uint64)@vcpu[(uint64)tid], (uint64)0, (uint64)0, {entered});"
    yield f"  $s = *(uint64 *)(@vcpu[(uint64)tid] + {place});"
    yield from _join_attempt(own)
    yield "  delete(@entered[(uint64)tid]); delete(@vcpu[(uint64)tid]); }"


@dataclass(frozen=True, slots=True)
class _WrapperProbes:
    """Probes of a wrapper: the entry stores the request, the return counts the attempt."""

    leaf: _Leaf
    request: Probe
    """The probe that fetches the request's arguments."""
    return_probe: Probe

    def lines(self) -> Iterator[str]:
        """Yield the lines of both probes."""
        path = self.return_probe.location.rpartition(":")[0]
        place = f"{path}:{self.return_probe.function}" if path else self.return_probe.function
        side = ("uprobe", "uretprobe") if self.return_probe.location else ("kprobe", "kretprobe")
        number = self.leaf.number
        arguments = (fetch for fetch in self.request.fetches if fetch.kind == "argument")
        named = {fetch.name: _value(fetch) for fetch in arguments}
        by = {"gpa": "td", "td": "td", "vcpu": "vp", "page": "page"}.get(self.leaf.request, "")
        resource = named.get(by, named.get("pfn", "0") if by == "page" else "0")
        is_page = self.leaf.request == "gpa"
        gpa = named.get("gpa", "0") if is_page else "0"
        level = named.get("level", "0") if is_page else "0"
        key = ", ".join(f"(uint64){value}" for value in (resource, gpa, level))
        yield f"{side[0]}:{place}"
        yield f"{{ {self._set_caller()} @turn[$w] = @turn[$w] + 1;"
        yield f"  @in[(uint64)tid, (uint64){number}] = ({key}, nsecs, @turn[$w]); }}"
        yield f"{side[1]}:{place}"
        entry = f"@in[(uint64)tid, (uint64){number}]"
        yield f"{{ {self._set_caller()} $i = {entry}; $s = (uint64)retval;"
        yield f"  if ($i.3 == 0) {{ @cannot[{number}, {NO_ENTRY}] = count(); }} else {{"
        yield from _join_attempt(self.leaf)
        yield f"  }} delete(@in[(uint64)tid, (uint64){number}]); }}"

    def _set_caller(self) -> str:
        """Code that sets $w to the caller: the thread, or the CPU in interrupts.

        As in analysis/threads.py.
        """
        on_cpu = "((uint64)1 << 32) + cpu"
        if self.leaf.name in _IPI_LEAVES:
            return f"$w = {on_cpu};"
        return f"$w = (uint64)tid; if (tid == 0) {{ $w = {on_cpu}; }}"


def _join_attempt(leaf: _Leaf) -> Iterator[str]:
    """Yield code that joins an attempt to its request; $w: caller, $i: entry, $s: status."""
    key = f"@open[$w, (uint64){leaf.number}, $i.0, $i.1, $i.2]"
    yield f"  $c = ($s >> 32) & {_CODE:#x}; $o = {key}; $n = $o.0; $first = $i.3;"
    yield f"  if (@turn[$w] == 0) {{ @cannot[{leaf.number}, {THREADS_FULL}] = count(); }}"
    yield "  if ($n > 0) {"
    yield from _end_open_request(leaf)
    yield "    if ($n > 0) { $first = $o.1; }"
    yield "  }"
    yield "  $n = $n + 1;"
    yield f"  @calls[pid, {leaf.number}] = count();"
    yield f"  @status[pid, {leaf.number}, $c, $s & 0xffffffff] = count();"
    again = " || ".join(f"$c == {code:#x}" for code in retried_codes())
    yield f"  if ({again}) {{"
    yield f"    {key} = ($n, $first, $i.3, $i.4, (uint64)pid);"
    yield f"    $o = {key};"
    yield f"    if ($o.0 != $n) {{ @cannot[{leaf.number}, {OPEN_FULL}] = count(); }}"
    yield "  } else {"
    yield from _count_request(leaf, "($s >> 63) & 1")
    # The guest runs in TDH.VP.ENTER: the time of an entry request ends when its last call starts.
    end = "$i.3" if leaf.name == "TDH.VP.ENTER" else "nsecs"
    yield f"    @took_ns[{leaf.number}] = hist({end} - $first);"
    yield f"    delete({key});"
    if leaf.request in ("gpa", "td"):
        won = f"((uint64){leaf.number}, $i.0, $i.1, $i.2, nsecs)"
        yield f"    if ($c == 0) {{ @won[(uint64)({_slot(leaf.number)})] = {won}; }}"
    if leaf.name == _UNBLOCK:
        gone = f"@undone[(uint64)({_slot(0)})] = ((uint64)0, $i.0, $i.1, $i.2, nsecs);"
        yield f"    if ($c == 0) {{ {gone} }}"
    yield "  }"


def _end_open_request(leaf: _Leaf) -> Iterator[str]:
    """Yield code that ends an open request if another thread completed or undid it.

    Completion counts only if the thread made another call meanwhile, as in
    analysis/loops/linking.py.
    """
    tables = []
    if leaf.request in ("gpa", "td"):
        tables.append(("won", leaf.number, RESOLVED, " $o.3 + 1 != $i.4 &&"))
    if leaf.name in _BLOCKED_PAGE_LEAVES:
        tables.append(("undone", 0, UNDONE, ""))
    for name, number, outcome, condition in tables:
        yield f"    $x = @{name}[(uint64)({_slot(number)})];"
        yield f"    if ($n > 0 &&{condition} $x.4 >= $o.2) {{"
        same = f"$x.0 == {number} && $x.1 == $i.0 && $x.2 == $i.1 && $x.3 == $i.2"
        yield f"      if ({same}) {{"
        yield from (f"    {line}" for line in _count_request(leaf, str(outcome)))
        yield "        $n = (uint64)0; }"
        yield f"      else {{ @cannot[{leaf.number}, {OVERWRITTEN}] = count(); }}"
        yield "    }"


def _count_request(leaf: _Leaf, outcome: str) -> Iterator[str]:
    """Yield code that counts a request of $n attempts."""
    yield f"    $b = $n; if ($n > {EXACT}) {{ $b = (uint64){EXACT};"
    yield f"      unroll({DOUBLINGS}) {{ if ($b * 2 <= $n) {{ $b = $b * 2; }} }}"
    yield f"      if ($b == {EXACT}) {{ $b = (uint64){EXACT + 1}; }} }}"
    yield f"    @done[pid, {leaf.number}] = count();"
    yield f"    @requests[pid, {leaf.number}, {outcome}, $b] = count();"


def _slot(number: int) -> str:
    mixed = f"($i.1 >> 12) ^ ($i.0 >> 6) ^ ($i.2 << 13) ^ {number * 521}"
    return f"({mixed}) & {_SLOTS:#x}"


def _value(fetch: Fetch) -> str:
    """Return the expression of an argument; a level is 32 bits wide."""
    return f"(uint32)arg{fetch.place - 1}" if fetch.type == "s32" else f"arg{fetch.place - 1}"
