"""Classification of events by name and text."""

from __future__ import annotations

from typing import Any

import pytest
from support.texts import BUSY, is_accounted_for, line, lost, read_text

from tdxtrace.errors import QueryError
from tdxtrace.ingest.events.registry import (
    Event,
    Role,
    classify,
    function_named,
    functions,
    mapping_of,
)

ENTRY = "(0x5646b46b3a50) td=0x7d000 gpa=0x80000000 level=0"
RETURN = "(0x5646b46b5e9e <- 0x5646b46b3a50) ret=0x0"
PERF_ENTRY = "(5646b46b3a50) td=0x7d000"
PERF_RETURN = "(5646b46b3a50 <- 5646b46b5e9e) ret=0x0"
RAW_ENTRY = "__probe_ip=5646b46b3a50 td=0x7d000"
RAW_RETURN = "__probe_func=5646b46b3a50 __probe_ret_ip=5646b46b5e9e ret=0x0"


def known(name: str, args: str = ENTRY, **mappings: tuple[str, Role | None]) -> Event:
    return classify(name, args, mappings)


AUG = [
    "tdh_mem_page_aug",
    "tdh_mem_page_aug_enter",
    "tdh_mem_page_aug_entry",
    "tdh_mem_page_aug_in",
    "tdh_mem_page_aug_start",
    "tdh_mem_page_aug_exit",
    "tdh_mem_page_aug_ret",
    "tdh_mem_page_aug_return",
    "tdh_mem_page_aug_out",
    "tdh_mem_page_aug_done",
    "tdh_mem_page_aug_end",
    "tdh_mem_page_aug__return",
    "tdh_mem_page_aug__entry",
    "tdh_mem_page_aug__exit",
    "tdh_mem_page_aug_1",
    "p_tdh_mem_page_aug_0",
    "r_tdh_mem_page_aug_0",
    "probe:tdh_mem_page_aug",
    "probe:tdh_mem_page_aug__return",
    "fprobes:tdh_mem_page_aug__entry",
    "kprobes:p_tdh_mem_page_aug_0",
    "tdx:aug",
    "aug",
    "aug_ret",
    "aug_in",
    "aug_out",
    "aug_x",
    "aug_done",
    "page_aug",
    "mem_page_aug",
    "mem_page_aug_ret",
    "AUG",
    "Tdh_Mem_Page_Aug_Enter",
    "tdh.mem.page.aug",
]


@pytest.mark.parametrize("args", [ENTRY, PERF_ENTRY, RAW_ENTRY])
@pytest.mark.parametrize("name", AUG)
def test_names_of_one_wrapper(name: str, args: str) -> None:
    event = known(name, args)
    assert (event.kind, event.function, event.leaf) == ("call", "tdh_mem_page_aug", 6)
    assert (event.role, event.probe) == ("entry", "wrapper")


@pytest.mark.parametrize("args", [RETURN, PERF_RETURN, RAW_RETURN])
@pytest.mark.parametrize("name", AUG)
def test_the_text_and_not_the_name_says_which_side_it_is(name: str, args: str) -> None:
    event = known(name, args)
    assert (event.function, event.role) == ("tdh_mem_page_aug", "return")


