"""The measurement log and the host checks as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from tdxtrace.report.units import plural
from tdxtrace.tables.text import one_line
from tdxtrace.tdx.leaves import leaf_name, parse_leaf

_FINALIZE: Final = parse_leaf("TDH.MR.FINALIZE")[0]
_NO_LOG: Final = (
    "# no TDH.MNG.INIT, MEM.PAGE.ADD, MR.EXTEND or MR.FINALIZE was recorded: probe them "
    "(tdxtrace capture plan) and start before the TD is created"
)
_NO_CHECK: Final = "no kernel message about TDX: pass the whole log, starting at boot"
_NO_RELEASE: Final = (
    "the log does not name a single module release; the kernel prints it at boot "
    '("Module version", "build_num"), and tdxtrace capture doctor reads it from sysfs'
)
_MARKS: Final = {"yes": "AFFECTED", "no": "not affected", "unknown": "unknown"}


def measurement_text(log: pl.DataFrame, losses: pl.DataFrame) -> str:
    """Return the log with one call per line, as probes of the kernel's wrappers would print it.

    A line is the name of the wrapper and, if it takes an address, ``gpa=0x...``: two builds of the
    same image give the same lines.  Lines that start with ``#`` are comments.

    Args:
        log: The ``measurement_log`` table.
        losses: The ``losses`` table.
    """
    if log.is_empty():
        return _NO_LOG + "\n"
    lost = losses.filter(pl.col("severity") == "data_loss")
    lines = []
    builds = log.partition_by("source", "td_id", "build", maintain_order=True)
    for number, build in enumerate(sorted(builds, key=lambda b: int(b["ts_ns"][0])), 1):
        n_lost = lost.filter(pl.col("source") == build["source"][0]).height
        if len(builds) > 1:
            lines.append(f"# build {number} of {len(builds)}")
        lines += [f"# incomplete: {why}" for why in gaps(build, n_lost)]
        named = build.with_columns(
            name=leaf_name(pl.col("leaf")).str.replace_all(".", "_", literal=True)
        )
        lines += [_line(row) for row in named.iter_rows(named=True)]
    return "".join(f"{line}\n" for line in lines)


def gaps(build: pl.DataFrame, n_lost: int) -> Iterator[str]:
    """Yield the reasons why the calls of a build may be incomplete or may have failed.

    Args:
        build: Rows of the ``measurement_log`` table of one build.
        n_lost: Number of losses in its recording.
    """
    if build["build"][0] == 0:
        yield "its TDH.MNG.INIT was not recorded"
    if not (build["leaf"] == _FINALIZE).any():
        yield "no TDH.MR.FINALIZE was recorded"
    if n_lost:
        yield f"the recording has {plural(n_lost, 'loss', 'losses')}"
    if n := build["status"].null_count():
        yield f"the answers of {plural(n, 'call')} were not recorded"


def _line(row: dict[str, Any]) -> str:
    gpa = "" if row["gpa"] is None else f" gpa={row['gpa']:#x}"
    return f"{row['name']}{gpa}"


def host_check_text(checks: pl.DataFrame, names: list[str]) -> str:
    """Return the module release of each log and the known weaknesses of that release.

    Args:
        checks: The ``host_checks`` table.
        names: Name of each input, untrusted.
    """
    if checks.is_empty():
        return _NO_CHECK + "\n"
    lines = []
    for rows in checks.partition_by("source", maintain_order=True):
        first = rows.row(0, named=True)
        version = first["module_version"]
        what = _NO_RELEASE if version is None else f"TDX module {one_line(version)}"
        locks = f", lock generation {first['generation']}" if first["generation"] else ""
        lines.append(f"{one_line(names[first['source']])}: {what}{locks}")
        for row in rows.iter_rows(named=True):
            lines.append(f"{_MARKS[row['affected']]:<13}{row['weakness']}: {row['meaning']}")
            if row["affected"] != "unknown":
                lines.append(f"{'':<13}source: {row['basis']}")
    return "".join(f"{line}\n" for line in lines)
