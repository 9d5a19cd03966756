"""Kernel functions that issue SEAMCALLs, against arch/x86/virt/vmx/tdx/tdx.c."""

from __future__ import annotations

import pytest

from tdxtrace.tdx.wrappers import (
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
        ("tdh_mem_page_promote", 23, "td gpa level"),
        ("vfs_read", None, ""),
    ],
)
def test_functions_have_the_leaf_and_arguments_of_the_source(
    function: str, leaf: int | None, arguments: str
) -> None:
    assert leaf_of(function) == leaf
    assert signature(function) == tuple(arguments.split())


def test_kernels_from_7_2_pass_a_page_frame_number_for_guest_pages_only() -> None:
    for kernel in ("6.18.44", "7.0.1", "7.1.0-rc3+", "7.1.9-generic"):
        assert signature("tdh_mem_page_aug", kernel)[3] == "page"
        assert signature("tdh_mem_page_add", kernel)[2] == "page"
    for kernel in ("7.2.0-rc1", "7.2", "7.4", "8.0"):
        assert signature("tdh_mem_page_aug", kernel)[3] == "pfn"
        assert signature("tdh_mem_page_add", kernel)[2] == "pfn"
        assert signature("tdh_phymem_page_wbinvd_hkid", kernel)[1] == "pfn"
        assert signature("tdh_mem_sept_add", kernel)[3] == "page"


@pytest.mark.parametrize(
    ("kernel", "base"),
    [
        ("6.16", 0),
        ("6.18.44-foo", 0),
        ("6.19.0-rc3+", 0),
        ("7.0.1", 0),
        ("7.1.0-rc7", 0),
        ("7.2.0-rc1", 1),
        ("7.2", 1),
        ("7.10", 1),
        ("6.15.9", None),
        ("6.20", None),
        ("8.0", None),
        ("6", None),
        ("banana", None),
        ("", None),
    ],
)
def test_the_level_counts_from_0_before_7_2_and_from_1_after(kernel: str, base: int | None) -> None:
    assert level_base(kernel) == base


def test_a_function_that_only_newer_kernels_have_has_one_form() -> None:
    """The old form is not made up for a kernel whose own function of this name was not read."""
    assert signature("tdh_phymem_pamt_add", "7.4") == ("pfn", "pamt_pages")
    assert signature("tdh_phymem_pamt_add") == ("pfn", "pamt_pages")
    assert signature("tdh_phymem_pamt_add", "6.18") == ()
    assert signature("tdh_spdm_create") == ("func_id", "spdm_mt", "spdm_id")


def test_the_kernel_initialises_a_vcpu_with_version_1() -> None:
    versions = wrapper_table().filter(version=1)
    assert versions["function"].to_list() == ["tdh_vp_init"]


def test_functions_are_listed_once() -> None:
    assert wrapper_table()["function"].is_unique().all()