@pytest.mark.parametrize(
    ("name", "function", "leaf"),
    [
        ("septadd", "tdh_mem_sept_add", 3),
        ("septadd_ret", "tdh_mem_sept_add", 3),
        ("sept_add", "tdh_mem_sept_add", 3),
        ("block", "tdh_mem_range_block", 7),
        ("blk_done", "tdh_mem_range_block", 7),
        ("tdh_mem_range_block__return", "tdh_mem_range_block", 7),
        ("track", "tdh_mem_track", 38),
        ("track_ret", "tdh_mem_track", 38),
        ("tdh_mem_track__return", "tdh_mem_track", 38),
        ("remove", "tdh_mem_page_remove", 29),
        ("remove_ret", "tdh_mem_page_remove", 29),
        ("vp_enter", "tdh_vp_enter", 0),
        ("vp_exit", "tdh_vp_enter", 0),
        ("vpenter", "tdh_vp_enter", 0),
        ("vpenter2", "tdh_vp_enter", 0),
        # The trap: an entry probe that is named after its function ends in _enter.
        ("tdh_vp_enter", "tdh_vp_enter", 0),
        ("tdh_vp_enter_enter", "tdh_vp_enter", 0),
        ("tdh_vp_enter_exit", "tdh_vp_enter", 0),
        ("tdh_vp_enter__return", "tdh_vp_enter", 0),
        ("tdh_vp_enter_ret", "tdh_vp_enter", 0),
        ("tdh_phymem_page_wbinvd_hkid_enter", "tdh_phymem_page_wbinvd_hkid", 41),
        ("tdh_phymem_page_wbinvd_tdr_ret", "tdh_phymem_page_wbinvd_tdr", 41),
        ("phymem_cache_wb", "tdh_phymem_cache_wb", 40),
        ("tdh_phymem_page_reclaim", "tdh_phymem_page_reclaim", 28),
        ("tdh_vp_flush_in", "tdh_vp_flush", 18),
        ("tdh_mng_vpflushdone", "tdh_mng_vpflushdone", 19),
        ("tdh_mem_page_add_ret", "tdh_mem_page_add", 2),
        ("tdh_mem_page_demote", "tdh_mem_page_demote", 15),
        ("tdh_mr_extend_entry", "tdh_mr_extend", 16),
        ("sc", "__seamcall", None),
        ("sc_ret", "__seamcall_ret", None),
        ("sc_ret_in", "__seamcall_ret", None),
        ("p_seamcall_0", "__seamcall", None),
        ("__seamcall", "__seamcall", None),
        ("__seamcall_ret__return", "__seamcall_ret", None),
    ],
)
def test_names_of_other_wrappers(name: str, function: str, leaf: int | None) -> None:
    event = known(name)
    assert (event.kind, event.function, event.leaf) == ("call", function, leaf)


@pytest.mark.parametrize("function", sorted(functions()))
def test_every_wrapper_is_known_by_its_own_name(function: str) -> None:
    assert function_named(function) == function
    if function.startswith("tdh_"):
        for name in (f"{function}_enter", f"{function}_exit", f"p_{function}_0"):
            assert function_named(name) == function


@pytest.mark.parametrize(
    ("name", "role"),
    [("tdh_mem_page_aug:entry", ENTRY), ("tdh_mem_page_aug:ret", RETURN), ("aug:done", RETURN)],
)
def test_a_group_can_say_which_wrapper_it_is(name: str, role: str) -> None:
    assert known(name, role).function == "tdh_mem_page_aug"


@pytest.mark.parametrize(
    ("args", "function"),
    [
        ("(tdh_mem_page_aug+0x4/0xb0) td=0x1", "tdh_mem_page_aug"),
        ("(tdh_mem_page_aug+0x0/0xb0) td=0x1", "tdh_mem_page_aug"),
        ("(tdh_mem_page_aug) td=0x1", "tdh_mem_page_aug"),
        # tracefs: the function after the arrow.
        (
            "(tdx_sept_set_private_spte+0x9b/0x1a0 [kvm_intel] <- tdh_mem_page_aug) ret=0x0",
            "tdh_mem_page_aug",
        ),
        ("(tdx_track+0x3b/0x90 [kvm_intel] <- tdh_mem_track) ret=0x0", "tdh_mem_track"),
        # perf and trace-cmd with symbols: before it.
        ("(tdh_mem_range_block <- tdx_sept_zap_private_spte+0x4b/0x120) ret=0x0",
         "tdh_mem_range_block"),
        ("(tdh_mem_page_aug+0x9b/0x1a0 <- __seamcall_ret) ret=0x0 fn=0x6", "__seamcall_ret"),
        ("(__seamcall_ret <- tdh_mem_page_aug+0x9b/0x1a0) ret=0x0 fn=0x6", "__seamcall_ret"),
    ],
)  # fmt: skip
def test_a_probe_with_an_opaque_name_is_known_by_its_symbol(args: str, function: str) -> None:
    for name in ("p_0x4240", "myprobe", "kretprobe_7", "x:y"):
        assert known(name, args).function == function


