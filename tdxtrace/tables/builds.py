"""The tables measurement_log and host_checks: build of MRTD, known weaknesses of the module."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.causes import TD_OF_CALL
from tdxtrace.tables.events import GPA, I64, LEAF, SOURCE, TEXT, U32, U64
from tdxtrace.tables.schema import Column, Table

WEAKNESSES: Final = ("single_step_by_time", "host_priority_lost", "pending_page_refused")
AFFECTED: Final = ("yes", "no", "unknown")

MEASUREMENT_LOG = Table(
    name="measurement_log",
    grain="one row per call that makes or extends a TD's build-time measurement",
    meaning="The measurement log is the order in which MRTD was made: TDH.MNG.INIT begins it, "
    "TDH.MEM.PAGE.ADD adds the address of a page, TDH.MR.EXTEND 256 bytes of its contents, "
    "TDH.MR.FINALIZE ends it.",
    key=("source", "seq"),
    columns=(
        SOURCE,
        TD_OF_CALL,
        Column(
            "build",
            U32,
            "Number of the TD's build, counted by TDH.MNG.INIT; 0: that call was not recorded.",
        ),
        Column("number", U32, "Place of the call in its build, from 1."),
        Column("seq", U64, "seamcalls.seq of the call."),
        Column("ts_ns", I64, "End of the call (start, if no return was recorded).", unit="ns"),
        LEAF,
        GPA,
        Column(
            "status",
            U64,
            "Status, always a success; null: no return was recorded, the call may have failed.",
            nullable=True,
        ),
    ),
)

HOST_CHECKS = Table(
    name="host_checks",
    grain="one row per kernel log and known weakness of TDX modules",
    meaning="A host check reports whether a release of the TDX module has a weakness that later "
    "releases fixed.",
    key=("source", "weakness"),
    columns=(
        SOURCE,
        Column(
            "module_version",
            TEXT,
            "Release in the log; null: the log names no release, or two different ones.",
            nullable=True,
        ),
        Column("generation", pl.Enum(("A", "B", "C")), "Lock generation.", nullable=True),
        Column("weakness", pl.Enum(WEAKNESSES), "Name of the weakness."),
        Column("affected", pl.Enum(AFFECTED), "Whether the release has the weakness."),
        Column("meaning", TEXT, "Description of the weakness."),
        Column("basis", TEXT, "Source of the description."),
    ),
)

BUILD_TABLES: Final = (MEASUREMENT_LOG, HOST_CHECKS)
