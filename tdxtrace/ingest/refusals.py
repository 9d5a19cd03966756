"""Descriptions of texts without a known event: the tool that made them, and what to run instead."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.text import one_line


class Refusal(NamedTuple):
    """A kind of text that is not a readable trace."""

    line: re.Pattern[str]
    """Matches a line that occurs only in such a text."""
    what: str
    """Description of the text for the message: the tool, with the option, that made it."""
    instead: str
    """What to run instead."""


_RECORD: Final = (
    "record with: tdxtrace capture record, or trace-cmd record -e kvm:kvm_entry -e kvm:kvm_exit"
)
_SCRIPT: Final = "print the recording with: perf script"
_NO_PROBE: Final = r"\((?:0x)?(?:[0-9a-f]{6,16}|[A-Za-z_]\w*\+0x)"

_OPTION: Final = "a trace file that was printed with options/{} on"
_OFF: Final = "echo 0 > that option, and read the file again"
_TOD: Final = r"(?:[KUHGgMESp]{1,6} +)?(?:\d{4}-\d\d-\d\d [\d:]{8}\.\d{1,9} +)?"


def _row(line: str, what: str, instead: str = _RECORD) -> Refusal:
    return Refusal(re.compile(line, re.ASCII), what, instead)


# The first row whose pattern matches any line of the text identifies the text.
REFUSALS: Final = (
    # tools/perf/builtin-trace.c, trace__fprintf_sample: "     0.004 comm/tid group:event(key: …)".
    _row(
        r"^ *\d{1,15}\.\d{3} (?:\( *[\d.]*(?: ms)?\): ?)?\S.{0,40}?/\d{1,9} +[\w:]+\(",
        "output of perf trace",
        "record with perf record -e 'kvm:*' and print with perf script",
    ),
    # tools/perf/builtin-kvm.c, print_result.
    _row(
        r"^ *(?:Analyze events for|VM-EXIT +Samples|Event name +Samples)",
        "a summary of perf kvm stat, which has no single events",
        "record with perf record -e 'kvm:*' -a and print with perf script",
    ),
    _row(
        r"^# (?:Overhead|Samples: |Children +Self)|^# To display the perf\.data header"
        r"|^ {0,8}\d{1,3}\.\d\d% +\S",
        "output of perf report, which sums events up",
        _SCRIPT,
    ),
    _row(
        r"^ *Performance counter stats for|^#? *time +counts unit events|^ *\d{1,9}\.\d{9},[\d<]",
        "output of perf stat, which counts events",
        "record with perf record -e 'kvm:*' and print with perf script",
    ),
    _row(
        r"^0x[0-9a-f]+(?:@\S+)? \[0x[0-9a-f]+\]: event: \d+|^\. ?\. ?\.\.\. raw event: size",
        "a dump of perf script -D",
        "print the recording with perf script, without -D",
    ),
    _row(r'^\s*\{?"linux-perf-json-version"', "JSON of perf data convert", _SCRIPT),
    _row(
        r"^ ?Tracing meta data in file ",
        "a description of trace-cmd dump",
        "print the recording with trace-cmd report",
    ),
    _row(
        r"^(?:task: \S++$|  Event: \S++ \(\d+\))",
        "a summary of trace-cmd report --profile",
        "print the recording with trace-cmd report, without --profile",
    ),
    _row(
        r"^Kernel buffer statistics:|^CPU: \d+\s*$|^entries: \d+\s*$",
        "the counts of trace-cmd report --stat",
        "print the recording with trace-cmd report, without --stat",
    ),
    _row(
        rf"^ *\S.{{0,40}}? (?:\[\d{{3}}\] +|\d+ +){_TOD}[A-Za-z_][\w-]*:[A-Za-z_]\w*:",
        "output of perf script without times",
        "print them: perf script -F +time",
    ),
    _row(
        rf"^ *\S.{{0,40}}? (?:\[\d{{3}}\] +|\d+ +){_TOD}{_NO_PROBE}",
        "output of perf script without times and names of events",
        "print them: perf script -F +time,+event",
    ),
    _row(
        rf"^ *\S.{{0,40}}? (?:\[\d{{3}}\] +|\d+ +){_TOD}\d+\.\d{{6,9}}: *$",
        "output of perf script without events",
        "print them: perf script -F +event,+trace",
    ),
    _row(
        r"^@\w*(?:\[.*\])?: (?:\d+|\()|^@\w*\[?$|^\[[\d.KMG]+, [\d.KMG]+\) +\d+ \|@* *\|",
        "maps of bpftrace, which sum events up",
    ),
    _row(r"^Attach(?:ing|ed)(?: to)? \d+ probes?\.*", "output of a bpftrace program"),
    _row(
        r"^ *usecs +: count +distribution|^ *nsecs +: count +distribution",
        "a histogram of a bcc tool, which sums events up",
    ),
    _row(
        r"^Tracing \d+ functions for |^(?:FUNC +COUNT|PID +TID +[A-Z_]+ +[A-Z]+)\b|^\tCOUNT +EVENT"
        r"|^Display kvm exit reasons",
        "output of a bcc tool",
    ),
    _row(
        r"^(?:\[pid +\d+\] +|\d+ +)?(?:[\d:.]+ +)?\w+\((?:.*\) += |.* <unfinished \.\.\.>$)"
        r"|^% time +seconds +usecs/call",
        "strace output",
    ),
    _row(
        r"^[0-9a-f]{4,16}:? {1,2}(?:[0-9a-f]{2,4} ){2,16}|^[0-7]{7} (?: {2}\S| \\n| {3}){4}",
        "a hex dump",
        "turn it back: xxd -r (of xxd's output), or send the file as it was",
    ),
    _row(
        r"^(?i:content-transfer-encoding: base64)|^[A-Za-z0-9+/]{60,76}$",
        "encoded in base64",
        "save the attachment, or decode it: base64 -d",
    ),
    _row(
        r"^.{0,400}?\d: +\S.{0,400}?(?:\\n|['\"], ?['\"]).{0,60}?-?\d.{0,60}?\d: \S",
        "text with many lines in one",
        "print each on a line of its own: sed 's/\\\\n/\\n/g', or of JSON jq -r '.. | strings'",
    ),
    _row(
        r"^[^\n]{0,80}[,;]\[\d{1,4}\][,;]|^[^\n]{0,80}-\d{1,9}[,;]+(?:\([,;]*\d{1,9}\)[,;]+)?\[\d",
        "a table of cells; blanks were lost",
        "send the file as it was, or put blanks for the separators: tr ',;' ' '",
    ),
    _row(
        r"^.{0,99}\[\d{1,4}\].{0,20}? \d{1,9},\d{6,9}: ",
        "text with commas in its times",
        r"print it with LC_ALL=C, or sed -E 's/([0-9]),([0-9]{6,9}: )/\1.\2/'",
    ),
    _row(
        r'^\s*\{"dmesg"\s*:\s*\[\s*\{|^\s*\[\s*\{"(?:__CURSOR|__REALTIME_TIMESTAMP|MESSAGE)"',
        "a log in JSON with all its entries on one line",
        "print each on a line of its own: dmesg -J | jq -c '.dmesg[]', or journalctl -k -o json",
    ),
    # Linux kernel/trace/trace.c, print_raw_fmt, print_hex_fmt, print_bin_fmt: numbers for threads,
    # CPUs and times; for most events only "type: 1540" (trace_output.c, trace_nop_print).
    _row(r"^\d{1,9} \d{1,4} \d{5,20} (?:\w+: |[\d?]+$|[0-9a-f]+ )", _OPTION.format("raw"), _OFF),
    _row(r"^[0-9a-f]{8} ?[0-9a-f]{8} ?[0-9a-f]{16}\b", _OPTION.format("hex"), _OFF),
    _row(r"^.{0,80}\x00.{0,80}type: \d{1,5}$", _OPTION.format("bin"), _OFF),
    # Linux kernel/trace/trace_functions_graph.c: print_graph_rel_time, used by wakeup and irqsoff;
    # and print_graph_cpu, without whose column the running thread is unknown.
    _row(
        r"^ *+(?:\d{1,10}\.\d{6} \| ++)?\d{1,12} us \| ++\d{1,4}\) ",
        "output of a latency tracer with options/display-graph, with times since it began",
        "echo function_graph > current_tracer, echo 1 > options/funcgraph-abstime",
    ),
    _row(
        r"^ *+(?:\d{1,10}\.\d{6} \| ++)?(?!\d{1,4}\) )(?:\S[^|]{0,40}?-\d{1,9} *+\| ++)?"
        r"(?:[$@*#!+] *+)?\d[\d.]{0,9} us ++\| ++[\w}]",
        "output of the function_graph tracer without the CPUs",
        "echo 1 > options/funcgraph-cpu, and read the file again",
    ),
    _row(
        r"^# tracer: (?:function|wakeup\w*|irqsoff|preempt\w*|hwlat|osnoise|timerlat|blk|branch)$"
        r"|^ *\S.{0,40}?-\d{1,9} .{0,60}?\d\.\d{6}: [\w.]+ <-[\w.]+",
        "output of a tracer of functions or latencies, which prints no arguments and no returns",
        "echo nop > current_tracer, and " + _RECORD,
    ),
)
# Events and messages that do not come from an Intel TDX host.
_OF_AMD: Final = "its KVM events are of an AMD host; TDX is an Intel feature"
_ARM: Final = re.compile(r"^(?>.*?\bkvm_(?:exit|entry): ).*?(?:HSR_EC|ESR_EC|\bPC: 0x)", re.ASCII)
_AMD: Final = re.compile(
    r"^(?>.*?\bkvm_exit: ).*?reason (?:EXIT_|npf\b|0x40\d\b)"
    r"|^.{0,99}?\bkvm_(?:vmgexit\w{1,9}|rmp_fault): ",
    re.ASCII,
)
# In a guest's log: Linux arch/x86/coco/tdx/tdx.c, tdx_early_init, and arch/x86/mm/mem_encrypt.c.
_GUEST: Final = re.compile(
    r"\b(?:tdx_hypercall|tdvmcall|tdx_virtualization_exception|tdcall)\b|\btdx: Guest detected"
    r"|Memory Encryption Features active: Intel TDX"
)
# Names of events that tdxtrace reads, in any spelling.
_OURS: Final = re.compile(
    r"\b(?:kvm_(?:entry|exit|page_fault|userspace_exit|tdx_seamcall_\w+)|tdh_\w+"
    r"|__seamcall\w*|(?:tdx_)?seamcall_(?:enter|exit)|tdx_vcpu_run)\b",
    re.ASCII,
)
_MOST_NAMES: Final = 5


def refusal_of(lines: list[str]) -> str | None:
    """Describe a text: its kind, what to run instead, and which of its events could be read.

    Args:
        lines: Its first lines.

    Returns:
        One sentence without the name of the text; None if no row of ``REFUSALS`` matches.
    """
    for row in REFUSALS:
        if any(row.line.match(line) for line in lines):
            return f"{row.what}; {row.instead}{_ours(lines)}"
    return None


def not_intel(lines: list[str]) -> str | None:
    """Return the reason why lines cannot come from an Intel TDX host; None if they show none."""
    if any(_ARM.match(line) for line in lines):
        return "its KVM events are of an ARM host; TDX is an Intel feature"
    if any(_AMD.match(line) for line in lines):
        return _OF_AMD
    if any(_GUEST.search(line) for line in lines):
        return "it is of a guest; trace the host"
    return None


# What the lines of an input lack, by the kind of loss that was counted for them.
_LACKING: Final = {
    "wrapped": "has wrapped lines in which a number may be cut; join them "
    "(set nowrap in the mailer, less -S off, a wider terminal) or send the file as an attachment",
    "no_abstime": "has no times; switch them on: echo 1 > options/funcgraph-abstime",
    "no_event": "does not name its events; print them: perf script -F +event",
    "no_time": "has no times; print them: perf script -F +time, or of tracefs: echo 1 > "
    "options/context-info",
}
# What calls printed by function_graph may lack, and the option that prints it.
_OF_GRAPH: Final = {
    "without funcgraph-duration": "funcgraph-duration",
    "without ret=": "funcgraph-retval (Linux 6.5 and later)",
}


def nothing_in(shown: str, stats: SourceStats, lines: list[str]) -> str:
    """Return a sentence on an input without SEAMCALL and KVM events: cause, content, remedy.

    Args:
        shown: Name of the input, as printed.
        stats: Counts of its lines or records by result.
        lines: The first lines of a text; empty for a binary recording.
    """
    other, what = not_intel(lines), refusal_of(lines)
    if other is None and stats.has_amd_exits:
        other = _OF_AMD
    if other is not None:
        ours = _ours([*lines, *stats.events])
        return f"{shown} has no event of a TDX host: {other}{ours}{' there' if ours else ''}"
    lacks = {kind: _LACKING[kind] for kind, _ in stats.entries if kind in _LACKING}
    # Lines of other tools may look like events without times.
    no_time = lacks.pop("no_time", None)
    why = next(iter(lacks.values()), None) or (what and f"is {what}") or no_time
    return f"{shown} {why or _other_events(stats)}"


def _other_events(stats: SourceStats) -> str:
    """Return the end of that sentence: the events that the input has, and the remedy."""
    told = [(kind, name) for kind, name in stats.entries if name]
    names = [name for kind, name in told if kind in ("noise", "unmapped")]
    names = [name for name in names if not name.startswith("PERF_RECORD_")]
    undecoded = [name for kind, name in told if kind == "undecoded"]
    if "about something else" in names:
        return "is a kernel log without a message about TDX; give it with --dmesg"
    if names == ["of another program"]:
        return "has lines of other programs alone; give what the kernel logged: journalctl -k"
    if names or stats.events:
        way = "record kvm:kvm_entry, kvm:kvm_exit and probes on tdh_mem_page_aug and its siblings"
        if any(kind == "unmapped" for kind, _ in told):
            way = "name the probed functions with --map EVENT=FUNCTION"
        return f"has no SEAMCALL and no KVM event; it has {_some(names)}; {way}"
    for missing, option in _OF_GRAPH.items():
        if any(name.endswith(missing) for name in undecoded):
            return f"has calls {missing}; switch it on: echo 1 > options/{option}"
    if undecoded:
        return (
            f"has events without the fields that are needed: {_some(undecoded)}; "
            "print them (perf script -F +trace) or record them (see tdxtrace capture plan)"
        )
    sample = next((repr(e.detail) for e in stats.entries.values() if e.detail), "only headers")
    return f"has no known event; its first line: {sample}"


def _some(names: list[str]) -> str:
    some = ", ".join(one_line(name, 30) for name in names[:_MOST_NAMES])
    return some + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def _ours(lines: list[str]) -> str:
    found = dict.fromkeys(name for line in lines for name in _OURS.findall(line))
    names = list(found)[:_MOST_NAMES]
    if not names:
        return ""
    return f"; of its events {', '.join(one_line(name, 40) for name in names)} would be read"
