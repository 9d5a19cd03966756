"""The simulator records what ``tdxtrace capture`` records, as the printed scripts say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.hosts import kallsyms, vcpu_types
from support.running import answered

from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.record.probes import Capture, ProbeRecorder
from tdxtrace.simulate.record.symbols import WRAPPERS
from tdxtrace.simulate.record.tracepoints import EventSpec
from tdxtrace.simulate.scenario import KERNELS

LEVELS = {
    "capture": ("--level", "full"),
    "capture-minimal": ("--level", "minimal"),
    "capture-seamcalls": ("--level", "full", "--seamcalls"),
}
ATTRIBUTES = "__traceiter_kvm_vm_set_mem_attributes"
FUNCTIONS = sorted(name for name, _ in WRAPPERS.values())
# Wrappers of Linux that the simulated KVM does not call.
NOT_SIMULATED = {"tdh_mng_rd", "tdh_vp_rd", "tdh_phymem_page_wbinvd_tdr"}
PROBE = re.compile(r"(?P<side>[pr]):(?P<name>\S+) (?P<function>\S+)(?P<fetches>.*)")
ENABLED = re.compile(r'echo 1 >"\$I/events/(?P<name>kvm/\w+)/enable"')

Described = tuple[str, str, str, tuple[tuple[str, str], ...]]


def planned(words: tuple[str, ...], kernel: str, *more: str | Path) -> set[Described]:
    """What a printed script probes: side, name, function, and name and type of each field."""
    found: set[Described] = set()
    for line in answered("capture", "plan", "--kernel", kernel, *words, *more).lines:
        if line.startswith("add '"):
            probe = PROBE.fullmatch(shlex.split(line)[1])
            assert probe is not None, line
            fetches = [fetch.partition("=")[::2] for fetch in probe["fetches"].split()]
            fields = tuple((name, what.rpartition(":")[2]) for name, what in fetches)
            found.add((probe["side"], probe["name"], probe["function"], fields))
        elif event := ENABLED.fullmatch(line):
            found.add(("", event["name"], "", ()))
    return found


def described(spec: EventSpec) -> Described:
    """The same of a simulated kind of event; a tracepoint has the fields that it has."""
    if spec.kind == "tracepoint":
        return "", f"{spec.group}/{spec.name}", "", ()
    side = "p" if spec.kind == "entry" else "r"
    return side, f"{spec.group}/{spec.name}", spec.function, spec.fields


def recorder(probes: str, kernel: str, name: str = "quiet") -> ProbeRecorder:
    """The recorder of a short run."""
    chosen = scenario.named(name).with_(kernel=kernel, duration_ms=2)
    return ProbeRecorder(engine.run(chosen, 1), Capture(probes))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("probes", LEVELS)
def test_the_simulator_records_what_a_plan_probes(probes: str, kernel: str, tmp_path: Path) -> None:
    path = tmp_path / "kallsyms"
    path.write_text(kallsyms(*FUNCTIONS, "__seamcall", "__seamcall_ret", ATTRIBUTES))
    more = ("--from-kallsyms", path, "--btf", vcpu_types(tmp_path))
    expected = planned(LEVELS[probes], kernel, *more)
    assert expected == set(map(described, recorder(probes, kernel).specs()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_plan_probes_beyond_the_simulated_kernel(kernel: str, tmp_path: Path) -> None:
    expected = planned(("--level", "full"), kernel, "--btf", vcpu_types(tmp_path))
    simulated = set(map(described, recorder("capture", kernel).specs()))
    assert {function for _, _, function, _ in expected - simulated} == NOT_SIMULATED


def test_level_stock_is_the_kvm_events(tmp_path: Path) -> None:
    recorded = {described(event.spec) for event in recorder("stock", "6.18", "balloon").events()}
    assert recorded <= planned(("--level", "stock"), "6.18")
    assert len(recorded) > 2


@pytest.mark.parametrize("probes", LEVELS)
@pytest.mark.parametrize("name", ["balloon", "lifecycle", "page_split", "zero_step_attack"])
def test_a_run_has_no_other_events(probes: str, name: str) -> None:
    made = recorder(probes, "6.18", name)
    recorded = {event.spec for event in made.events()}
    assert recorded <= set(made.specs())
    assert {spec.name for spec in recorded} >= {"kvm_entry", "kvm_exit", "tdx_vcpu_run_return"}