def test_the_symbol_is_believed_before_the_name() -> None:
    event = known("aug", "(tdh_mem_sept_add+0x4/0xb0) td=0x1")
    assert event.function == "tdh_mem_sept_add"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("p_0x4240", "(0x556e6d3ab240)"),
        ("r_0x4240", "(0x556e6d3acd28 <- 0x556e6d3ab240) status=0x0"),
        ("foo", "(0x556e6d3ab240) td=0x1"),
        ("augment", "(0x556e6d3ab240)"),
        ("tdh_mem_page_augment_enter", "(0x556e6d3ab240)"),
        ("block_rq_complete_ret", "(0x1 <- 0x2)"),
    ],
)
def test_a_probe_of_unknown_function_is_unmapped(name: str, args: str) -> None:
    assert known(name, args).kind == "unmapped"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("sched_switch", "prev_comm=a prev_pid=1"),
        ("tdx_sept_drop_private_spte", "(tdx_sept_drop_private_spte+0x0/0x1a0 [kvm_intel])"),
        ("sys_enter", "NR 335 (0, 0, 0, 0, 0, 0)"),
        ("sys_exit", "NR 33 = 1"),
        ("block_rq_complete", "8,0 R () 1 + 8 [0]"),
        ("bprint", "select_task_rq_fair: fig: cpu=0"),
        ("tracing_mark_write", "tdh_mem_page_aug"),
        ("kvm_inj_virq", "IRQ 0xd1 [reinjected]"),
        ("track", "vec=1 [action=TIMER]"),
        ("", ""),
    ],
)
def test_what_is_no_probe_is_noise(name: str, args: str) -> None:
    assert known(name, args).kind == "noise"


@pytest.mark.parametrize(
    ("name", "kind", "role"),
    [
        ("kvm_entry", "vm_entry", "entry"),
        ("kvm:kvm_entry", "vm_entry", "entry"),
        ("kvm_exit", "vm_entry", "return"),
        ("kvm:kvm_page_fault", "page_fault", "single"),
        ("kvm_userspace_exit", "host_event", "single"),
        ("kvm_tdx_seamcall_enter", "call", "entry"),
        ("tdx_seam:tdx_seamret", "call", "return"),
    ],
)
def test_tracepoints_are_known_whatever_their_group(name: str, kind: str, role: str) -> None:
    event = known(name, "")
    assert (event.kind, event.role) == (kind, role)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r_0x4240=tdh_mem_page_remove", ("r_0x4240", "tdh_mem_page_remove", None)),
        ("x=tdh_mem_page_remove:entry", ("x", "tdh_mem_page_remove", "entry")),
        ("x=tdh_mem_page_remove:return", ("x", "tdh_mem_page_remove", "return")),
        ("g:x=aug", ("g:x", "tdh_mem_page_aug", None)),
        ("x=TDH.MEM.PAGE.AUG", ("x", "tdh_mem_page_aug", None)),
        ("x=TDH_MEM_TRACK:return", ("x", "tdh_mem_track", "return")),
        ("x=__seamcall_ret", ("x", "__seamcall_ret", None)),
    ],
)
def test_a_mapping_says_what_a_name_probes(
    text: str, expected: tuple[str, str, Role | None]
) -> None:
    assert mapping_of(text) == expected


@pytest.mark.parametrize("text", ["", "x", "x=", "=aug", "x=aug:both", "x=:return"])
def test_a_malformed_mapping_is_reported(text: str) -> None:
    with pytest.raises(QueryError, match="not a mapping"):
        mapping_of(text)


def test_a_mapping_to_an_unknown_function_is_refused() -> None:
    with pytest.raises(QueryError, match="unknown function"):
        mapping_of("x=tdh_mem_page_frobnicate")


