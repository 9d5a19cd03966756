"""A program that replaces a TDX host, traced by the real kernel, with its ground truth."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

import tdxtrace

SOURCE = Path(__file__).parents[1] / "capture" / "testbed.c"
LEAVES = {
    "tdh_vp_enter": 0,
    "tdh_mem_sept_add": 3,
    "tdh_mem_page_aug": 6,
    "tdh_mem_range_block": 7,
    "tdh_mem_page_remove": 29,
    "tdh_mem_track": 38,
}
# Possible outcomes in retry_chains of each outcome that the program logs.
OUTCOMES = {
    "success": {"succeeded"},
    "error": {"failed"},
    "gave_up": {"abandoned", "resolved_elsewhere", "cut"},
}


@dataclass(frozen=True, slots=True)
class Tracing:
    """A mounted tracefs."""

    path: Path

    def state(self) -> tuple[list[str], list[str]]:
        """Names of all instances, and lines of all dynamic events."""
        lines = (self.path / "dynamic_events").read_text().splitlines()
        return sorted(p.name for p in (self.path / "instances").iterdir()), lines


@contextmanager
def tracing() -> Iterator[Tracing]:
    """Yield tracefs to one test at a time, as probes are global.

    If it is not mounted, it is mounted in a private mount namespace of this process.
    """
    if os.geteuid():
        pytest.skip("capture through the kernel needs root")
    with Path("/tmp/tdxtrace-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = _mounted() or _mount()
        if place is None:
            pytest.skip("tracefs cannot be mounted here")
        yield Tracing(place)


def _mounted() -> Path | None:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return next((Path(w[1]) for w in map(str.split, lines) if w[2] == "tracefs"), None)


def _mount() -> Path | None:
    """Mount tracefs in a private mount namespace; None if that is not possible."""
    place = Path("/sys/kernel/tracing")
    # unshare(2); os.unshare came with Python 3.12.
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        return None
    private = ["mount", "--make-rprivate", "/"], ["mount", "-t", "tracefs", "nodev", str(place)]
    done = [subprocess.run(words, check=False, capture_output=True) for words in private]
    return None if any(one.returncode for one in done) else place


def usable(found: Tracing) -> None:
    """Skip the test if the kernel has no uprobe events."""
    if not (found.path / "uprobe_events").exists():
        pytest.skip("this kernel has no uprobe events")


def build(folder: Path) -> Path:
    """Compile the program into ``folder``; return its path."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the testbed")
    made = folder / "testbed"
    words = ["gcc", *"-O2 -Wall -Wextra -Werror -pthread -o".split(), str(made), str(SOURCE)]
    subprocess.run(words, check=True)
    return made


def program(*words: str | Path) -> list[str]:
    """The command that runs tdxtrace in a separate process."""
    return [sys.executable, "-m", "tdxtrace", *map(str, words)]


def truth(path: Path) -> dict[tuple[int, int], list[tuple[int | None, int, int, set[str], int]]]:
    """Requests that the program logged, by thread and leaf, in order."""
    found: dict[tuple[int, int], list[tuple[int | None, int, int, set[str], int]]] = {}
    rows = pl.read_csv(path, schema_overrides={"status": pl.UInt64, "gpa": pl.UInt64})
    for row in rows.sort("start_ns").iter_rows(named=True):
        outcome = OUTCOMES[row["outcome"]]
        request = (row["gpa"] or None, row["attempts"], row["busy"], outcome, row["status"])
        found.setdefault((row["tid"], LEAVES[row["function"]]), []).append(request)
    return found


def wrong_chains(trace: Path, csv: Path) -> list[str]:
    """Return the differences between the chains of a recording and the requests logged."""
    made = tdxtrace.analyze(tdxtrace.read_trace(trace)).retry_chains
    found: dict[tuple[int, int], list[tuple[int | None, int, int, str, int]]] = {}
    for row in made.sort("start_ns", "first_seq").iter_rows(named=True):
        request = (
            row["gpa"],
            row["n_attempts"],
            row["n_busy"],
            row["outcome"],
            row["final_status"],
        )
        found.setdefault((row["tid"], row["leaf"]), []).append(request)
    wanted = truth(csv)
    problems = [f"no chains of {key}" for key in wanted.keys() - found.keys()]
    for key, chains in found.items():
        requests = wanted.get(key, [])
        if len(chains) != len(requests):
            problems.append(f"{key}: {len(chains)} chains of {len(requests)} requests")
        problems += [
            f"{key}: {chain} is {request}"
            for chain, request in zip(chains, requests, strict=False)
            if chain[:3] != request[:3] or chain[3] not in request[3] or chain[4] != request[4]
        ]
    return problems
