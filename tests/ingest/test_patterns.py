"""Patterns learned from a line never misread another line."""

from __future__ import annotations

import re

import pytest
from support.ways import by_line, same

from tdxtrace.ingest.batch import FieldLayouts
from tdxtrace.ingest.events.fields import Fields, pairs
from tdxtrace.ingest.events.registry import KEYS
from tdxtrace.ingest.loops import lines as loops
from tdxtrace.ingest.text import line_formats
from tdxtrace.ingest.text.line_formats import LineFormat, formats_of, match_prefix, prefix_of
from tdxtrace.ingest.text.patterns import ColumnSpan, Digits, PatternCache, arguments_of, columns_of

FTRACE = "       CPU 0/KVM-7100    [001] d.h..  1234.000150: aug_in: (0x5646) td=0xff gpa=0x8000"
HEX = Digits(loops.HEX, "gpa")


def test_columns_of_a_prefix() -> None:
    found = match_prefix(FTRACE, formats_of("ftrace"))
    assert found is not None
    columns = columns_of(FTRACE, found[1], prefix_of(*found))
    assert columns is not None
    assert dict(columns.numbers) == {
        loops.TID: ColumnSpan(17, 24, loops.BLANKS_AFTER),
        loops.CPU: ColumnSpan(26, 29),
        loops.WHOLE: ColumnSpan(37, 42, loops.BLANKS_BEFORE),
        loops.PART: ColumnSpan(43, 49),
    }
    assert (columns.comm, columns.flags) == (
        ColumnSpan(0, 16, loops.BLANKS_BEFORE),
        ColumnSpan(31, 36),
    )
    assert (columns.event, columns.whole_ns, columns.digits) == (51, 10**9, 6)
    between = "".join(chr(byte) for _, byte in columns.literals)
    assert between == "- []  .: "


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        # Without the number of a thread, "a 1" is a name that looks like one with it.
        (
            r"^\s*+(?P<comm>.+?)(?: (?P<tid>\d+))? +(?P<sec>\d+)\.(?P<frac>\d+): ",
            "idle 12.567: x: y",
        ),
        # There is room for a CPU of two digits, which none has.
        (r"^(?P<comm>\S+) +(?P<cpu>\d) +(?P<sec>\d+)\.(?P<frac>\d+): ", "idle    1 12.567: x: y"),
        # The stamp counts from somewhere else.
        (r"^(?P<comm>\S+) (?:7(?P<us>\d+)|(?P<sec>\d+)): ", "idle 71234: x: y"),
    ],
)
def test_a_prefix_whose_columns_say_too_little_is_not_learned(pattern: str, line: str) -> None:
    event = line_formats.LINE_FORMATS[0].event
    row = LineFormat("odd", (re.compile(pattern + r"(?P<rest>.*)"),), event)
    found = match_prefix(line, (row,))
    assert found is not None
    cache = PatternCache(lambda line: line_formats.read_prefix(line, (row,)), FieldLayouts())
    assert not cache.add_prefix(line, found[1], prefix_of(*found), 0)


def test_what_arguments_look_like() -> None:
    args = "(0x5646b46b3a50) gpa=0x8000 other=17 name=ab"
    tokens = arguments_of(args, pairs(args, KEYS), lambda text: pairs(text, KEYS))
    assert tokens is not None
    skipped = Digits(loops.SKIPPED, None)
    text = [t if isinstance(t, Digits) else t.decode() for t in tokens if not isinstance(t, tuple)]
    assert "".join(t for t in text if isinstance(t, str)) == "(0x) gpa=0x other= name=ab"
    assert [t for t in tokens if isinstance(t, Digits)] == [skipped, HEX, skipped]


@pytest.mark.parametrize(
    "args",
    [
        "gpa=ff8000",
        "gpa=-5",
        "gpa=0xFF",
        "gpa=1234567890123456",
        "gpa=0x",
        "gpa=0x12345678901234567",
    ],
)
def test_numbers_that_could_not_be_told_apart_are_not_learned(args: str) -> None:
    assert arguments_of(args, pairs(args, KEYS), lambda text: pairs(text, KEYS)) is None


def test_numbers_that_decide_what_is_read_are_not_learned() -> None:
    def decode(text: str) -> Fields:
        fields = pairs(text, KEYS)
        if "gpa=0x8" in text:
            fields.values["level"] = 1
        return fields

    args = "gpa=0x8000"
    assert arguments_of(args, decode(args), decode) is None


NAMES = [
    "x 1.123456: a:b",
    "\tname",
    "na\x0bme",
    "name\x0b",
    "",
    "a:",
    "#bc",
    ">bc",
    "-1",
    "a 17",
    "17/18",
    "....",
]


@pytest.mark.parametrize("name", [*NAMES, *(name.rjust(15, "x") for name in NAMES[1:6])])
def test_names_that_a_line_could_be_misread_by(name: str) -> None:
    """Also those that fill their columns, at the start of the line."""
    perf = "{:>16} 1634 [001]  4226.{:06}: tdx:aug_in: (0x5646) td=0xff gpa=0x8000 level=0"
    ftrace = FTRACE.replace("       CPU 0/KVM", "{:>16}").replace("000150", "{:06}")
    for form, line in (("perf-script", perf), ("ftrace", ftrace)):
        for shown in (name, name.ljust(16, "x")):
            lines = [line.format("usual", k).encode() for k in range(200)]
            odd = [line.format(shown, 200 + k).encode() for k in range(3)]
            same([*lines, *odd, *lines, *odd], form, (100,))
    assert (
        by_line([perf.format("x 1.123456: a:b", 1).encode()], "perf-script").account["events"] == {}
    )
