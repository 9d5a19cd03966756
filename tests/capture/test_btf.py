"""BTF: offsets of members, against the compiler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from support.hosts import made, structure

from tdxtrace.capture.btf import Btf, open_btf
from tdxtrace.errors import FormatError, InputError

SOURCE = """
#include <stdio.h>
#include <stddef.h>
typedef unsigned long long u64;
enum colour { RED, GREEN };
struct kvm_vcpu { void *kvm; int cpu; char pad[37]; int vcpu_id; u64 (*run)(int, char *); };
struct vcpu_tdx {
    struct kvm_vcpu vcpu;
    const volatile union { u64 whole; struct { int low, high; }; };
    enum colour colour;
    unsigned small : 3, more : 9;
    u64 exit_gpa, list[7], vp_enter_ret;
} made;
int main(void)
{
    printf("%zu %zu %zu %zu", offsetof(struct vcpu_tdx, vp_enter_ret),
           offsetof(struct vcpu_tdx, exit_gpa), offsetof(struct kvm_vcpu, vcpu_id),
           offsetof(struct vcpu_tdx, high));
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("btf")
    (folder / "made.c").write_text(SOURCE)
    words = ["gcc", "-gbtf", "-o", str(folder / "made"), str(folder / "made.c")]
    if subprocess.run(words, check=False).returncode:
        pytest.skip("this gcc cannot write BTF (-gbtf, GCC 12)")
    return folder / "made"


def test_offsets_are_the_compilers(compiled: Path) -> None:
    said = subprocess.run([compiled], capture_output=True, check=True, text=True).stdout
    btf = open_btf([compiled])
    asked = ("vcpu_tdx", "vp_enter_ret"), ("vcpu_tdx", "exit_gpa"), ("kvm_vcpu", "vcpu_id")
    found = [btf.offset_of(*names) for names in (*asked, ("vcpu_tdx", "high"))]
    assert found == list(map(int, said.split()))
    small = btf.offset_of("vcpu_tdx", "small")  # a bit field that begins with a byte
    assert small == (btf.offset_of("vcpu_tdx", "colour") or 0) + 4
    assert btf.offset_of("vcpu_tdx", "more") is None  # one that does not
    assert btf.offset_of("vcpu_tdx", "absent") is None
    assert btf.offset_of("absent", "vcpu_id") is None


def test_a_module_builds_on_its_kernel(tmp_path: Path) -> None:
    """Types and names of kvm_intel are numbered on from those of vmlinux."""
    kernel = made(structure(1, 8, (10, 0, 32)), b"\0kvm_vcpu\0vcpu_id\0")
    # Type 2: struct vcpu_tdx (name 18, behind the kernel's 18 bytes), with an unnamed
    # member of the kernel's type 1 at 64 bits, and vp_enter_ret.
    module = made(structure(18, 24, (0, 1, 64), (27, 0, 128)), b"vcpu_tdx\0vp_enter_ret\0")
    base = Btf(kernel, "vmlinux")
    btf = Btf(module, "kvm_intel", base)
    assert btf.offset_of("vcpu_tdx", "vp_enter_ret") == 16
    assert btf.offset_of("vcpu_tdx", "vcpu_id") == 8 + 4
    assert btf.offset_of("kvm_vcpu", "vcpu_id") == 4
    assert base.offset_of("vcpu_tdx", "vp_enter_ret") is None


@pytest.mark.parametrize("cut", [0, 3, 23, 30, 40])
def test_truncated_btf_is_refused(cut: int) -> None:
    whole = made(structure(1, 8, (10, 0, 32), (10, 0, 0)), b"\0kvm_vcpu\0vcpu_id\0")
    with pytest.raises(FormatError):
        Btf(whole[:cut], "x").offset_of("kvm_vcpu", "vcpu_id")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(FormatError, match="ELF"):
        open_btf([tmp_path / "x"])
    with pytest.raises(InputError, match="cannot read"):
        open_btf([tmp_path / "absent"])
    with pytest.raises(FormatError, match="not little-endian BTF"):
        Btf(bytes(64), "x")
    with pytest.raises(FormatError, match="unknown kind"):
        Btf(made(struct.pack("<III", 0, 31 << 24, 0), b"\0"), "x")


def test_this_kernels_own_types() -> None:
    path = Path("/sys/kernel/btf/vmlinux")
    if not path.exists():
        pytest.skip("this kernel has no BTF")
    btf = open_btf([path])
    assert btf.offset_of("list_head", "prev") == 8
    assert btf.offset_of("task_struct", "no_such_member") is None
