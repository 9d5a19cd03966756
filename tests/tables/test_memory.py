"""Free memory by the strictest limit, and sizes as text."""

from __future__ import annotations

import resource
from contextlib import nullcontext
from pathlib import Path

import pytest

from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.memory import check_address_space, format_size, free_bytes, parse_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("1", 1), ("2K", 2048), ("800M", 800 * MIB), ("1.5GiB", 1536 * MIB), (" 2 gb ", 2048 * MIB)],
)
def test_sizes_are_powers_of_1024(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "-1G", "G", "1P", "lots", "1G\n2"])
def test_a_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(QueryError, match=r"not a size: .*; write 800M"):
        parse_size(text)


def test_sizes_are_shown() -> None:
    assert format_size(1536 * MIB) == "1.5 GiB"
    assert format_size(900 * MIB) == "900 MiB"


_FILES = {
    "proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:  4096000 kB\n",
    "proc/self/status": "VmSize:\t  102400 kB\nVmData:\t   51200 kB\n",
}
_V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": f"{900 * MIB}\n",
    "sys/fs/cgroup/a/memory.current": f"{300 * MIB}\n",
    "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {100 * MIB}\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": f"{200 * MIB}\n",
}
_V1 = {
    "proc/self/cgroup": "5:cpu:/x\n4:memory:/of/the/host\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{500 * MIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{100 * MIB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"cache 7\ntotal_inactive_file {50 * MIB}\n",
}


@pytest.mark.parametrize(
    ("more", "limits", "free"),
    [
        ({}, {}, 4000),
        (_V2, {}, 700),
        (_V1, {}, 450),
        (_V2, {resource.RLIMIT_AS: 600 * MIB}, 500),
        (_V1, {resource.RLIMIT_DATA: 100 * MIB}, 50),
        ({}, {resource.RLIMIT_AS: 10 * MIB}, 0),
    ],
)
def test_the_strictest_limit_counts(
    more: dict[str, str],
    limits: dict[int, int],
    free: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in (_FILES | more).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    result = {n: (limits.get(n, resource.RLIM_INFINITY), 0) for n in range(16)}
    monkeypatch.setattr(resource, "getrlimit", result.__getitem__)
    assert free_bytes(tmp_path) == free * MIB


@pytest.mark.parametrize(("n_bytes", "is_refused"), [(1500 * MIB, True), (2048 * MIB, False)])
def test_an_address_space_in_which_libraries_do_not_load_is_refused(
    n_bytes: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (n_bytes, n_bytes))
    expected = (
        pytest.raises(InputError, match=r"limited to 1\.5 GiB") if is_refused else nullcontext()
    )
    with expected:
        check_address_space()


def test_memory_of_this_machine_is_known() -> None:
    assert free_bytes() > 0
