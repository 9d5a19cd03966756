"""Conflicts between all pairs of calls, against a table made from the source.

The table is not derived from ``generations``: it was made by reading the module's leaves,
one pair at a time.  Row: the call that tries.  Column: the call in flight on another
processor, same TD.  Number: operand id in RAX; ``g``: only on the same SEPT entry; ``v``:
only on the same vCPU; ``.``: no collision.  E: TDH.VP.ENTER before the guest runs, E*: with
the zero-step gate armed, RUN: guest running, SRD: SEPT.RD, MNG: any TDR-exclusive MNG
leaf, MNR: MNG.RD, EXT: EXPORT.TRACK, EXM: EXPORT.MEM (its entry conflicts are reported in
a list, here as operand 1), ACC: the guest's PAGE.ACCEPT or ATTR.
"""

import itertools

import pytest

from tdxtrace.simulate.module.abi import HIGH_HALF, NL_MAPPED, OPERAND_BUSY, SUCCESS
from tdxtrace.simulate.module.dispatcher import Module
from tdxtrace.simulate.module.generations import ACCEPT, ARMED, GENERATIONS
from tdxtrace.simulate.module.state import Call, Td, Vcpu

MATRIX_B = """\
-     E  E* RUN AUG SAD REM DEM REL SRD PRO BLK UNB SRM TRK PAD MNG MNR VFL VIN VRD EXT EXM ACC
E     .   .   .   .   .   .   .   .   .   .   .   .   . 169 128 128   .  1v  1v   . 172   .   .
E*    . 146   . 146 146 146 146 146 146 146 146 146 146 169 128 128   .  1v  1v   . 172 146   .
AUG   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172  1g  1g
SAD   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172  1g  1g
REM   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172  1g  1g
DEM   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172  1g  1g
REL   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172  1g  1g
SRD   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172  1g  1g
PRO   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172  1g  1g
BLK   . 146   . 146 146 146 146 146 146 146 146 146 146   .   2   2   .   .   .   . 172 146  1g
UNB   . 146   . 146 146 146 146 146 146 146 146 146 146   .   2   2   .   .   .   . 172 146  1g
SRM   . 146   . 146 146 146 146 146 146 146 146 146 146   .   2   2   .   .   .   . 172 146  1g
TRK 169 169   .   .   .   .   .   .   .   .   .   .   . 169   1   1   .   .   .   . 172   .   .
PAD   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   2   .
MNG   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   1   .
MNR   .   .   .   .   .   .   .   .   .   .   .   .   .   .   1   1   .   .   .   . 172   .   .
VFL  1v  1v  1v   .   .   .   .   .   .   .   .   .   .   . 128 128   .  1v  1v  1v   .   .   .
VIN  1v  1v  1v   .   .   .   .   .   .   .   .   .   .   . 128 128   .  1v  1v  1v 172   .   .
VRD   .   .   .   .   .   .   .   .   .   .   .   .   .   . 128 128   .  1v  1v   . 172   .   .
EXT 172 172   . 172 172 172 172 172 172 172 172 172 172 172   1   1 172   . 172 172 172 172   .
EXM   . 146   .  1g  1g  1g  1g  1g  1g  1g 146 146 146   .   2   2   .   .   .   . 172 171  1g
ACC   .   .   .  1g  1g  1g  1g  1g  1g  1g  1g  1g  1g   .   .   .   .   .   .   .   .  1g  1g
"""
LEAVES = {
    "AUG": "TDH.MEM.PAGE.AUG",
    "SAD": "TDH.MEM.SEPT.ADD",
    "REM": "TDH.MEM.PAGE.REMOVE",
    "DEM": "TDH.MEM.PAGE.DEMOTE",
    "REL": "TDH.MEM.PAGE.RELOCATE",
    "SRD": "TDH.MEM.SEPT.RD",
    "PRO": "TDH.MEM.PAGE.PROMOTE",
    "BLK": "TDH.MEM.RANGE.BLOCK",
    "UNB": "TDH.MEM.RANGE.UNBLOCK",
    "SRM": "TDH.MEM.SEPT.REMOVE",
    "TRK": "TDH.MEM.TRACK",
    "PAD": "TDH.MEM.PAGE.ADD",
    "MNG": "TDH.MNG.INIT",
    "MNR": "TDH.MNG.RD",
    "VFL": "TDH.VP.FLUSH",
    "VIN": "TDH.VP.INIT",
    "VRD": "TDH.VP.RD",
    "EXT": "TDH.EXPORT.TRACK",
    "EXM": "TDH.EXPORT.MEM",
    "ACC": ACCEPT,
}
ENTERING = ("E", "E*", "RUN")
MODIFYING = ("AUG", "SAD", "REM", "DEM", "REL", "PRO", "BLK", "UNB", "SRM")
GPA, LEVEL_2M = 0x4000_0000, 1


