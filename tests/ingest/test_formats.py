"""Detection of formats by content."""

from __future__ import annotations

import pytest
from support.texts import ONE_CALL, read_text

from tdxtrace.errors import FormatError, QueryError
from tdxtrace.ingest.formats import FORMATS, detect_text, format_named_by_user
from tdxtrace.tables.formats import INPUT_FORMATS, format_named

FTRACE = "       CPU 0/KVM-7       [001] .....  1.000001: kvm_entry: vcpu 0\n"
LATENCY = "   CPU 0/K-23548     1d.... 29678us+: kvm_entry: vcpu 0\n"
VERBOSE = (
    "            fake   23687   1 255 0000000f 00000000 [458dddec] 20.855ms (+0.029ms): "
    "kvm_entry: vcpu 0\n"
)
PERF = "       CPU 0/KVM 14401 [000]  4212.604083:     kvm:kvm_entry: vcpu 0\n"
GRAPH = "   50.000010 |   1)   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n"


def detected_format(text: str | bytes) -> str:
    return detect_text(text.encode() if isinstance(text, str) else text, "x.txt").name


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (FTRACE, "ftrace"),
        ("cpus=2\n        fake-1 [000]  4217.194508: kvm_entry:   vcpu 0\n", "ftrace"),
        ("rig:         fake-1 [000]  4217.194508: kvm_entry:   vcpu 0\n", "ftrace"),
        (LATENCY, "ftrace-latency"),
        ("fake_tdx-15053   0dNHff  4217.194508: kvm_entry:   vcpu 0\n", "ftrace-latency"),
        (VERBOSE, "ftrace-verbose"),
        (PERF, "perf-script"),
        ("[001]   770.850287:    kvm:kvm_entry: vcpu 0, rip 0x100146\n", "perf-script"),
        (GRAPH, "function-graph"),
        (" 0)   1.382 us    |          __might_sleep();\n", "function-graph"),
        # Only what stands around events.
        ("# tracer: nop\n#\n", "ftrace"),
        ("CPU:0 [LOST EVENTS]\n", "ftrace"),
        ("cpus=2\n", "ftrace"),
        # Comments, BOM, quotes and line ends in front of the first line.
        ("# captured on: Sun\n# os release : 6.18\n" + PERF, "perf-script"),
        ("\ufeff" + FTRACE, "ftrace"),
        ("> > " + FTRACE, "ftrace"),
        (FTRACE.replace("\n", "\r\n"), "ftrace"),
        # Most lines decide.
        (FTRACE + PERF + PERF, "perf-script"),
        (FTRACE + FTRACE + PERF, "ftrace"),
        ("Hello,\n\nhere is my trace:\n\n" + FTRACE, "ftrace"),
    ],
)
def test_formats_are_detected_by_their_lines(text: str, form: str) -> None:
    assert detected_format(text) == form


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", ["JPEG"]),
        (b"\x89PNG\r\n\x1a\n\0", ["PNG"]),
        (b"%PDF-1.7\n", ["PDF"]),
        (b"PK\x03\x04\x14\0", ["zip", "unpack"]),
        (b"BZh91AY&SY", ["bzip2", "recompress"]),
        (b"PAR1\x15\x04", ["Parquet"]),
        (b"\x7fELF\x02\x01\x01", ["ELF"]),
        (bytes(range(14, 256)) + b"\0", ["binary"]),
        (b"\xff\xfe#\0 \0t\0r\0a\0c\0e\0r\0", ["binary"]),
        (b"Lorem ipsum dolor sit amet\n", ["Lorem ipsum", "expected ftrace"]),
        (b'openat(AT_FDCWD, "/etc") = 3\n', ["strace"]),
        (b"<html><body>\n", ["<html>"]),
        (b"\x1b[31mred\x1b[0m\n", ["\\x1b"]),
    ],
)
def test_other_files_are_refused_with_a_description(head: bytes, words: list[str]) -> None:
    with pytest.raises(FormatError) as error:
        detected_format(head)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.isprintable()
    assert len(message) < 200


def test_a_blank_line_does_not_make_a_trace() -> None:
    with pytest.raises(FormatError, match="Lorem ipsum"):
        detected_format("Lorem ipsum\n\ndolor sit amet\n")


@pytest.mark.parametrize("n", [1, 50])
def test_garbage_is_one_clear_line_wherever_it_is_noticed(n: int) -> None:
    with pytest.raises(FormatError) as error:
        read_text(bytes(range(256)) * n)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["perf.data", "trace.dat", "x.jpg", "x.gz", "noext"])
def test_the_files_name_does_not_matter(name: str) -> None:
    assert read_text(ONE_CALL, name=name).provenance.sources[0].format == "ftrace"


def test_every_format_has_a_reader() -> None:
    assert set(FORMATS) == set(INPUT_FORMATS.values())


def test_a_format_of_a_later_version_counts_lines_of_events() -> None:
    form = format_named("of later")
    assert (form.name, form.unit, form.holds) == ("of later", "line", "events")


def test_a_format_can_be_given() -> None:
    for form in FORMATS:
        assert format_named_by_user(form.name) == form
    text = "nothing\n" * 3000 + ONE_CALL
    with pytest.raises(FormatError):
        read_text(text)
    trace = read_text(text, input_format="ftrace")
    assert trace.seamcalls.height == 1


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(QueryError, match=r"unknown format 'xml'; there are: .*perf-script"):
        read_text(ONE_CALL, input_format="xml")
