"""Probes on returns only do not imply a full buffer."""

from pathlib import Path

import pytest

import tdxtrace

ENTER = "{tid:>16}    [00{cpu}] .....  4189.19{us:04}: vpenter_in: (tdx_vcpu_run+0x4/0x230 [kvm_intel]) vp=0xff11"  # noqa: E501 - lines as the kernel prints them
EXIT = "{tid:>16}    [00{cpu}] .....  4189.19{us:04}: vpenter: (vt_vcpu_run+0x2e/0x60 [kvm_intel] <- tdx_vcpu_run [kvm_intel]) status=0x1 gpa=0x0 vp=0xff11 fast=0"  # noqa: E501
FLUSH = "{tid:>16}    [00{cpu}] .....  4189.19{us:04}: tdh_phymem_page_wbinvd_hkid_{what}: (tdx_sept_drop_private_spte+0xe4/0x1b0 [kvm_intel] {arrow} tdh_phymem_page_wbinvd_hkid) {fields}"  # noqa: E501


def _flush(us: int, what: str) -> str:
    arrow, fields = ("<-", "ret=0x0") if what == "done" else ("->", "hkid=34 page=0xffd4")
    return FLUSH.format(tid="worker-50", cpu=1, us=us, what=what, arrow=arrow, fields=fields)


def _vcpu(line: str, us: int) -> str:
    return line.format(tid="CPU 0/KVM-40", cpu=0, us=us)


KVM_ENTRY = "{tid:>16}    [00{cpu}] d..1.  4189.19{us:04}: kvm_entry: vcpu 0, rip 0x0 intr_info 0x00000000 error_code 0x00000000"  # noqa: E501
BARE = "{tid:>16}    [00{cpu}] .....  4189.19{us:04}: vpenter: (vt_vcpu_run+0x2e/0x60 [kvm_intel] <- tdx_vcpu_run [kvm_intel]) status=0x80000200000000a9"  # noqa: E501


def _kinds(tmp_path: Path, *lines: str) -> list[str]:
    path = tmp_path / "trace.txt"
    path.write_text("\n".join(lines) + "\n")
    return tdxtrace.read_trace(path).losses["kind"].to_list()


@pytest.mark.parametrize("entries", [False, True])
def test_returns_without_entries_mean_a_loss_only_where_entries_are_probed(
    tmp_path: Path, entries: bool
) -> None:
    # CPU 0 is in the guest when CPU 1 flushes its last pages.
    lines = [_vcpu(ENTER, 100), _vcpu(EXIT, 110), _vcpu(ENTER, 111)]
    lines += [_flush(1200, "enter")] if entries else []
    lines += [_flush(us, "done") for us in (1210, 1220, 1230)]
    assert ("buffer_full" in _kinds(tmp_path, *lines)) == entries


def test_a_return_while_a_zap_holds_vcpus_off_is_no_sign_of_a_full_buffer(tmp_path: Path) -> None:
    """It has no kvm_entry, which is the start of other entries, and CPU 1 may be idle."""
    lines = [_flush(50, "enter"), _flush(60, "done")]
    lines += [_vcpu(KVM_ENTRY, 100), _vcpu(BARE, 110), _vcpu(BARE, 111), _vcpu(BARE, 112)]
    lines += [_vcpu(KVM_ENTRY, 120), _vcpu(BARE, 130)]
    assert "buffer_full" not in _kinds(tmp_path, *lines)