def _cells() -> dict[tuple[str, str], str]:
    head, *rows = MATRIX_B.splitlines()
    return {
        (row.split()[0], column): cell
        for row in rows
        for column, cell in zip(head.split()[1:], row.split()[1:], strict=True)
    }


MATRIX = {"B": _cells(), "C": _cells()}
_SHARERS = ("AUG", "SAD", "REM", "DEM", "REL", "SRD", "EXM")
for other in (*_SHARERS, "E*"):
    MATRIX["C"]["E*", other] = MATRIX["C"][other, "E*"] = "."
for other in (*_SHARERS, "PRO"):
    MATRIX["C"]["PRO", other] = MATRIX["C"][other, "PRO"] = "146"


class World:
    """One TD with two vCPUs, and two SEPT entries of which a pair shares one or not."""

    def __init__(self, generation: str) -> None:
        kind = GENERATIONS[generation]
        self.module = Module(kind)
        self.td = Td(kind)
        self.vcpus = [Vcpu(self.td, number, kind) for number in range(2)]
        for level in (2, 3):
            self.td.sept.entry(GPA, level).state = NL_MAPPED
        for side in range(2):
            gpa = GPA + (side << 21)
            self.td.sept.entry(gpa, LEVEL_2M).page = (5 + side) << 30
            self.td.sept.entry(gpa, 0).page = (7 + side) << 30

    def call(self, name: str, side: int, same: bool) -> tuple[int, Call]:
        """Try the locks of a call for side 0 or 1, on the same vCPU and entry or not."""
        # Two entries of one vCPU are refused by its state, not its lock: use two vCPUs.
        vcpu = self.vcpus[0 if same else side]
        leaf = "TDH.VP.ENTER" if name in ENTERING else LEAVES[name]
        call = Call(leaf, td=self.td, vcpu=vcpu, guest=name == "ACC")
        call.gpa = GPA + (0 if same else side << 21)
        call.level, call.page = LEVEL_2M, (1 + side) << 30
        sequence = self.module.generation.lock_sequences[leaf]
        if name == "RUN":
            sequence = sequence[:2]
        if name == "E*":
            sequence += self.module.generation.lock_sequences[ARMED]
        return self.module.acquire(call, sequence), call


def _answer(generation: str, attempt: str, holder: str, same: bool) -> int:
    """The operand id of the busy answer to the attempt; 0 if it succeeds."""
    world = World(generation)
    status, _ = world.call(holder, 0, same)
    assert status == SUCCESS
    status, call = world.call(attempt, 1, same)
    if status == SUCCESS:
        return 0
    assert status & HIGH_HALF == OPERAND_BUSY
    assert call.busy_reason is not None
    assert call.busy_reason.holders
    assert not call.locks_held
    return status & 0xFFFF


PAIRS = sorted(MATRIX["B"])


@pytest.mark.parametrize("generation", ["B", "C"])
@pytest.mark.parametrize(("attempt", "holder"), PAIRS)
def test_every_pair(generation: str, attempt: str, holder: str) -> None:
    cell = MATRIX[generation][attempt, holder]
    expected = int(cell.strip("gv")) if cell != "." else 0
    apart = 0 if cell.endswith(("g", "v")) else expected
    assert _answer(generation, attempt, holder, same=True) == expected
    assert _answer(generation, attempt, holder, same=False) == apart


@pytest.mark.parametrize(
    ("attempt", "holder"), [*itertools.product((*MODIFYING, "E*"), repeat=2), ("SRD", "AUG")]
)
def test_generation_a_has_one_lock_for_the_whole_tree(attempt: str, holder: str) -> None:
    assert _answer("A", attempt, holder, same=False) == 146
    assert _answer("A", attempt, holder, same=True) == 146


def test_generation_a_has_no_entry_locks() -> None:
    assert _answer("A", "SRD", "SRD", same=True) == 0
    assert _answer("A", "AUG", "ACC", same=True) == 0


def test_vp_init_v1_takes_the_tdr_exclusive() -> None:
    world = World("B")
    world.call("VRD", 0, same=False)
    sequence = world.module.generation.lock_sequences["TDH.VP.INIT v1"]
    second = Call("TDH.VP.INIT", td=world.td, vcpu=world.vcpus[1])
    assert world.module.acquire(second, sequence) == OPERAND_BUSY | 0x80
