"""Compare the chains that each recorder captures with the chains of the testbed.

sudo PYTHONPATH=tests python tests/bench/chains.py [RUNS]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from support.testbed import build, program, tracing, truth, wrong_chains

FORMS = ("trace.dat", "trace.txt", "pages")
OTHERS = ("tracefs", "trace-cmd", "perf", "bpftrace")


def main() -> None:
    """Run and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as name, tracing() as found:
        folder = Path(name)
        bench = build(folder)
        for recorder in sys.argv[2:] or (*FORMS, *OTHERS):
            n_chains, n_wrong = 0, 0
            for seed in range(runs):
                csv, trace = folder / "truth.csv", folder / f"{recorder}-{seed}.dat"
                if recorder in FORMS:
                    trace = folder / f"{seed}-{recorder}"
                words = [str(bench), str(csv), "4", "2", "100", str(seed)]
                record(recorder, bench, trace, words, {"TRACEFS": str(found.path)})
                n_chains += sum(map(len, truth(csv).values()))
                wrong = wrong_chains(trace, csv)
                n_wrong += len(wrong)
                for line in wrong[:3]:
                    print(f"    {line}")
            print(f"{recorder}: {runs} runs, {n_chains:,} chains, {n_wrong} wrong", flush=True)


def record(
    recorder: str, bench: Path, trace: Path, words: list[str], environment: dict[str, str]
) -> None:
    """Record one run of the testbed."""
    environment = {**os.environ, **environment}
    if recorder in FORMS:
        command = program("capture", "record", "-q", "--program", bench, "-o", trace, "--", *words)
        subprocess.run(command, check=True)
        return
    plan = subprocess.run(
        program("capture", "plan", "--program", bench, "--dialect", recorder),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if recorder == "bpftrace":
        script = trace.with_suffix(".bt")
        script.write_text(plan)
        command = ["bpftrace", "-q", "-o", str(trace), "-c", " ".join(words), str(script)]
        room = {"BPFTRACE_PERF_RB_PAGES": "4096"}
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment | room
        )
        lost = [line for line in (done.stdout + done.stderr).splitlines() if "ost" in line]
        print("".join(f"    bpftrace says: {line}\n" for line in lost), end="")
        return
    # Under lockdown trace-cmd needs these two, and fails all the same when all is written.
    plan = plan.replace("trace-cmd record", "trace-cmd record -d --no-filter")
    subprocess.run(
        ["sh", "-s", str(trace), *words],
        input=plan,
        text=True,
        check=recorder != "trace-cmd",
        capture_output=True,
        env=environment,
    )


if __name__ == "__main__":
    main()
