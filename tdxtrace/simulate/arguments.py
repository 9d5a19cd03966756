"""What the arguments and registers of a call hold, as probes fetch them."""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate import names
from tdxtrace.simulate.state import Call

# 7.x passes a page frame number where 6.x passed a struct page.
_PFN_IN_7: Final = ("TDH.MEM.PAGE.ADD", "TDH.MEM.PAGE.AUG", "TDH.PHYMEM.PAGE.WBINVD")


def td_number(call: Call) -> int:
    """Which VM a call is about."""
    assert call.td is not None
    return call.td.number


class Words:
    """What the arguments and registers of a call hold."""

    def __init__(self, level_base: int) -> None:
        self._level_base = level_base

    def of(self, call: Call, arguments: tuple[str, ...]) -> tuple[int, ...]:
        """The arguments of the wrapper that made ``call``."""
        return tuple(self._argument(call, name) for name in arguments)

    def _argument(self, call: Call, name: str) -> int:
        if name == "td":
            return names.td_address(td_number(call))
        if name == "vp":
            assert call.vcpu is not None
            return names.vp_address(td_number(call), call.vcpu.number)
        if name == "page":
            as_pfn = self._level_base and call.leaf in _PFN_IN_7
            return call.page >> 12 if as_pfn else names.struct_page(call.page)
        if name == "level":
            return call.level + self._level_base
        return call.gpa if name == "gpa" else call.operand

    def registers(self, call: Call) -> tuple[int, int, int]:
        """RCX, RDX and R8 as the kernel loads them."""
        tdr = names.control_page(td_number(call)) if call.td is not None else 0
        if call.leaf.startswith("TDH.MEM.") and call.leaf != "TDH.MEM.TRACK":
            return call.gpa | call.level, tdr, call.page
        if call.leaf == "TDH.MR.EXTEND":
            return call.gpa, tdr, 0
        if call.leaf.startswith("TDH.PHYMEM."):
            return call.page or call.operand, 0, 0
        if call.leaf.startswith("TDH.VP."):
            return self._vp_registers(call, tdr)
        if call.leaf == "TDH.MNG.ADDCX":
            return call.page, tdr, 0
        return tdr, call.operand if call.leaf == "TDH.MNG.CREATE" else 0, 0

    def _vp_registers(self, call: Call, tdr: int) -> tuple[int, int, int]:
        assert call.vcpu is not None
        tdvpr = names.control_page(td_number(call), call.vcpu.number)
        if call.leaf == "TDH.VP.ADDCX":
            return call.page, tdvpr, 0
        return tdvpr, tdr if call.leaf == "TDH.VP.CREATE" else 0, 0
