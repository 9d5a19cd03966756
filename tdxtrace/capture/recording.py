"""Directory of a recording: ring-buffer pages of each CPU and the metadata to read them.

It has the layout of a tracefs instance, and can be read at any time, even if the recorder was
killed: per_cpu/cpuN/trace_pipe_raw, events/*/*/format, trace_clock, saved_cmdlines,
saved_tgids, osrelease, capture.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

from tdxtrace.capture.instance import Instance, page_bytes
from tdxtrace.capture.recipe import Recipe

PAGES: Final = "trace_pipe_raw"
_CMDLINE: Final = re.compile(r"^[^\S\n]*(?P<tid>\d{1,9}) (?P<comm>.{1,64})$", re.MULTILINE)
_TGID: Final = re.compile(r"^[^\S\n]*(?P<tid>\d{1,9}) (?P<tgid>\d{1,9})$", re.MULTILINE)


@dataclass(slots=True)
class RecordingFolder:
    """Directory of a recording that is being written."""

    folder: Path
    tracefs: Path
    release: str
    comms: dict[int, str] = field(default_factory=dict)
    """Last known name of each thread, by tid."""

    def begin(self, instance: Instance, recipe: Recipe) -> None:
        """Create the directory and copy the metadata that does not change.

        Raises:
            OSError: If it cannot be written.
        """
        self.folder.mkdir(parents=True)
        for cpu in instance.cpus():
            (self.folder / "per_cpu" / f"cpu{cpu}").mkdir(parents=True)
        events = self.tracefs / "events"
        (self.folder / "events").mkdir()
        for name in ("header_page", "header_event"):
            self._copy(events / name, f"events/{name}")
        for name in [p.name for p in recipe.probes] + [e.name for e in recipe.events]:
            self._copy(events / name / "format", f"events/{name}/format")
        for path in sorted((events / "ftrace").glob("*/format")):
            self._copy(path, f"events/ftrace/{path.parent.name}/format")
        (self.folder / "trace_clock").write_text(f"[{recipe.clock}]\n")
        (self.folder / "osrelease").write_text(self.release + "\n")

    def _copy(self, source: Path, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())

    def pages_of(self, cpu: int) -> Path:
        """Return the file for a CPU's pages."""
        return self.folder / "per_cpu" / f"cpu{cpu}" / PAGES

    @property
    def page_bytes(self) -> int:
        """Size of a ring-buffer page in bytes, from header_page."""
        return page_bytes((self.tracefs / "events/header_page").read_text())

    def record_threads(self) -> None:
        """Record the current thread names; the kernel keeps only the last 128 by default."""
        self.comms.update(comms_of(self.tracefs))

    def finish(self, instance: Instance, provenance: dict[str, Any]) -> None:
        """Write the metadata that is known only at the end.

        Raises:
            OSError: If it cannot be written.
        """
        self.record_threads()
        lines = "".join(f"{tid} {comm}\n" for tid, comm in sorted(self.comms.items()))
        (self.folder / "saved_cmdlines").write_text(lines)
        tgids = self._tgids()
        lines = "".join(f"{tid} {tgid}\n" for tid, tgid in tgids.items())
        (self.folder / "saved_tgids").write_text(lines)
        provenance = provenance | {"tgids": tgids}
        for cpu in instance.cpus():
            (self.folder / "per_cpu" / f"cpu{cpu}" / "stats").write_text(instance.stats_text(cpu))
        text = json.dumps(provenance, indent=2) + "\n"
        (self.folder / "capture.json").write_text(text)

    def _tgids(self) -> dict[int, int]:
        """Return the tgid of each tid in saved_tgids."""
        try:
            text = (self.tracefs / "saved_tgids").read_text("ascii", "replace")
        except OSError:
            return {}
        return {int(found["tid"]): int(found["tgid"]) for found in _TGID.finditer(text)}

    def discard(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.folder, ignore_errors=True)


def work_folders(output: Path) -> tuple[list[Path], Path]:
    """Return the directories of incomplete recordings beside ``output``, and an unused name.

    They are ``OUTPUT.part``, ``OUTPUT.1.part`` and so on: recordings of recorders that were
    killed or failed.
    """
    left: list[Path] = []
    for n in count():
        path = output.with_name(f"{output.name}.{n}.part" if n else f"{output.name}.part")
        if not os.path.lexists(path):
            return left, path
        left.append(path)
    raise AssertionError("there is always another number")


def comms_of(tracefs: Path) -> dict[int, str]:
    """Return the thread names in saved_cmdlines, by tid."""
    try:
        text = (tracefs / "saved_cmdlines").read_text("utf-8", "replace")
    except OSError:
        return {}
    return {int(found["tid"]): found["comm"] for found in _CMDLINE.finditer(text)}