@pytest.mark.parametrize("name", ["r_0x4240", "grp:r_0x4240"])
def test_a_mapping_holds_with_and_without_group(name: str) -> None:
    event = known(name, RETURN, r_0x4240=("tdh_mem_page_remove", None))
    assert (event.function, event.role) == ("tdh_mem_page_remove", "return")


def test_a_mapping_with_a_side_wins_over_the_text() -> None:
    event = known("x", "ret=0x0", x=("tdh_mem_page_remove", "return"))
    assert (event.function, event.role) == ("tdh_mem_page_remove", "return")


def test_a_mapping_wins_over_a_name_that_says_otherwise() -> None:
    event = known("aug", ENTRY, aug=("tdh_mem_sept_add", None))
    assert event.function == "tdh_mem_sept_add"


# And in whole files.


def columns(text: str, *names: str, **options: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401
    trace = read_text(text, **options)
    trace.check()
    assert is_accounted_for(trace)
    return trace.seamcalls.select(names).rows()


def test_probes_without_a_mapping_are_counted_and_with_one_are_calls() -> None:
    text = "".join(
        [
            line("1.000001", "p_0x4240: (0x556e6d3ab240)"),
            line("1.000002", "r_0x4240: (0x556e6d3acd28 <- 0x556e6d3ab240) status=0x0 hi=0x0"),
            line("1.000003", "track: (0x556e6d3ab1c0) td=0x7d000"),
        ]
    )
    assert lost(read_text(text)) == {"unmapped": 2}
    mapped = ["p_0x4240=tdh_mem_page_remove", "r_0x4240=tdh_mem_page_remove"]
    assert columns(text, "leaf", "status", mappings=mapped) == [(29, 0), (38, None)]


def test_one_name_for_both_sides_is_told_apart_by_the_text() -> None:
    """Groups are not printed by tracefs: in:aug and out:aug look alike."""
    text = line("1.000001", f"aug: {ENTRY}") + line("1.000002", f"aug: {RETURN}")
    assert columns(text, "gpa", "status", "n_lines") == [(0x8000_0000, 0, 2)]


def test_a_damaged_first_line_of_an_event_does_not_hide_the_others() -> None:
    text = (
        line("1.000000", "aug_in: ")
        + line("1.000001", f"aug_in: {ENTRY}")
        + line("1.000002", f"aug_out: {RETURN}")
    )
    assert columns(text, "gpa", "status") == [(0x8000_0000, 0)]


def test_arguments_by_position_mean_what_the_signature_says() -> None:
    """A probe on raw registers names them arg1, arg2…; the return's arg1 is the status."""
    text = line("1.000001", "tdh_mem_range_block: (0x5646) arg1=0x7d000 arg2=4096 arg3=1") + line(
        "1.000002", "tdh_mem_range_block__return: (0x57 <- 0x56) arg1=0x8000020000000092"
    )
    rows = columns(text, "td_id", "gpa", "level", "status", level_base=0)
    assert rows == [(0x7D000, 0x1000, 1, BUSY)]


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        ("tdh_vp_enter", "arg1=0x5b arg2=0xff", {"vp_id": 0x5B}),
        ("tdh_mem_page_aug", "arg1=0x1 arg2=0x1000 arg3=0 arg4=0x9", {"page": 9, "gpa": 0x1000}),
        ("tdh_phymem_page_reclaim", "arg1=0x9 arg2=0xff", {"page": 9}),
        ("tdh_phymem_page_wbinvd_hkid", "arg1=0x20 arg2=0x9", {"page": 9, "td_id": None}),
        ("tdh_vp_create", "arg1=0x1 arg2=0x5b", {"td_id": 1, "vp_id": 0x5B}),
    ],
)
def test_positions_follow_each_wrappers_signature(
    function: str, arguments: str, expected: dict[str, int | None]
) -> None:
    text = line("1.000001", f"{function}: (0x5646) {arguments}")
    row = read_text(text).seamcalls.row(0, named=True)
    assert {name: row[name] for name in expected} == expected


