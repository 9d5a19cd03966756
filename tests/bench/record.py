"""Measure losses and CPU time of the recorder and of trace-cmd record on the same run.

    sudo PYTHONPATH=tests python tests/bench/record.py [SECONDS [THREADS]]

Both record the same events at the same time, each in an instance of its own: first uprobes on
the testbed's wrappers, then system calls, which come faster than uprobes can.  CPU is what
wait4(2) says of each recorder and what it started; the traced program is not among it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from support.testbed import Tracing, build, program, tracing

GROUP = "tdxbench"
BUFFER_KB = 32768
SYSCALLS = ("sys_enter", "sys_exit")


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["record-syscalls"]:
        record_syscalls(Path(sys.argv[2]))
        return
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    threads = sys.argv[2] if len(sys.argv) > 2 else "2"
    with tempfile.TemporaryDirectory() as name, tracing() as found:
        folder = Path(name)
        bench = build(folder)
        for _ in range(3):
            run(found, folder, [str(bench), "--flood", threads, str(seconds)], bench)
        for _ in range(3):
            run(found, folder, [str(bench), "--syscalls", threads, str(seconds)], None)


def record_syscalls(output: Path) -> None:
    """Record system calls as ``tdxtrace capture record`` records probes, until SIGTERM."""
    from tdxtrace.capture import choose
    from tdxtrace.capture.host import Host
    from tdxtrace.capture.options import RecordOptions
    from tdxtrace.capture.probes import Tracepoint
    from tdxtrace.capture.recorder import record

    host = Host()
    wanted = RecordOptions("stock", output=output, buffer=f"{BUFFER_KB}K", force=True)
    plan = choose.plan_recording(host, wanted, print)
    events = tuple(Tracepoint("raw_syscalls", event) for event in SYSCALLS)
    record(host, replace(plan, recipe=replace(plan.recipe, events=events)))


def run(found: Tracing, folder: Path, command: list[str], bench: Path | None) -> None:
    """Record one run twice."""
    paths = folder / "ours.dat", folder / "theirs.dat"
    lines = probes(bench) if bench else []
    for line in lines:
        append(found.path, line)
    try:
        started = [ours(paths[0], bench), theirs(paths[1], bench)]
        wait_for(found, len(started))
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        time.sleep(0.5)
        costs = [end(process) for process in started]
    finally:
        # Under lockdown trace-cmd leaves its instance behind.
        left = found.path / "instances" / GROUP
        if left.exists():
            left.rmdir()
        for line in lines:
            append(found.path, f"-:{line.split()[0].partition(':')[2]}")
    result = json.loads(paths[0].with_name("ours.dat.capture.json").read_text())
    n = 2 * int(done.stdout)
    what = "uprobe" if bench else "syscall"
    print(f"{n / float(command[-1]):,.0f} {what} events/s for {command[-1]} s, {n:,} in all")
    ours_mb, theirs_mb = (path.stat().st_size / 1e6 for path in paths)
    print(
        f"  tdxtrace: {result['read_events']:,} read, {result['lost_events']:,} lost, {costs[0]}, "
        f"{ours_mb:.0f} MB"
    )
    print(f"  trace-cmd: {lost_by_theirs(paths[1]):,} lost, {costs[1]}, {theirs_mb:.0f} MB")


def probes(bench: Path) -> list[str]:
    """The lines of our plan, under another group."""
    plan = subprocess.run(
        program("capture", "plan", "--program", bench), capture_output=True, text=True, check=True
    )
    return [
        line[5:-1].replace("tdxtrace/", f"{GROUP}/")
        for line in plan.stdout.splitlines()
        if line.startswith("add '")
    ]


def append(tracefs: Path, line: str) -> None:
    """Append to the kernel's list."""
    fd = os.open(tracefs / "dynamic_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def ours(path: Path, bench: Path | None) -> subprocess.Popen[bytes]:
    """Start our recorder."""
    if bench is None:
        words = [sys.executable, __file__, "record-syscalls", str(path)]
    else:
        words = program("capture", "record", "--program", bench, "-o", path, "--force", "-q")
        words += ["--buffer", f"{BUFFER_KB}K"]
    return subprocess.Popen(words)


def theirs(path: Path, bench: Path | None) -> subprocess.Popen[bytes]:
    """Start trace-cmd, with what lets it run under lockdown."""
    words = ["trace-cmd", "record", "-d", "--no-filter", "-B", GROUP, "-C", "mono", "-o", str(path)]
    words += ["--compression", "none", "-b", str(BUFFER_KB)]
    for event in [GROUP] if bench else [f"raw_syscalls:{event}" for event in SYSCALLS]:
        words += ["-e", event]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, stdout=quiet, stderr=quiet)


def is_on(switch: Path) -> bool:
    """Whether an instance traces; its files come a moment after its folder."""
    try:
        return switch.read_text().strip() == "1"
    except FileNotFoundError:
        return False


def wait_for(found: Tracing, n: int) -> None:
    """Wait until so many instances of ours and theirs are on."""
    while True:
        instances = [p for p in (found.path / "instances").iterdir() if p.name.startswith("tdx")]
        on = [p for p in instances if is_on(p / "tracing_on")]
        if len(on) == n:
            break
        time.sleep(0.1)
    time.sleep(1)


def end(process: subprocess.Popen[bytes]) -> str:
    """Interrupt a recorder; return what it cost."""
    process.send_signal(2)
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = 0
    return f"user {used.ru_utime:.2f} s + system {used.ru_stime:.2f} s"


def lost_by_theirs(path: Path) -> int:
    """What trace-cmd's file says the kernel's counters say."""
    said = subprocess.run(
        ["trace-cmd", "report", "--stat", str(path)], capture_output=True, text=True, check=False
    ).stdout
    words = [line.split(":") for line in said.splitlines()]
    names = ("overrun", "commit overrun", "dropped events")
    return sum(int(w[1]) for w in words if len(w) == 2 and w[0].strip() in names)


if __name__ == "__main__":
    main()
