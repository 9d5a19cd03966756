"""Any error of an input is one line and exit status 1."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
from support.running import answered, refused, tdxtrace
from support.texts import ONE_CALL, line

JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0" + bytes(range(256))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\n\n", "no text", id="blank"),
        pytest.param(JPEG, "JPEG", id="a JPEG"),
        pytest.param(bytes(range(256)) * 9, "", id="binary garbage"),
        pytest.param(b"PERFILE2" + bytes(64), "perf.data", id="perf.data"),
        pytest.param(b"\x17\x08\x44tracing6\0", "trace.dat", id="trace.dat"),
        pytest.param(gzip.compress(ONE_CALL.encode())[:20], "gzip", id="truncated gzip"),
        pytest.param(b"       CPU 0/KVM-7  [001] ..... 1.00", "", id="half a line"),
        pytest.param(b"x" * 10_000_000, "", id="10 MB in one line"),
        pytest.param(b"# tracer: nop\n#\n", "only headers", id="only headers"),
        pytest.param(b"cpus=2\n", "only headers", id="only the head of trace-cmd"),
        pytest.param(line("1.0", "sched_switch: x").encode(), "sched_switch", id="only noise"),
        pytest.param(b"\xff\xfe\xfd\n", "", id="invalid UTF-8"),
        pytest.param(b"\x1b[31mred\x1b[0m\n", "", id="escape sequences"),
        pytest.param(b"<html><b>[red]\n", "", id="markup"),
        pytest.param(b"Lorem ipsum dolor\n", "expected ftrace", id="prose"),
    ],
)
def test_an_input_that_cannot_be_answered(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    message = refused(1, "analyze", path)
    assert said in message
    assert len(message) < 500


@pytest.mark.parametrize("command", ["analyze", "events", "retry-chains", "zero-steps"])
def test_an_input_that_cannot_be_opened(command: str, tmp_path: Path) -> None:
    assert "no such trace" in refused(1, command, tmp_path / "nothing")
    (tmp_path / "empty").touch()
    assert "is empty" in refused(1, command, tmp_path / "empty")
    assert "is a directory" in refused(1, command, tmp_path)
    (tmp_path / "file").write_text("x")
    assert "cannot read" in refused(1, command, tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_input_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(ONE_CALL)
    path.chmod(0)
    assert "Permission denied" in refused(1, "analyze", path)


def test_standard_input_without_anything() -> None:
    assert "is empty" in refused(1, "analyze", "-")


def test_a_trace_without_our_events_says_which_it_has_and_how_to_record_others(
    tmp_path: Path,
) -> None:
    path = tmp_path / "noise.txt"
    path.write_text(line("1.000001", "sched_switch: x") + line("1.000002", "sys_enter: NR 1"))
    message = refused(1, "analyze", path)
    for word in ("sched_switch", "sys_enter", "kvm:kvm_entry", "tdh_mem_page_aug"):
        assert word in message


@pytest.mark.parametrize(
    ("data", "n_calls"),
    [
        pytest.param(ONE_CALL.encode()[:-40], 1, id="a cut last line"),
        pytest.param(ONE_CALL.encode() + b"x" * 900_000 + b"\n", 1, id="0.9 MB in one line"),
        pytest.param(ONE_CALL.encode() + b"\xff\xfe\0\n", 1, id="bytes that are no text"),
        pytest.param(ONE_CALL.encode() + b"\x1b[31mred\x1b[0m\n", 1, id="escape sequences"),
        pytest.param(b"# tracer: nop\n" + ONE_CALL.encode().replace(b"\n", b"\r\n"), 1, id="CRLF"),
    ],
)
def test_a_damaged_input_gets_a_partial_answer(data: bytes, n_calls: int, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(data)
    done = answered("analyze", path)
    assert f"{n_calls} SEAMCALL" in done.text
    assert all(part.isprintable() for part in done.lines)


def test_a_truncated_file_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    text = "".join(ONE_CALL.replace(" 1.", f" {n}.") for n in range(900))
    path.write_bytes(gzip.compress(text.encode())[:-400])
    text = answered("analyze", path, columns=200).text
    assert "LOST: truncated" in text
    assert "copy it again" in text


def test_one_bad_input_among_good_ones_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text(ONE_CALL)
    bad.write_bytes(JPEG)
    assert "bad is a JPEG" in refused(1, "analyze", good, bad)


def test_a_bug_would_keep_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only our own errors become one line: hiding others would hide our mistakes."""
    from tdxtrace.ingest import read

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    path = tmp_path / "t"
    path.write_text(ONE_CALL)
    monkeypatch.setattr(read, "open_input", broken)
    with pytest.raises(ZeroDivisionError):
        tdxtrace("analyze", path)


@pytest.mark.parametrize(
    "words",
    [
        ("analyze", "{}"),
        ("report", "{}", "--format", "html"),
        ("report", "{}", "--brief"),
        ("compare", "{}", "{}", "--format", "md"),
        ("verdicts", "{}"),
    ],
    ids=lambda words: " ".join(words[:3:2]),
)
def test_a_file_whose_name_is_no_utf_8_is_answered(words: tuple[str, ...], tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.txt")
    Path(path).write_text(ONE_CALL)
    done = answered(*(word.format(path) for word in words))
    assert "\x1b" not in done.text
    assert "udce9" in done.text or words[0] == "verdicts"
