"""A notation for traces: a line is one call with its two times, or one event of KVM.

==========================  ===================================================================
``10-12 7@4 block:5 K``     thread 7 on CPU 4 calls TDH.MEM.RANGE.BLOCK of page 5 from 10 us to
                            12 us; the letter is its answer (STATUS), or the word itself
``10- 7@4 aug:5``           only its entry was recorded
``-12 7@4 aug:5 S``         only its return was
``10-12 7@4#2 aug:5^1 S``   of the second TD, at level 1
``10-12 7@4 aug:5^- S``     its level was not recorded
``10-12 7@4 aug:5/9 S``     the page of the host is page 9
``10-12 7@4 enter 0x30``    TDH.VP.ENTER of the vCPU of the thread
``10 7@4 >``                kvm_entry of the vCPU of the thread
``16 7@4 <HLT``             kvm_exit with a reason (``FAILED``: -1), and info1 after a colon
``17 7@4 ?5``               kvm_page_fault on page 5
``20 7@4 run K``            a return of tdx_vcpu_run with this status
``30 @4 lost``              events of CPU 4 were lost
==========================  ===================================================================

Names and numbers are those of the kernel and of the module's headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from support.story import STATUS as LETTERS

WRAPPERS = {
    "add": "tdh_mem_page_add",
    "aug": "tdh_mem_page_aug",
    "block": "tdh_mem_range_block",
    "create": "tdh_mng_create",
    "demote": "tdh_mem_page_demote",
    "enter": "tdh_vp_enter",
    "finalize": "tdh_mr_finalize",
    "flush": "tdh_vp_flush",
    "init": "tdh_mng_init",
    "promote": "tdh_mem_page_promote",
    "reclaim": "tdh_phymem_page_reclaim",
    "remove": "tdh_mem_page_remove",
    "sept": "tdh_mem_sept_add",
    "track": "tdh_mem_track",
    "unblock": "tdh_mem_range_unblock",
    "vpcreate": "tdh_vp_create",
}
# Of this language alone: OPERAND_BUSY on RDX and on the TDR.
STATUS = {**LETTERS, "R": 0x8000_0200_0000_0002, "V": 0x8000_0200_0000_0080}
_LINE = re.compile(
    r"(?P<first>\d*)(?P<dash>-?)(?P<last>\d*) (?P<tid>\d*)@(?P<cpu>\d+)(?:#(?P<td>\d+))? "
    r"(?P<what>[a-z?<>][^ :/^]*)(?::(?P<page>[^ /^]+))?(?:/(?P<host>\w+))?(?:\^(?P<level>[\d-]))?"
    r"(?: (?P<status>\w+))?"
)
_EVENT = "{comm:>20} ({tgid:7d}) [{cpu:03d}] d..1.  {s}.{us:06d}: {text}"
_HEAD = "# tracer: nop\n#\n# entries-in-buffer/entries-written: {0}/{0}   #P:16\n#\n"
_REST = "intr_info 0x00000000 error_code 0x00000000"


def written(text: str) -> str:
    """Return the tracefs file of a trace in the language above; lines may be in any order."""
    rows: list[tuple[int, int, str]] = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        found = _LINE.fullmatch(line)
        assert found is not None, line
        rows += [(at, 2 * number + turn, shown) for turn, (at, shown) in enumerate(_rows(found))]
    return _HEAD.format(len(rows)) + "".join(f"{shown}\n" for *_, shown in sorted(rows))


def _rows(line: re.Match[str]) -> Iterator[tuple[int, str]]:
    what, cpu = line["what"], int(line["cpu"])
    if what == "lost":
        yield int(line["first"]), f"CPU:{cpu} [LOST 420 EVENTS]"
        return
    tid = int(line["tid"])

    def event(at: str, text: str) -> tuple[int, str]:
        comm, tgid = f"CPU {tid % 100}/KVM-{tid}", 10_000 + int(line["td"] or 1)
        s, us = divmod(1_000_000_000 + int(at), 1_000_000)
        return int(at), _EVENT.format(comm=comm, tgid=tgid, cpu=cpu, s=s, us=us, text=text)

    if not line["dash"]:
        yield event(line["first"], _of_kvm(line, what, tid % 100))
        return
    name = WRAPPERS[what]
    if line["first"]:
        yield event(line["first"], f"{name}_enter: ({name}+0x4/0xb0) {_arguments(line, what)}")
    if line["last"]:
        came = f"(tdx_caller+0x9b/0x1a0 [kvm_intel] <- {name})"
        yield event(line["last"], f"{name}_exit: {came} ret={_status(line):#x}")


def _of_kvm(line: re.Match[str], what: str, vcpu: int) -> str:
    if what == ">":
        return f"kvm_entry: vcpu {vcpu}, rip 0x0 {_REST}"
    if what == "run":
        returned = "(vt_vcpu_run+0x2e/0x60 [kvm_intel] <- tdx_vcpu_run [kvm_intel])"
        return f"tdx_vcpu_run_return: {returned} status={_status(line):#x} gpa=0x0 vcpu={vcpu}"
    if what.startswith("?"):
        address = _gpa(what[1:])
        return f"kvm_page_fault: vcpu {vcpu} rip 0x0 address {address:#018x} error_code 0x2"
    reason = {"FAILED": "0xffff FAILED_VMENTRY 0x7fff0000"}.get(what[1:], what[1:])
    infos = f"info1 {int(line['page'] or 0):#018x} info2 {0:#018x}"
    return f"kvm_exit: vcpu {vcpu} reason {reason} rip 0x0 {infos} {_REST} requests {0:#018x}"


def _arguments(line: re.Match[str], what: str) -> str:
    td = 0xFF11_0001_8A00_09A8 + 0x1_0000 * (int(line["td"] or 1) - 1)
    if what in ("enter", "flush"):
        return f"vp={0xFF11_0002_0000_0000 + 0x1000 * int(line['page'] or line['tid']):#x}"
    if what == "reclaim":
        return f"page={_struct_page(line['page']):#x}"
    words = [f"td={td:#x}"]
    words += ["vp=0xff11000300000000"] if what == "vpcreate" else []
    words += [f"gpa={_gpa(line['page']):#x}"] if line["page"] else []
    words += [f"level={line['level'] or 0}"] if line["page"] and line["level"] != "-" else []
    words += [f"page={_struct_page(line['host']):#x}"] if line["host"] else []
    return " ".join(words)


def _gpa(page: str) -> int:
    return 0x1_0000_0000 + int(page, 0) * 4096


def _struct_page(page: str) -> int:
    return 0xFFD4_0000_0000_0000 + int(page, 0) * 64


def _status(line: re.Match[str]) -> int:
    letter = STATUS.get(line["status"])
    return int(line["status"], 0) if letter is None else letter
