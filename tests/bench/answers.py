"""Print digests of all tables of traces, to compare the answers of two versions.

    python tests/bench/answers.py FILE... > before.txt
    python tests/bench/answers.py --simulate FOLDER   # writes 40 runs in every format

One line per input and table: the number of rows and a digest of them. An input that cannot be
read gives its message. `diff before.txt after.txt` shows what changed.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

import tdxtrace

_SCENARIOS = (
    *("balloon", "boot_storm", "conversion_churn", "crowd", "fresh_memory", "host_gives_up"),
    *("hostile_guest", "hotplug", "lifecycle", "memory_fault_ignored", "memslot_deletion"),
    *("page_split", "prefault_race", "quiet", "removal", "single_step_attack", "string_copy"),
    "zero_step_attack",
)
_FORMATS = ("tracefs", "trace-cmd", "perf", "graph", "trace.dat", "trace.dat-v6", "dmesg")
_PROBES = ("wrappers", "retargs", "seamcall", "stock")
_N_RUNS = 40
_MAIN = "from tdxtrace.cli import main; main()"


def digest(table: pl.DataFrame) -> str:
    """Return a digest of names, kinds of types, values and order."""
    kinds = [(name, dtype.base_type()) for name, dtype in table.schema.items()]
    made = hashlib.blake2b(repr(kinds).encode(), digest_size=8)
    lists = [name for name, dtype in table.schema.items() if dtype.is_nested()]
    flat = table.with_columns(
        pl.col(name).map_elements(lambda row: str(row.to_list()), return_dtype=pl.String)
        for name in lists
    )
    made.update(flat.write_csv().encode())
    return made.hexdigest()


def answers(path: Path, without: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield the name of every table of a trace, and its size and digest without some columns."""
    try:
        trace = tdxtrace.read_trace(path)
        findings = tdxtrace.analyze(trace)
    except tdxtrace.TdxtraceError as error:
        yield "error", str(error).replace(str(path), path.name)
        return
    for name, rows in (trace.tables() | findings.tables()).items():
        yield name, f"{rows.height} {digest(rows.drop(without, strict=False))}"


def simulate(folder: Path) -> None:
    """Write 40 simulated runs, each in every format that its probes have."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(_N_RUNS):
        scenario = _SCENARIOS[number % len(_SCENARIOS)]
        for name in _FORMATS:
            words = [sys.executable, "-c", _MAIN, "simulate", scenario]
            words += ["--seed", str(100 + number), "--duration", "40ms", "--quiet", "--force"]
            words += ["--generation", "ABC"[number % 3], "--format", name]
            # function_graph sees wrappers only.
            words += [] if name == "graph" else ["--probes", _PROBES[number % len(_PROBES)]]
            words += ["--fault", "lost=0.02"] if number % 5 == 4 else []
            subprocess.run(
                [*words, "--output", str(folder / f"{number:02}-{scenario}.{name}")], check=False
            )


def main() -> None:
    """Print the digests of the files that are named, or simulate."""
    del sys.path[0]  # this folder: numba would take its coverage.py for the package coverage
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--simulate", type=Path, help="write 40 runs in every format there")
    parser.add_argument("--without", default="", help="columns to leave out: reason,sentence")
    options = parser.parse_args()
    if options.simulate is not None:
        simulate(options.simulate)
    for path in sorted(options.files):
        for name, what in answers(path, options.without.split(",")):
            print(f"{path.parent.name}/{path.name} {name} {what}", flush=True)


if __name__ == "__main__":
    main()
