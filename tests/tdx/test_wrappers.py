"""Kernel functions that issue SEAMCALLs, against arch/x86/virt/vmx/tdx/tdx.c."""

from __future__ import annotations

import pytest

from tdxtrace.tdx.wrappers import (
    is_level_base_inferred,
    leaf_of,
    level_base,
    signature,
    wrapper_table,
)


@pytest.mark.parametrize(
    ("function", "leaf", "arguments"),
    [
        ("tdh_vp_enter", 0, "vp args"),
        ("tdh_mem_page_add", 2, "td gpa page source ext_err1 ext_err2"),
        ("tdh_mem_sept_add", 3, "td gpa level page ext_err1 ext_err2"),
        ("tdh_mem_page_aug", 6, "td gpa level page ext_err1 ext_err2"),
        ("tdh_mem_range_block", 7, "td gpa level ext_err1 ext_err2"),
        ("tdh_mem_page_remove", 29, "td gpa level ext_err1 ext_err2"),
        ("tdh_mem_sept_remove", 30, "td gpa level ext_err1 ext_err2"),
        ("tdh_mem_range_unblock", 39, "td gpa level ext_err1 ext_err2"),
        ("tdh_mem_track", 38, "td"),
        ("tdh_mr_extend", 16, "td gpa ext_err1 ext_err2"),
        ("tdh_mng_create", 9, "td hkid"),
        ("tdh_vp_create", 10, "td vp"),
        ("tdh_vp_init", 22, "vp initial_rcx x2apic_id"),
        ("tdh_phymem_page_wbinvd_hkid", 41, "hkid page"),
        ("tdh_phymem_cache_wb", 40, "resume"),
        ("__seamcall", None, "fn args"),
        ("__seamcall_ret", None, "fn args"),
        ("__seamcall_saved_ret", 0, "fn args"),
        ("tdx_vcpu_run", 0, "vcpu force_immediate_exit"),
        ("tdh_mem_page_promote", 23, ""),
        ("vfs_read", None, ""),
    ],
)
def test_functions_have_the_leaf_and_arguments_of_the_source(
    function: str, leaf: int | None, arguments: str
) -> None:
    assert leaf_of(function) == leaf
    assert signature(function) == tuple(arguments.split())


def test_a_7_kernel_passes_a_page_frame_number_for_guest_pages_only() -> None:
    assert signature("tdh_mem_page_aug", "7.0.1")[3] == "pfn"
    assert signature("tdh_mem_page_aug", "6.18.44")[3] == "page"
    assert signature("tdh_mem_sept_add", "7.0.1")[3] == "page"


@pytest.mark.parametrize(
    ("kernel", "base", "inferred"),
    [
        ("6.16", 0, False),
        ("6.18.44-foo", 0, False),
        ("6.19.0-rc3+", 0, False),
        ("7.0.1", 1, True),
        ("7.2", 1, True),
        ("6.15.9", None, False),
        ("6.20", None, False),
        ("8.0", None, False),
        ("6", None, False),
        ("banana", None, False),
        ("", None, False),
    ],
)
def test_the_level_counts_from_0_before_7_and_from_1_after(
    kernel: str, base: int | None, inferred: bool
) -> None:
    assert level_base(kernel) == base
    assert is_level_base_inferred(kernel) is inferred


def test_the_kernel_initialises_a_vcpu_with_version_1() -> None:
    versions = wrapper_table().filter(version=1)
    assert versions["function"].to_list() == ["tdh_vp_init"]


def test_functions_are_listed_once() -> None:
    assert wrapper_table()["function"].is_unique().all()
