"""Conversion of a folder of pages to a trace.dat."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.recorder import FORMATS, Machine
from support.running import tdxtrace as run

import tdxtrace
from tdxtrace.capture.datwriter import write_dat

MACHINE = Machine()


def folder_of(where: Path, n_pages: list[int], name: str = "vcpu") -> Path:
    """A recording: each CPU's pages hold one call each, of another page of the guest."""
    where.mkdir()
    for cpu, n in enumerate(n_pages):
        per_cpu = where / "per_cpu" / f"cpu{cpu}"
        per_cpu.mkdir(parents=True)
        pages = b"".join(
            MACHINE.page(
                1_000_000 * (k + 1) + cpu,
                MACHINE.event(1, MACHINE.enter(100 + cpu, (k + 1) << 12))
                + MACHINE.event(1, MACHINE.leave(100 + cpu, 0)),
            )
            for k in range(n)
        )
        (per_cpu / "trace_pipe_raw").write_bytes(pages)
        (per_cpu / "stats").write_text(f"entries: 0\noverrun: 0\nread events: {2 * n}\n")
    for system, formats in FORMATS.items():
        for text in formats:
            event = where / "events" / system / text.split()[1].decode()
            event.mkdir(parents=True)
            (event / "format").write_bytes(text)
    (where / "events" / "header_page").write_bytes(MACHINE.header_page)
    (where / "events" / "header_event").write_text("\n")
    (where / "trace_clock").write_text("[mono]\n")
    (where / "saved_cmdlines").write_text(f"100 {name}\n")
    return where


@pytest.mark.parametrize("n_pages", [[3, 2], [1], [0, 5, 0, 2], [7, 0]])
def test_every_page_is_found_again(n_pages: list[int], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x.part", n_pages)
    wanted = tdxtrace.read_trace(folder).seamcalls.drop("seq")
    write_dat(folder, tmp_path / "x.dat", "Linux host 6.18.0 x86_64", "tdxtrace 0.1.0")
    read = tdxtrace.read_trace(tmp_path / "x.dat")
    assert read.seamcalls.drop("seq").equals(wanted)
    assert read.seamcalls.height == sum(n_pages)
    assert not read.losses.filter(read.losses["severity"] != "info").height
    (source,) = read.provenance.sources
    assert (source.kernel, source.clock, source.tool) == ("6.18.0", "mono", "tdxtrace 0.1.0")


def test_a_head_of_any_length(tmp_path: Path) -> None:
    """Over a whole page, byte by byte in steps: what the head rounds up to is where pages are."""
    for n in sorted({*range(0, 4200, 61), *range(16)}):
        folder = folder_of(tmp_path / f"{n}.part", [2, 1])
        uname = "Linux host 6.18.0 " + "x" * n
        write_dat(folder, tmp_path / "x.dat", uname, "tdxtrace 0.1.0")
        assert tdxtrace.read_trace(tmp_path / "x.dat").seamcalls.height == 3, n


def test_a_disk_without_room_keeps_the_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "x.part", [3, 2])
    full = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match="No space left"):
        write_dat(folder, tmp_path / "x.dat", "Linux", "tdxtrace")
    assert not (tmp_path / "x.dat").exists()
    assert tdxtrace.read_trace(folder).seamcalls.height == 5
    assert run("analyze", "log", folder).status == 0