def test_a_one_line_return_probe_carries_the_arguments() -> None:
    done = (
        "aug_done: (tdx_sept_set_private_spte+0x9b/0x1a0 [kvm_intel] <- tdh_mem_page_aug) "
        "ret=0x8000020000000092 td=0x7d000 gpa=0x80000000 level=0 ext1=0x803 ext2=0x100"
    )
    names = ("leaf", "td_id", "gpa", "level", "status", "ext_err1", "ext_err2", "start_ns")
    rows = columns(line("1.000002", done), *names)
    assert rows == [(6, 0x7D000, 0x8000_0000, 0, BUSY, 0x803, 0x100, None)]


SC_ENTRY = "sc_ret_in: (__seamcall_ret+0x0/0x40) fn=0x6 rcx=0x80000000 rdx=0x7d000 r8=0x99000"
SC_RETURN = "sc_ret: (tdh_mem_page_aug+0x9b/0xb0 <- __seamcall_ret) ret=0x0 fn=0x6"


def test_registers_of_the_lower_layer_are_read_by_leaf() -> None:
    text = line("1.000001", SC_ENTRY) + line("1.000002", f"{SC_RETURN} rcx=0x7 rdx=0x400")
    names = ("leaf", "version", "gpa", "level", "td_id", "page", "ext_err1", "ext_err2", "probe")
    assert columns(text, *names) == [
        (6, 0, 0x8000_0000, 0, 0x7D000, 0x99000, 7, 0x400, "seamcall"),
    ]


def test_level_and_gpa_share_a_register() -> None:
    text = line("1.000001", SC_ENTRY.replace("rcx=0x80000000", "rcx=0x80200001"))
    assert columns(text, "gpa", "level") == [(0x8020_0000, 1)]


def test_a_call_may_take_several_pages() -> None:
    entry = "sc_in: (__seamcall+0x0/0x40) fn=0x3a rcx=0x100200001 rdx=0x99000 r8=0x9a000"
    text = line("1.000001", entry) + line("1.000002", "sc: (tdh_x+0x9b <- __seamcall) ret=0x0")
    names = ("leaf", "page", "level", "page_2", "page_3", "gpa", "td_id", "status")
    rows = [(58, 0x1_0020_0000, 1, 0x99000, 0x9A000, None, None, 0)]
    assert columns(text, *names) == rows
    # Rows of other calls, before and behind, have none of these pages.
    other = (6, 0x99000, 0, None, None, 0x8000_0000, 0x7D000, 0)
    before, after = (line(f"{n}.0", SC_ENTRY) + line(f"{n}.1", SC_RETURN) for n in (0, 2))
    assert columns(before + text + after, *names) == [other, *rows, other]


def test_a_page_of_a_wrapper_may_be_a_frame_number() -> None:
    text = line("1.000001", "pamt_in: (tdh_phymem_pamt_add+0x0/0x40) pfn=0x100200 pamt_pages=0x5b")
    text += line("1.000002", "pamt: (tdx_pamt_get+0x9b <- tdh_phymem_pamt_add) ret=0x0")
    trace = read_text(text)
    assert trace.seamcalls.select("leaf", "page", "status").rows() == [(58, 0x100200, 0)]
    assert "page_2" not in trace.seamcalls.columns


@pytest.mark.parametrize(
    ("fn", "leaf", "version"),
    [("0x6", 6, 0), ("0x10016", 22, 1), ("65558", 22, 1), ("0x10003", 3, 1), ("0x26", 38, 0)],
)
def test_fn_holds_leaf_and_version(fn: str, leaf: int, version: int) -> None:
    text = line("1.000001", f"sc: (tdh_x+0x9b/0xb0 <- __seamcall) ret=0x0 fn={fn} rcx=0x5b000")
    assert columns(text, "leaf", "version") == [(leaf, version)]


