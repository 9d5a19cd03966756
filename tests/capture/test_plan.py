"""``tdxtrace capture plan``: the recipe for a kernel, on any machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.hosts import WRAPPERS, kallsyms, tdx_host, vcpu_types
from support.running import answered, refused
from support.testbed import Tracing, wrong_chains

from tdxtrace.capture import tracing as host_tracing
from tdxtrace.capture.dialects import render
from tdxtrace.capture.options import Detail, Dialect
from tdxtrace.capture.probes import affordable_kb, bytes_per_event
from tdxtrace.capture.recipe import Kernel, Recipe, RecipeOptions, recipe
from tdxtrace.capture.symbols import Symbols
from tdxtrace.ingest.read import read_trace


def probes(*words: str | Path) -> list[str]:
    """The lines of a plan that make probes."""
    lines = answered("capture", "plan", *words).lines
    return [line.removeprefix("add '").removesuffix("'") for line in lines if "add '" in line]


def test_a_kernel_of_6_16() -> None:
    lines = probes("--kernel", "6.16")
    assert (
        "p:tdxtrace/tdh_mem_page_aug_entry tdh_mem_page_aug td=%di:x64 gpa=%si:x64 "
        "level=%dx:s32 page=%cx:x64" in lines
    )
    assert (
        "r:tdxtrace/tdh_mem_page_aug_return tdh_mem_page_aug ret=$retval:x64 "
        "ext1=+0($arg5):x64 ext2=+0($arg6):x64" in lines
    )
    assert (
        "r:tdxtrace/tdh_mem_range_block_return tdh_mem_range_block ret=$retval:x64 "
        "ext1=+0($arg4):x64 ext2=+0($arg5):x64" in lines
    )
    assert "p:tdxtrace/tdh_mem_track_entry tdh_mem_track td=%di:x64" in lines
    assert not [line for line in lines if "vp_enter" in line or "seamcall" in line]
    assert (
        "# note: a 4K page has level 0 in these probes"
        in answered("capture", "plan", "--kernel", "6.16").lines
    )


def test_a_kernel_from_7_2() -> None:
    """A guest page is a page frame number, a 4K page has level 1."""
    lines = probes("--kernel", "7.2")
    assert (
        "p:tdxtrace/tdh_mem_page_aug_entry tdh_mem_page_aug td=%di:x64 gpa=%si:x64 "
        "level=%dx:s32 pfn=%cx:x64" in lines
    )
    assert (
        "p:tdxtrace/tdh_mem_sept_add_entry tdh_mem_sept_add td=%di:x64 gpa=%si:x64 "
        "level=%dx:s32 page=%cx:x64" in lines
    )
    said = answered("capture", "plan", "--kernel", "7.2").text
    assert "a 4K page has level 1 in these probes\n" in said


@pytest.mark.parametrize("release", ["7.0", "7.1.0-rc5", "7.1.2-generic"])
def test_a_kernel_of_7_0_or_7_1_is_probed_as_6_19(release: str) -> None:
    lines = probes("--kernel", release)
    assert lines == probes("--kernel", "6.19")
    assert (
        "p:tdxtrace/tdh_mem_page_aug_entry tdh_mem_page_aug td=%di:x64 gpa=%si:x64 "
        "level=%dx:s32 page=%cx:x64" in lines
    )
    said = answered("capture", "plan", "--kernel", release).text
    assert "a 4K page has level 0 in these probes\n" in said


def test_a_kernel_whose_wrappers_were_not_read_is_probed_below_them() -> None:
    lines = probes("--kernel", "8.3")
    assert (
        "p:tdxtrace/__seamcall_ret_entry __seamcall_ret fn=%di:x64 rcx=+0(%si):x64 "
        "rdx=+8(%si):x64 r8=+16(%si):x64" in lines
    )
    assert not [line for line in lines if " tdh_" in line]


def test_only_functions_that_the_kernel_has(tmp_path: Path) -> None:
    path = tmp_path / "kallsyms"
    path.write_text(kallsyms("tdh_mem_page_aug", "tdh_mem_track.constprop.0", "tdh_vp_enter"))
    words = ("--kernel", "6.18", "--from-kallsyms", path)
    assert {line.split()[1] for line in probes(*words)} == {"tdh_mem_page_aug"}
    assert "tdh_mem_track" in answered("capture", "plan", *words).text  # as missing


def test_types_give_the_status_of_an_entry(tmp_path: Path) -> None:
    words = ("--kernel", "6.18", "--btf", vcpu_types(tmp_path))
    assert (
        "r:tdxtrace/tdx_vcpu_run_return tdx_vcpu_run status=+256($arg1):x64 gpa=+128($arg1):x64 "
        "vcpu=+64($arg1):s32" in probes(*words)
    )
    assert "why an entry of a vCPU failed" not in answered("capture", "plan", *words).text
    assert "why an entry of a vCPU failed" in answered("capture", "plan", "--kernel", "6.18").text


@pytest.mark.parametrize("level", [Detail.full, Detail.minimal])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_every_script_records_when_entries_begin(
    dialect: Dialect, level: Detail, tmp_path: Path
) -> None:
    words = ("--btf", vcpu_types(tmp_path), "--dialect", dialect, "--level", level)
    for release in ("6.16", "6.18", "6.19", "7.1", "8.3"):
        script = answered("capture", "plan", "--kernel", release, *words).text
        assert "tdx_vcpu_run" in script
        begin = {
            "tracefs": 'echo 1 >"$I/events/kvm/kvm_entry/enable"',
            "bpftrace": "tracepoint:kvm:kvm_entry\n",
            "histogram": "tracepoint:kvm:kvm_entry / @vcpu",
        }
        assert begin.get(dialect, " -e kvm:kvm_entry ") in script


TRACED = "__traceiter_kvm_vm_set_mem_attributes"
MARKS = "rw == 1 && (port == 0xf4 || port == 0x402 || port == 0x80)"


@pytest.mark.parametrize("level", [Detail.full, Detail.stock])
@pytest.mark.parametrize(
    ("dialect", "filtered"),
    [
        ("tracefs", f"echo '{MARKS}' >\"$I/events/kvm/kvm_pio/filter\""),
        ("trace-cmd", f"-e kvm:kvm_pio -f '{MARKS}'"),
        ("perf", f"-e kvm:kvm_pio --filter '{MARKS}'"),
        (
            "bpftrace",
            "tracepoint:kvm:kvm_pio / args->rw == 1 && "
            "(args->port == 0xf4 || args->port == 0x402 || args->port == 0x80) /",
        ),
    ],
)
def test_the_events_of_a_boot_are_recorded(dialect: str, filtered: str, level: Detail) -> None:
    words = ("capture", "plan", "--kernel", "6.18", "--dialect", dialect, "--level")
    script = answered(*words, level).text
    assert filtered in script
    assert "kvm_vm_set_mem_attributes" in script
    minimal = answered(*words, "minimal").text
    assert "kvm_pio" not in minimal
    assert "kvm_vm_set_mem_attributes" not in minimal


def test_a_kernel_without_memory_attributes_is_not_asked_for_their_event(tmp_path: Path) -> None:
    path = tmp_path / "kallsyms"
    words = ("capture", "plan", "--kernel", "6.18", "--from-kallsyms", path)
    for functions, there in ((("tdh_mng_init",), False), (("tdh_mng_init", TRACED), True)):
        path.write_text(kallsyms(*functions))
        script = answered(*words).text
        assert ("kvm_vm_set_mem_attributes" in script) is there
        assert "kvm_pio" in script


def test_bpftrace_prints_the_events_of_a_boot_as_they_are_read(tmp_path: Path) -> None:
    script = answered("capture", "plan", "--kernel", "6.18", "--dialect", "bpftrace").text
    values = {
        "kvm_pio": (1, 0xF4, 1, 1, 0x10),
        "kvm_vm_set_mem_attributes": (0x100, 0x180, 8),
    }
    lines = ""
    for event, fields in values.items():
        form = re.search(rf'printf\("(.*{event}: .*)\\n"', script)
        assert form is not None
        head = ("CPU 0/KVM", 12, 10, 3, 5, 1000)
        plain = re.sub(r"ll(?=[ux])|0(?=9llu)", "", form[1]).replace("%9u", "%09u")
        lines += plain % (*head, *fields) + "\n"
    trace = tmp_path / "trace.txt"
    trace.write_text(lines)
    rows = read_trace(trace).host_events.rows(named=True)
    assert [(r["event"], r["port"], r["is_write"], r["value"]) for r in rows] == [
        ("kvm_pio", 0xF4, True, 0x10),
        ("kvm_vm_set_mem_attributes", None, None, 8),
    ]
    assert (rows[1]["gpa"], rows[1]["n_bytes"]) == (0x100 << 12, 0x80 << 12)


def test_levels() -> None:
    minimal = probes("--kernel", "6.18", "--level", "minimal")
    assert len(minimal) == 5
    assert all(line.startswith("r:") for line in minimal)
    stock = answered("capture", "plan", "--kernel", "6.18", "--level", "stock")
    assert "add '" not in stock.text
    assert "not answered: which SEAMCALL was busy" in stock.text
    assert "events/kvm/kvm_exit/enable" in stock.text


def test_an_old_kernels_returns_have_no_arguments() -> None:
    minimal = probes("--kernel", "6.8", "--level", "minimal", "--seamcalls")
    assert not [line for line in minimal if "$arg" in line]


def test_filters_leave_other_vms_out() -> None:
    said = answered("capture", "plan", "--kernel", "6.18", "--only-tds", "--dialect", "perf").text
    assert "-e kvm:kvm_exit --filter 'guest_rip == 0'" in said
    assert "-e kvm:kvm_entry --filter 'rip == 0'" in said
    assert "rip == 0" not in answered("capture", "plan", "--dialect", "perf").text


def of_release(release: str = "6.18") -> Kernel:
    """A kernel of which only the release is known."""
    return Kernel(release, Symbols())


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_kernel_that_merges_pages_is_probed_for_it(dialect: Dialect) -> None:
    """No released kernel has the function; without it a merge that failed looks like an attack."""
    symbols = Symbols(frozenset({"tdh_mem_page_promote", "tdh_mem_range_block"}), frozenset(), "it")
    made = recipe(Kernel("6.18", symbols), RecipeOptions())
    assert "tdh_mem_page_promote" in render(made, dialect)
    entry = next(probe for probe in made.probes if probe.function == "tdh_mem_page_promote")
    assert [fetch.name for fetch in entry.fetches] == ["td", "gpa", "level"]


def test_the_buffer_grows_with_the_rate() -> None:
    def size(rate: int) -> int:
        return recipe(of_release(), RecipeOptions(Detail.full, rate=rate)).buffer_kb

    sizes = [size(rate) for rate in (1, 10_000, 100_000, 1_000_000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    needed = 100_000 * bytes_per_event(recipe(of_release(), RecipeOptions()).probes)
    assert size(100_000) * 1024 >= 2 * needed


def test_memory_bounds_the_buffer() -> None:
    assert affordable_kb(65536, 256, 1 << 30) == 65536
    assert affordable_kb(65536, 256, 1 << 22) * 256 * 4 <= 1 << 22
    assert affordable_kb(65536, 256, 1) == 1024
    assert affordable_kb(65536, 256, None) == 65536


def test_the_running_kernel_is_asked(tmp_path: Path) -> None:
    made_ = recipe(host_tracing.kernel_of(tdx_host(tmp_path)), RecipeOptions())
    assert {probe.function for probe in made_.probes} == {
        name for name in WRAPPERS if name.startswith("tdh_") and name != "tdh_vp_enter"
    }


@pytest.mark.parametrize("dialect", [Dialect.tracefs, Dialect.trace_cmd, Dialect.perf])
@pytest.mark.parametrize("release", ["6.16", "6.19", "7.1", "7.2", "8.0"])
def test_scripts_are_shell(dialect: Dialect, release: str) -> None:
    made_: Recipe = recipe(of_release(release), RecipeOptions(only_tds=True))
    script = render(made_, dialect)
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--kernel", "six"), 2, "not a kernel release"),
        (("--from-kallsyms", "x"), 2, "add --kernel"),
        (("--kernel", "6.18", "--from-kallsyms", "absent"), 1, "cannot read absent: missing"),
        (("--kernel", "6.18", "--btf", "absent"), 1, "cannot read absent"),
        (("--program", "absent"), 1, "cannot read"),
        (("--program", "x", "--btf", "y"), 2, "omit --from-kallsyms and --btf"),
    ],
)
def test_wrong_arguments_are_refused(words: tuple[str, ...], status: int, said: str) -> None:
    assert said in refused(status, "capture", "plan", *words)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no symbols\n")
    words = ("capture", "plan", "--kernel", "6.18")
    assert "is not kallsyms" in refused(1, *words, "--from-kallsyms", tmp_path / "x")
    assert "is truncated BTF" in refused(1, *words, "--btf", tmp_path / "x")
    assert "is not an ELF program" in refused(1, "capture", "plan", "--program", tmp_path / "x")
    (tmp_path / "a b").write_text("")
    assert "no blank" in refused(1, "capture", "plan", "--program", tmp_path / "a b")
    assert "no function named" in refused(
        1, "capture", "plan", "--program", shutil.which("true") or ""
    )


@pytest.mark.parametrize(
    ("dialect", "tool"), [("tracefs", "sh"), ("trace-cmd", "trace-cmd"), ("perf", "perf")]
)
def test_a_plan_records_what_happened(
    dialect: str, tool: str, tracing: Tracing, bench: Path, tmp_path: Path
) -> None:
    """The script, run as printed: its recording has the chains that the program made."""
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool}")
    script = answered("capture", "plan", "--program", bench, "--dialect", dialect).text
    trace, csv = tmp_path / "trace", tmp_path / "truth.csv"
    words = ["sh", "-s", str(trace), str(bench), str(csv), "4", "2", "60", "7"]
    environment = {**os.environ, "TRACEFS": str(tracing.path)}

    def run(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, input=text, text=True, check=False, capture_output=True, env=environment
        )

    done = run(script)
    if "Can't enable ftrace" in done.stderr:
        # Locked down: without -d and --no-filter trace-cmd writes files that it may not, and
        # it still fails at the end, when it has written its own.
        done = run(script.replace("trace-cmd record", "trace-cmd record -d --no-filter"))
        assert "set_ftrace_filter" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert wrong_chains(trace, csv) == []


def test_a_plan_for_bpftrace(tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    if shutil.which("bpftrace") is None:
        pytest.skip("no bpftrace")
    script = tmp_path / "plan.bt"
    script.write_text(answered("capture", "plan", "--program", bench, "--dialect", "bpftrace").text)
    trace, csv = tmp_path / "trace.txt", tmp_path / "truth.csv"
    command = f"{bench} {csv} 4 2 20 7"
    done = subprocess.run(
        ["bpftrace", "-q", "-o", trace, "-c", command, script],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"BPFTRACE_PERF_RB_PAGES": "4096"},
    )
    assert done.returncode == 0, done.stderr
    if "Lost" in done.stdout + done.stderr:
        pytest.skip("bpftrace lost events, as it says")
    assert wrong_chains(trace, csv) == []
    assert read_trace(trace).seamcalls["tgid"].n_unique() == 1
