"""Texts as users store and paste them: UTF-16, HTML, colours, other blanks and line ends."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator

import pytest
from support.texts import ONE_CALL, aug, aug_ret, is_accounted_for, line, lost, read_text

from tdxtrace.errors import FormatError
from tdxtrace.ingest.pasted import mend_text
from tdxtrace.tables.trace import Trace

BUSY = "ret=0x8000020000000001"
KVM_ENTRY = "kvm_entry: vcpu 3, rip 0x0 intr_info 0x00000000 error_code 0x00000000"
TRACEFS = (
    aug("1.000001")
    + aug_ret("1.000005", BUSY)
    + aug("1.000011")
    + aug_ret("1.000015")
    + line("1.000021", KVM_ENTRY)
)
TRACE_CMD = re.sub(r"\([\w.+/ \[\]]+ <- \w+\)", "(ffffffff810a0004 <- ffffffffc0a0009b)", TRACEFS)
PERF = "".join(
    re.sub(r"^( *CPU 0/KVM)-(\d+) +(\[\d+\]) \.{5} ([\d.]+): ", r"\1 \2 \3 \4: tdx:", printed)
    for printed in TRACE_CMD.splitlines(keepends=True)
)
LOG = (
    "[  896.162769] kvm_intel: SEAMCALL TDH_VP_INIT failed: 0x8000020000000080\n"
    "[  896.170001] virt/tdx: SEAMCALL (0x000000000000001c) failed: 0xc000030000000001\n"
)


def coloured(text: str) -> str:
    """As grep --color=always prints it."""
    return re.sub("aug|SEAMCALL", "\x1b[01;31m\x1b[K\\g<0>\x1b[m\x1b[K", text)


def in_json(text: str, make: Callable[[str], object]) -> str:
    return "".join(json.dumps(make(line)) + "\n" for line in text.splitlines())


def container(printed: str) -> dict[str, str]:
    """As Docker keeps it; Go writes < and > as code points."""
    return {"log": printed + "\n", "stream": "stdout", "time": "2026-01-01T00:00:00.000000001Z"}


def before(made: str) -> Callable[[str], str]:
    """Put a text before each line; {n} is its number."""
    return lambda text: "".join(
        made.format(n=n) + line + "\n" for n, line in enumerate(text.splitlines(), 97)
    )


def behind(made: str) -> Callable[[str], str]:
    return lambda text: text.replace("\n", made + "\n")


def by_grep(text: str) -> str:
    """As grep -C prints what it found in a file, and what is beside it."""
    lines = (f"t.txt{':-'[n % 2]}{n}{':-'[n % 2]}{x}" for n, x in enumerate(text.splitlines()))
    return "\n--\n".join(lines) + "\n"


def of_journal(line: str) -> dict[str, object]:
    return {"__CURSOR": "s=1", "_TRANSPORT": "stdout", "SYSLOG_IDENTIFIER": "cat", "MESSAGE": line}


# Of these a kernel's log has its own, or they make no sense of one.
TRACE_FORMS: dict[str, Callable[[str], str | bytes]] = {
    "journalctl -o json": lambda text: in_json(text, of_journal),
    "journalctl -o json, bytes": lambda text: in_json(
        text, lambda line: {"MESSAGE": list(line.encode())}
    ),
    "journalctl -o json-seq": lambda text: re.sub(
        "^", "\x1e", in_json(text, of_journal), flags=re.M
    ),
    "journalctl -o json-sse": lambda text: re.sub("^{", "data: {", in_json(text, of_journal)),
    "journalctl -o json-pretty": lambda text: "".join(
        json.dumps(of_journal(line), indent="\t") + "\n" for line in text.splitlines()
    ),
    "a key that nobody thought of": lambda text: in_json(text, lambda line: {"a": {"b": line}}),
    "a list of JSON": lambda text: json.dumps(text.splitlines(), indent=2) + "\n",
    "logfmt": lambda text: "".join(f"t=1 msg={json.dumps(x)}\n" for x in text.splitlines()),
    "cat -n": before("{n:6}\t"),
    "less -N": before("{n:7} "),
    "grep -C": by_grep,
    "ts": before("Nov 12 11:22:33 "),
    "ts %.s": before("17629429{n}.123456 "),
    "a console": before("[  896.{n:06}] "),
    "a console, with threads": before("[  896.{n:06}][ T{n}] "),
    "syslog": before("Nov 12 11:22:33 host-3 cat[{n}]: "),
    "journalctl -o short-full": before("Wed 2025-11-12 11:22:33 CET host cat[123]: "),
    "Jenkins": before("[2026-01-01T00:00:00.000Z] "),
    "pods": before("[pod/x-{n}/main] "),
    "diff": before("+"),
    "a list": before("{n}. "),
    "bat": before("{n:4}   \u2502 "),
    "cat -e": behind("$"),
    "cat -e, CRLF": behind("^M$"),
    "bold": lambda text: behind("**")(before("**")(text)),
    "cells": lambda text: behind(" |")(before("| ")(text)),
    "a spreadsheet": behind(",,,"),
}
FORMS: dict[str, Callable[[str], str | bytes]] = {
    "HTML, twice": lambda text: html.escape(html.escape(text)),
    "HTML, an arrow": lambda text: html.escape(text).replace("&lt;-", "&larr;"),
    "HTML, breaks": lambda text: html.escape(text).replace(" ", "&nbsp;").replace("\n", "<br>\n"),
    "HTML, one line": lambda text: html.escape(text).replace("\n", "<br/>"),
    "HTML, lines": lambda text: re.sub(
        "^(.*)$", r'<tr><td class="n">\1</td></tr>', html.escape(text).rstrip(), flags=re.M
    ),
    "Markdown, escaped": lambda text: re.sub(r"([_\[\]*<>])", r"\\\1", text),
    "colours of 256": lambda text: re.sub("^(.*)$", "\x1b[38;5;8m\\1\x1b[39m", text, flags=re.M),
    "script(1)": lambda text: "\x1b[?2004l" + text.replace("\n", "\r\n") + "\x1b[?2004h",
    "a terminal, by cat -v": lambda text: re.sub("^(.*)$", "^[[31m\\1^[[0m", text, flags=re.M),
    "overstruck": lambda text: re.sub("(tdh|SEAM)", "t\bt\\1", text).replace("t\bttdh", "t\btdh"),
    "dashes of an editor": lambda text: text.replace("-", "\u2013"),
    "wide blanks": lambda text: text.replace("  ", "\u2003\u2009"),
    "marks without a width": lambda text: text.replace(":", ":\u200b").replace("_", "_\u00ad"),
    "Latin-1": lambda text: text.replace("  ", " \u00a0").encode("latin-1"),
    "as it was printed": lambda text: text,
    "UTF-16 of PowerShell": lambda text: ("\ufeff" + text.replace("\n", "\r\n")).encode(
        "utf-16-le"
    ),
    "UTF-16, big-endian": lambda text: ("\ufeff" + text).encode("utf-16-be"),
    "a Mac's line ends": lambda text: text.replace("\n", "\r"),
    "HTML": lambda text: html.escape(text, quote=False),
    "HTML, quoted": lambda text: html.escape(re.sub("^", "> ", text.strip(), flags=re.M)) + "\n",
    "HTML, of a page": lambda text: f"<pre>{html.escape(text)}</pre>\n",
    "no-break blanks": lambda text: text.replace("  ", " \u00a0"),
    "no-break blanks of HTML": lambda text: html.escape(text).replace("  ", " &nbsp;"),
    "HTML as UTF-16": lambda text: ("\ufeff" + html.escape(text)).encode("utf-16-le"),
    "coloured by grep": coloured,
    "coloured lines": lambda text: re.sub("^.+$", "\x1b[32m\\g<0>\x1b[0m", text, flags=re.M),
    "an arrow of a font": lambda text: text.replace("<-", "\u2190"),
    "Docker": lambda text: in_json(text, container).replace("<", "\\u003c"),
    "Docker, on a terminal": lambda text: in_json(text, lambda line: container(line + "\r")),
    "Docker, in pieces": lambda text: in_json(text, container).replace(
        "ret=", 'ret", "stream": "stdout"}\n{"log": "='
    ),
    "Docker, coloured": lambda text: in_json(coloured(text), container),
    "fluent-bit": lambda text: in_json(text, lambda line: {"stream": "stdout", "log": line}),
    "logstash": lambda text: in_json(text, lambda line: {"@timestamp": "2026", "message": line}),
    "Loki": lambda text: in_json(text, lambda line: {"labels": {"pod": "x"}, "line": line}),
    "jq": lambda text: in_json(text, lambda line: line),
    "Kubernetes": lambda text: (
        re.sub("^", "2026-01-01T00:00:00.000000001Z stdout F ", text.rstrip(), flags=re.M) + "\n"
    ),
}


def calls(trace: Trace) -> list[tuple[object, ...]]:
    columns = ("leaf", "tid", "cpu", "gpa", "status", "start_ns", "end_ns")
    return trace.seamcalls.select(columns).rows()


@pytest.mark.parametrize("text", [TRACEFS, TRACE_CMD, PERF], ids=["tracefs", "trace-cmd", "perf"])
@pytest.mark.parametrize("form", [*FORMS, *TRACE_FORMS])
def test_a_trace_is_the_same_in_every_form(form: str, text: str) -> None:
    printed, pasted = read_text(text), read_text((FORMS | TRACE_FORMS)[form](text))
    assert len(calls(printed)) == 2
    assert calls(pasted) == calls(printed)
    names = ("tid", "comm")
    assert pasted.threads.select(names).rows() == printed.threads.select(names).rows()
    assert pasted.vm_entries.height == 1
    assert is_accounted_for(pasted)
    # The tags of a page are no lines of a trace.
    frames = ("HTML, of a page", "grep -C", "journalctl -o json-pretty", "a list of JSON")
    tags = {"unparsed"} if form in frames else set()
    assert set(lost(pasted)) <= set(lost(printed)) | tags


@pytest.mark.parametrize("form", FORMS)
def test_a_log_is_the_same_in_every_form(form: str) -> None:
    trace = read_text(FORMS[form](LOG))
    assert trace.kernel_messages["status"].to_list() == [
        0x8000_0200_0000_0080,
        0xC000_0300_0000_0001,
    ]
    assert is_accounted_for(trace)


def test_a_form_is_undone_wherever_the_input_is_cut() -> None:
    text = html.escape(3 * TRACEFS).encode()
    mend = mend_text(text)
    assert mend is not None
    for size in (1, 7, 64):
        chunks: Iterator[bytes] = (text[at : at + size] for at in range(0, len(text), size))
        assert b"".join(mend(chunks)) == html.unescape(text.decode()).encode()


@pytest.mark.parametrize(
    "text",
    [
        # A name with an escape, of a thread that wants to be seen, and with what HTML calls "<".
        ONE_CALL.replace("CPU 0/KVM", "CPU\x1b[31m0", 1),
        ONE_CALL.replace("\n", "\r\n"),
        # A probe that prints the name of the thread.
        ONE_CALL.replace("level=0", 'level=0 comm="qemu"').replace("0x0\n", '0x0 comm="qemu"\n'),
        # A name that is longer than Linux has any, as Android prints them.
        ONE_CALL.replace("CPU 0/KVM", "com.android.systemui"),
        "\xff\xfe damaged " + ONE_CALL,
    ],
)
def test_what_was_printed_so_is_left_as_it_is(text: str) -> None:
    assert mend_text(text.encode("latin-1")) is None


def test_a_log_that_is_one_line_of_json_is_refused_with_a_remedy() -> None:
    text = '{"dmesg": [{"pri": 3, "time": " 896.162769", "msg": "' + LOG[15:60] + '"}]}\n'
    with pytest.raises(FormatError, match=r"jq -c '\.dmesg\[\]'"):
        read_text(text)


@pytest.mark.parametrize(
    "prefix", ["Nov 12 11:22:33 ", "2025-11-12T11:22:33.123456Z ", "2025-11-12 11:22:33 "]
)
def test_a_date_that_ts_put_before_a_log_is_no_syslog(prefix: str) -> None:
    trace = read_text(re.sub("^(?=.)", prefix, LOG, flags=re.M))
    assert trace.kernel_messages["ts_ns"].to_list() == [896_162_769_000, 896_170_001_000]


def test_a_program_that_writes_the_kernels_time_is_still_a_program() -> None:
    text = f"Nov 12 11:22:33 host mallory[7]: {LOG.splitlines()[0]}\n{LOG}"
    assert read_text(text).kernel_messages.height == 2


def test_objects_that_are_none_of_a_log_are_left_as_they_are() -> None:
    others = '{"log": 5}\n{"log": "cut\n"text" behind\n["line"]\n{"log": "\\ud800"}\n'
    mend = mend_text((in_json("a line\n", container) + others).encode())
    assert mend is not None
    made = b"".join(mend([(in_json("a line\n", container) + others).encode()]))
    assert made == b"a line\n" + others.encode().replace(b'{"log": "\\ud800"}\n', b"?")
    assert mend_text(others.partition('{"log": "\\')[0].encode()) is None


@pytest.mark.parametrize("width", [50, 60, 66, 70])
def test_a_log_in_quoted_printable_loses_no_number(width: int) -> None:
    folded = "".join(
        printed[:width] + "=\n" + printed[width:] for printed in LOG.splitlines(keepends=True)
    )
    trace = read_text(folded)
    assert trace.kernel_messages["status"].to_list() == [
        0x8000_0200_0000_0080,
        0xC000_0300_0000_0001,
    ]
    assert lost(trace) == {"joined": 2}
