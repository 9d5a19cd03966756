"""Calls after a call whose return was not recorded."""

from pathlib import Path

import tdxtrace

TRACE = """\
 CPU 0/KVM-4245    [000] .....  4189.193{0}: tdh_mem_page_aug_enter: (tdh_mem_page_aug+0x4/0xb0) td=0x10 gpa=0x1000 level=0
 CPU 0/KVM-4245    [000] .....  4189.193{1}: tdh_mem_page_aug_enter: (tdh_mem_page_aug+0x4/0xb0) td=0x10 gpa={2} level=0
 CPU 0/KVM-4245    [000] .....  4189.193{3}: tdh_mem_page_aug_exit: (tdx_sept_set_private_spte+0x9b/0x1a0 [kvm_intel] <- tdh_mem_page_aug) ret=0x0
 CPU 0/KVM-4245    [000] .....  4189.194000: tdh_mem_track_enter: (tdh_mem_track+0x4/0xb0) td=0x10
 CPU 0/KVM-4245    [000] .....  4189.194005: tdh_mem_track_exit: (tdx_track+0x47/0x110 [kvm_intel] <- tdh_mem_track) ret=0x0
"""  # noqa: E501 - lines as the kernel prints them


def _outcomes(tmp_path: Path, gpa: str) -> list[str]:
    path = tmp_path / "trace.txt"
    path.write_text(TRACE.format(100, 110, gpa, 115))
    chains = tdxtrace.analyze(tdxtrace.read_trace(path)).retry_chains
    return chains.filter(leaf=6)["outcome"].to_list()


def test_the_next_attempt_at_the_same_page_may_be_a_retry(tmp_path: Path) -> None:
    assert _outcomes(tmp_path, "0x1000") == ["cut", "cut"]


def test_a_call_for_another_page_is_not_doubtful(tmp_path: Path) -> None:
    assert _outcomes(tmp_path, "0x2000") == ["cut", "succeeded"]


LOSS = """\
          worker-5242    [000] .....  4189.100000: tdh_mem_track_enter: (tdh_mem_track+0x4/0xb0) td=0x10
          worker-5242    [000] .....  4189.100003: tdh_mem_track_exit: (tdx_track+0x47/0x110 [kvm_intel] <- tdh_mem_track) ret=0x0
          worker-5242    [000] .....  4189.100010: tdh_mem_track_enter: (tdh_mem_track+0x4/0xb0) td=0x10
CPU:0 [LOST 7 EVENTS]
          worker-5242    [000] .....  4189.100050: tdh_mem_track_enter: (tdh_mem_track+0x4/0xb0) td=0x10
          worker-5242    [000] .....  4189.100053: tdh_mem_track_exit: (tdx_track+0x47/0x110 [kvm_intel] <- tdh_mem_track) ret=0x80000200000000a9
          worker-5242    [000] .....  4189.100054: tdh_mem_track_enter: (tdh_mem_track+0x4/0xb0) td=0x10
          worker-5242    [000] .....  4189.100057: tdh_mem_track_exit: (tdx_track+0x47/0x110 [kvm_intel] <- tdh_mem_track) ret=0x0
CPU:0 [LOST 3 EVENTS]
          worker-5242    [000] .....  4189.100090: tdh_mem_track_exit: (tdx_track+0x47/0x110 [kvm_intel] <- tdh_mem_track) ret=0x0
"""  # noqa: E501


def test_a_chain_after_a_loss_is_cut_though_a_stale_entry_was_paired_later(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(LOSS)
    chains = tdxtrace.analyze(tdxtrace.read_trace(path)).retry_chains
    sure = chains.filter(outcome="succeeded")
    assert sure["n_attempts"].to_list() == [1]
    assert "cut" in chains.filter(n_attempts=2)["outcome"].to_list()
