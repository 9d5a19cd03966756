"""``tdxtrace watch``: from a pipe to a table, JSON lines, metrics or an exit status."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.running import SAMPLES, refused
from support.testbed import program

HEAD = b"".join((SAMPLES / "contended.txt").read_bytes().splitlines(keepends=True)[:2000])


def watch(*words: str, data: bytes = HEAD) -> subprocess.CompletedProcess[bytes]:
    command = program("watch", "-", "--interval", "50ms", *words)
    return subprocess.run(command, input=data, capture_output=True, check=False, timeout=120)


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Compile the loops, which prints a notice on stderr once, before a test looks at it."""
    assert watch("--jsonl").returncode == 0


def test_lines_of_json_end_with_all_of_it() -> None:
    done = watch("--jsonl", "--fail-on", "max-attempts>100000")
    assert (done.returncode, done.stderr) == (0, b"")
    result = [json.loads(line) for line in done.stdout.splitlines()]
    assert result[-1]["events"] == 2000
    assert result[-1]["leaves"]["TDH.MEM.PAGE.AUG"]["busy"] > 0


def test_a_table_of_80_columns_shows_a_name_that_moves_the_cursor_harmlessly() -> None:
    hostile = re.sub(rb"^.{16}-", b"CPU\x1b[2J 0/KVM     -", HEAD, flags=re.MULTILINE)
    done = watch("--no-color", data=hostile)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert "2,000 events" in done.stdout.decode()
    assert b"\x1b[3" not in done.stdout
    assert b"\x1b[2J" not in done.stdout


def test_a_threshold_ends_it() -> None:
    done = watch("--jsonl", "--fail-on", "max-attempts>2")
    assert done.returncode == 3
    assert done.stderr.startswith(b"tdxtrace: max-attempts is ")


def test_a_threshold_ends_it_while_the_pipe_is_open() -> None:
    command = program("watch", "-", "--interval", "50ms", "--jsonl", "--fail-on", "busy>10")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # Less than a pipe takes, so that it is written whenever the reader ends.
    some = b"".join(HEAD.splitlines(keepends=True)[:450])
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(some)
        process.stdin.flush()
        assert process.wait(60) == 3


def test_a_signal_ends_it_well() -> None:
    command = program("watch", "-", "--interval", "50ms", "--jsonl")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(HEAD)
        process.stdin.flush()
        # What is in the pipe when the signal comes is not read.
        while json.loads(process.stdout.readline())["events"] < 2000:
            pass
        process.send_signal(signal.SIGTERM)
        last = process.stdout.read().splitlines()[-1]
        assert json.loads(last)["events"] == 2000
        assert process.wait(60) == 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_prometheus_is_answered() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    where = f"127.0.0.1:{free_port()}"
    command = program("watch", "-", "--interval", "50ms", "--jsonl", "--metrics", where)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(HEAD)
        process.stdin.flush()
        result = {"events": 0}
        while result["events"] < 2000:
            result = json.loads(process.stdout.readline())
        with urllib.request.urlopen(f"http://{where}/metrics") as answer:
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
        for host in (
            "evil.example",
            f"evil.example:{where.rpartition(':')[2]}",
            "127.0.0.1.nip.io",
        ):
            rebound = urllib.request.Request(f"http://{where}/metrics", headers={"Host": host})
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(rebound)
        for host in ("localhost:1", "[::1]:9464", "127.0.0.1"):
            other = urllib.request.Request(f"http://{where}/metrics", headers={"Host": host})
            assert urllib.request.urlopen(other).status == 200
        process.stdin.close()
        process.stdout.read()
        assert process.wait(60) == 0
    (events,) = families["tdxtrace_events"].samples
    assert events.value == 2000
    busy = sum(sample.value for sample in families["tdxtrace_busy"].samples)
    assert busy == sum(one["n"] for one in result["busy"])  # type: ignore[attr-defined]
    assert "tdxtrace_attempts" in families


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("trace.txt",), 2, "watch takes - for standard input"),
        (("-", "--metrics", "0.0.0.0:9464"), 2, "not on loopback"),
        (("-", "--metrics", "example.org:1"), 2, "not on loopback"),
        (("-", "--metrics", "nonsense"), 2, "not an address"),
        (("-", "--interval", "never"), 2, "not a time"),
        (("-", "--fail-on", "max-atempts>3"), 2, "nearest: max-attempts"),
        (("-", "--fail-on", "problems>0"), 2, "watch computes no verdicts"),
    ],
)
def test_wrong_arguments_are_refused(words: tuple[str, ...], status: int, said: str) -> None:
    assert said in refused(status, "watch", *words)


def test_what_is_no_trace() -> None:
    done = watch("--jsonl", data=b"hello world\n")
    assert done.returncode == 1
    assert b"standard input is not a trace" in done.stderr
    assert b"Traceback" not in done.stderr
    assert watch("--jsonl", data=b"").returncode == 1


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = watch("--jsonl", "--metrics", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert b"cannot listen on 127.0.0.1" in done.stderr


def test_a_histogram_is_watched_and_exported() -> None:
    """Its counts are the totals, and the buckets hold whole cells: 65 to 127 lie below 128."""
    counts = {"@requests": {"7,6,0,1": 90, "7,6,0,3": 8, "7,6,0,65": 2}, "@done": {"7,6": 100}}
    result = [
        {"type": "printf", "data": "tdxtrace histogram 1 6.18.2 1000000000\n"},
        {"type": "printf", "data": "at 2000000000\n"},
        {"type": "map", "data": counts | {"@status": {"7,6,0,0": 100, "7,6,2147484160,146": 146}}},
    ]
    data = "".join(json.dumps(line) + "\n" for line in result).encode()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = f"127.0.0.1:{port}"
    command = program("watch", "-", "--interval", "50ms", "--jsonl", "--metrics", where)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(data)
        process.stdin.flush()
        shown = {}
        while "TDH.MEM.PAGE.AUG" not in shown:
            shown = json.loads(process.stdout.readline())["leaves"]
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read()
        process.stdin.close()
        process.stdout.read()
    assert process.returncode == 0
    aug = shown["TDH.MEM.PAGE.AUG"]
    assert (aug["requests"], aug["retried"], aug["busy"], aug["max_attempts"]) == (100, 10, 146, 65)
    buckets = re.findall(
        r'attempts_bucket\{le="([^"]+)",leaf="TDH.MEM.PAGE.AUG"\} (\d+)', page.decode()
    )
    below = {bound: int(n) for bound, n in buckets}
    assert (below["1"], below["4"], below["64"], below["128"]) == (90, 98, 98, 100)


def test_a_damaged_histogram_is_one_line() -> None:
    head = b'{"type": "printf", "data": "tdxtrace histogram 1 6.18.2 1000000000\\n"}\n'
    done = watch("--jsonl", data=head + b'{"type": "map", "data": {"@requests": {"x": 1}}}\n')
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"standard input, line 2" in done.stderr