def test_a_call_to_the_loader_is_no_leaf_of_the_module() -> None:
    """fn with bit 63 asks P-SEAMLDR: 0x8000000000000000 is INFO, not TDH.VP.ENTER."""
    loader = "sc: (seamldr_call+0x9b/0xb0 <- __seamcall) ret=0x0 fn=0x8000000000000000"
    text = line("1.000001", loader) + line("1.000002", f"{SC_RETURN}")
    assert columns(text, "leaf") == [(6,)]


def test_inputs_stay_in_the_arguments_of_seamcall_and_are_overwritten_by_its_siblings() -> None:
    """__seamcall leaves its arguments alone; __seamcall_ret writes the outputs over them."""
    plain = "sc: (tdh_mem_track+0x9b/0xb0 <- __seamcall) ret=0x0 fn=0x26 rcx=0x7d000"
    after = "sc_ret: (tdh_mem_page_aug+0x9b/0xb0 <- __seamcall_ret) ret=0x0 fn=0x6 rcx=0x7 rdx=0x4"
    rows = columns(line("1.000001", plain) + line("1.000002", after), "td_id", "gpa", "ext_err1")
    assert rows == [(0x7D000, None, None), (None, None, 7)]


def test_a_lower_layer_return_that_names_no_leaf_is_no_row() -> None:
    """Its entry, which did, was not recorded."""
    text = (
        line("1.000001", "sc_ret: (tdh_mem_page_aug+0x9b/0xb0 <- __seamcall_ret) ret=0x0")
        + line("1.000002", SC_ENTRY)
        + line("1.000003", "sc_ret: (tdh_mem_page_aug+0x9b/0xb0 <- __seamcall_ret) ret=0x0")
    )
    assert columns(text, "leaf", "n_lines") == [(6, 2)]


def test_a_probe_on_the_caller_records_vcpu_entries() -> None:
    """tdh_vp_enter cannot be probed: tdx_vcpu_run, with offsets into struct vcpu_tdx, can."""
    text = "".join(
        [
            line(
                "1.000001",
                "vpenter: (vcpu_run+0x1/0x2 [kvm] <- tdx_vcpu_run) "
                "status=0x8000020000000092 gpa=0x80000000 vcpu=3 fast=0",
            ),
            line(
                "1.000009",
                "vpenter: (vcpu_run+0x1/0x2 [kvm] <- tdx_vcpu_run) status=0x30 gpa=0x0 vcpu=3",
            ),
        ]
    )
    rows = columns(text, "leaf", "status", "probe")
    assert rows == [(0, BUSY, "vcpu_run"), (0, 0x30, "vcpu_run")]


def test_tdx_vcpu_run_without_a_status_is_no_unfinished_call() -> None:
    text = line("1.000001", "vpenter: (tdx_vcpu_run+0x0/0x90 [kvm_intel]) status=0x30 vcpu=3")
    assert columns(text, "leaf", "status") == [(0, 0x30)]


@pytest.mark.parametrize("value", ["(fault)", "x", "0xzz"])
def test_a_return_whose_status_cannot_be_read_is_a_loss(value: str) -> None:
    text = line("1.000001", f"aug_ret: (0x1 <- 0x2) ret={value}") + line(
        "1.000002", f"aug_ret: {RETURN}"
    )
    trace = read_text(text)
    assert lost(trace) == {"undecoded": 1}
    assert trace.seamcalls["status"].to_list() == [0]


def test_a_function_that_is_named_as_its_leaf_is_a_call() -> None:
    """TDH.MEM.SEPT.RD: a function of kernels that are out of tree."""
    symbol = classify("probe_1", "(tdh_mem_sept_rd+0x4/0xb0) td=0x10 gpa=0x1000", {})
    address = classify("probe:tdh_mem_sept_rd", "(ffffffff810a0004) gpa=0x1000", {})
    assert symbol.leaf == address.leaf == 25
    assert classify("mem_rd", "(ffffffff810a0004) gpa=0x1000", {}).leaf is None
