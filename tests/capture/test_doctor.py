"""``tdxtrace capture doctor``: what can be captured on a host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hosts import kallsyms, tdx_host, write
from support.running import answered

from tdxtrace.capture.doctor import Verdict, examine
from tdxtrace.capture.host import STATES, Host


def state(verdict: Verdict, name: str) -> str:
    return next(check.state for check in verdict.checks if check.name == name)


def found(verdict: Verdict, name: str) -> str:
    return next(check.found for check in verdict.checks if check.name == name)


def test_a_host_with_everything_but_types_can_be_captured_in_full(tmp_path: Path) -> None:
    verdict = examine(tdx_host(tmp_path))
    assert verdict.can == "full"
    lacking = {c.name: c.state for c in verdict.checks if c.state not in ("ok", "note")}
    assert lacking == {"btf": "missing"}
    assert found(verdict, "tdx_module") == "1.5.06, lock generation B (sysfs)"
    assert found(verdict, "blacklist") == "__seamcall_saved_ret, tdh_vp_enter"


def test_a_host_without_anything_is_reported(tmp_path: Path) -> None:
    """No /proc, no /sys: nothing is claimed to be there, nothing breaks."""
    verdict = examine(Host(tmp_path))
    assert verdict.can == "nothing"
    assert not [check.name for check in verdict.checks if check.state == "ok" and check.lost]
    assert state(verdict, "root") == "unknown"
    assert state(verdict, "lockdown") == "unknown"
    assert state(verdict, "tdx_module") == "unknown"


def test_what_is_missing_has_a_loss_and_a_remedy(tmp_path: Path) -> None:
    for check in examine(Host(tmp_path)).checks:
        assert check.state in STATES
        if check.state == "missing":
            assert check.lost, check.name
            assert check.remedy, check.name


@pytest.mark.parametrize(
    ("files", "can", "name", "wanted"),
    [
        ({"proc/kallsyms": kallsyms("start_kernel")}, "stock", "wrappers", "missing"),
        ({"proc/kallsyms": ""}, "stock", "wrappers", "unknown"),
        ({"sys/kernel/debug/kprobes/enabled": "0\n"}, "stock", "kprobes", "missing"),
        ({"proc/self/status": "CapEff:\t0000000000000000\n"}, "nothing", "root", "missing"),
        (
            {"sys/kernel/security/lockdown": "none integrity [confidentiality]\n"},
            "full",
            "lockdown",
            "missing",
        ),
        ({"proc/sys/kernel/osrelease": "5.15.0\n"}, "full", "kernel", "limited"),
        ({"sys/module/kvm_intel/parameters/tdx": "N\n"}, "full", "kvm_intel", "missing"),
        ({"proc/meminfo": "MemAvailable: 100000 kB\n"}, "full", "buffer", "limited"),
        ({"sys/kernel/tracing/README": "f[:\n"}, "full", "return_arguments", "limited"),
        (
            {"sys/kernel/tracing/dynamic_events": "p:tdxtrace_9_1/x_entry x\n"},
            "full",
            "leftovers",
            "limited",
        ),
    ],
)
def test_each_missing_feature_changes_the_verdict(
    tmp_path: Path, files: dict[str, str], can: str, name: str, wanted: str
) -> None:
    host = tdx_host(tmp_path)
    write(tmp_path, files)
    verdict = examine(host)
    assert (verdict.can, state(verdict, name)) == (can, wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "6,1;virt/tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, "
            "minor_version 0, build_date 20230206, build_num 457\n",
            "1.0 build 457, lock generation A (kernel log)",
        ),
        (
            "6,1;virt/tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, "
            "minor_version 5, build_date 20240407, build_num 744\n6,2;virt/tdx: CMR: [0x0, 0x1)\n"
            "6,3;virt/tdx: module initialized\n",
            "1.5.06, lock generation B (kernel log)",
        ),
        (
            "6,1;tdx: TDX module: atributes 0x0, vendor_id 0x8086, major_version 1, "
            "minor_version 5, build_date 20230420, build_num 507\n"
            "6,2;tdx: TDX module initialized.\n",
            "1.5 build 507, lock generation B or C (kernel log)",
        ),
        (
            "6,1;virt/tdx: Module version: 1.5.24\n6,2;virt/tdx: TDX-Module initialized\n",
            "1.5.24, lock generation C (kernel log)",
        ),
        (
            "6,1;virt/tdx: TDX module 1.5.06.00, build number 744, build date 0134d817\n"
            "6,2;virt/tdx: module initialized\n",
            "1.5.06.00, lock generation B (kernel log)",
        ),
        (
            "6,1;virt/tdx: Module version: 1.5.00.00.0481, build_date: 20230323\n",
            "1.5.00.00.0481, lock generation B or C (kernel log)",
        ),
        # The module was updated at run time: the last word counts.
        (
            "6,1;virt/tdx: Module version: 1.5.16\n6,2;virt/tdx: TDX-Module initialized\n"
            "6,3;virt/tdx: Module version: 1.5.24\n",
            "1.5.24, lock generation C (kernel log)",
        ),
        (
            "6,1;virt/tdx: Module version: 3.0.01\n",
            "3.0.01, lock generation not known (kernel log)",
        ),
        ("6,1;virt/tdx: Module version: 1.5.99\n", "1.5.99, lock generation B or C (kernel log)"),
        ("6,1;virt/tdx: module initialization failed (-5)\n", "initialisation failed (-5)"),
        ("6,1;virt/tdx: TDX-Module initialization failed (-5)\n", "initialisation failed (-5)"),
        (
            "6,1;virt/tdx: Module version: 1.5.24\n"
            "6,2;virt/tdx: TDX-Module initialization failed (-12)\n",
            "1.5.24: initialisation failed (-12)",
        ),
        (
            "6,1;virt/tdx: module initialization failed (-5)\n6,2;virt/tdx: module initialized\n",
            "initialised; version not named",
        ),
        ("6,1;virt/tdx: module initialized\n", "initialised; version not named"),
        ("6,1;virt/tdx: TDX-Module initialized\n", "initialised; version not named"),
    ],
)
def test_the_module_release_is_read_from_the_log(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, {"dev/kmsg": text})
    assert found(examine(Host(tmp_path)), "tdx_module") == said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("6,1;virt/tdx: Module version: 1.5.24\n", "ok"),
        ("6,1;virt/tdx: Module version: 1.5.99\n", "limited"),
        ("6,1;virt/tdx: TDX-Module initialized\n", "limited"),
        ("6,1;virt/tdx: TDX-Module initialization failed (-5)\n", "missing"),
        ("6,1;virt/tdx: BIOS enabled: private KeyID range [32, 64)\n", "unknown"),
    ],
)
def test_a_release_that_is_not_known_limits_what_is_known_of_locks(
    tmp_path: Path, text: str, wanted: str
) -> None:
    write(tmp_path, {"dev/kmsg": text})
    assert state(examine(Host(tmp_path)), "tdx_module") == wanted


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            ("0x00000001", "0x00000005", "0x000002ba", "20240129"),
            "1.5.05, lock generation B (sysfs)",
        ),
        (("1", "5", "744", "20240407"), "1.5.06, lock generation B (sysfs)"),
        (("1", "5", "744", "0x0134d817"), "1.5.06, lock generation B (sysfs)"),
        (("1", "5", "744", "0x20240407"), "1.5.06, lock generation B (sysfs)"),
        (("1", "5", "744", "0x20240408"), "1.5 build 744, lock generation B or C (sysfs)"),
        (("1", "5", "744", "soon"), "1.5.06, lock generation B (sysfs)"),
        (("0x1", "0x5", "0x2bc", "20240301"), "1.5 build 700, lock generation B or C (sysfs)"),
    ],
)
def test_the_module_build_is_read_from_sysfs_of_6_8(
    tmp_path: Path, numbers: tuple[str, ...], said: str
) -> None:
    names = ("major_version", "minor_version", "build_num", "build_date")
    folder = "sys/firmware/tdx/tdx_module"
    write(tmp_path, {f"{folder}/{n}": f"{text}\n" for n, text in zip(names, numbers, strict=True)})
    assert found(examine(Host(tmp_path)), "tdx_module") == said


def test_an_implausible_sysfs_is_ignored(tmp_path: Path) -> None:
    folder = "sys/firmware/tdx/tdx_module"
    write(tmp_path, {f"{folder}/build_num": "?\n", "dev/kmsg": "6,1;tdx: module initialized\n"})
    assert found(examine(Host(tmp_path)), "tdx_module") == "initialised; version not named"


def test_a_tracefs_elsewhere_is_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/mounts": "x /mnt/my\\040traces tracefs rw 0 0\n",
            "mnt/my traces/trace_clock": "[mono]\n",
            "mnt/my traces/instances/": "",
        },
    )
    host = Host(tmp_path)
    assert host.tracefs == tmp_path / "mnt/my traces"
    assert found(examine(host), "tracefs") == "/mnt/my traces"


def test_the_program_says_it_in_80_columns_and_as_json() -> None:
    """On this machine, whatever it has."""
    done = answered("capture", "doctor", columns=80)
    assert max(map(len, done.lines)) <= 80
    result = json.loads(answered("capture", "doctor", "--json").text)
    assert result["can"] in ("full", "stock", "program", "nothing")
    names = [check["name"] for check in result["checks"]]
    assert len(names) == len(set(names))
    assert all(name.replace("_", " ") in done.text for name in names)
