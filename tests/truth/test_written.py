"""Small traces of innocent hosts and guests, and similar ones of guilty ones.

Each was written from the rules of the module and of KVM, not from the code.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from support.written import written

import tdxtrace
from tdxtrace.analysis.causes import broken_rules, kicks, mmu_lock, td_building
from tdxtrace.tables.causes import BUG_RULES
from tdxtrace.tables.trace import Findings

# A TD is built and runs: pages 0, 1 and 9, of which 9 is removed again; two vCPUs.
BUILT = """
1000-1002 91@0 sept:0^3 S
1005-1007 91@0 sept:0^2 S
1010-1012 91@0 sept:0^1 S
1015-1017 91@0 aug:0 S
1020-1022 91@0 aug:1 S
1025-1027 91@0 aug:9 S
1030-1032 91@0 block:9 S
1034-1036 91@0 track S
1038-1040 91@0 remove:9 S
1050-1053 101@1 enter 0x4d
1055-1058 102@2 enter 0x4d
"""
WITHOUT_ENTRIES = "\n".join(line for line in BUILT.splitlines() if "enter" not in line)


def faults(first: int, n: int, page: str) -> str:
    """Entries of vCPU 101 that end in a fault on a page, 10 us apart."""
    return "\n".join(
        f"{at}-{at + 3} 101@1 enter 0x30\n{at + 4} 101@1 ?{page}"
        for at in range(first, first + 10 * n, 10)
    )


def rounds(n: int, body: str, page: str = "0") -> str:
    """BLOCK, TRACK, seven faults; then calls at times from 100 us on; every 400 us."""
    parts = []
    for start in range(2000, 2000 + 400 * n, 400):
        parts.append(f"{start}-{start + 2} 201@4 block:{page} S")
        parts.append(f"{start + 4}-{start + 6} 201@4 track S")
        parts.append(faults(start + 10, 7, page.partition("^")[0]))
        for line in filter(None, body.splitlines()):
            times, rest = line.split(" ", 1)
            first, last = times.split("-")
            parts.append(f"{start + int(first)}-{start + int(last)} {rest}")
    return "\n".join(parts)


# Refused while the range is given back, and in the guest afterwards.
REFUSED = "102-104 101@1 enter B\n120-180 101@1 enter 0xc\n"

OTHER = "\n".join(
    line.replace("91@0", "92@8#2").replace("101@1", "301@9#2").replace("102@2", "302@10#2")
    for line in BUILT.strip().splitlines()
)
KVM_FAULTS = "\n".join(
    f"{at} 103@3 >\n{at + 6} 103@3 <EPT_VIOLATION:2\n{at + 8} 103@3 ?5"
    for at in range(2010, 2250, 20)
)

INNOCENT = {
    "a loop of tries of which the recording shows two, beside a timer": """
        2000-2100 101@1 enter 0x1
        2005-2007 201@4 block:0 B
        2110-2112 201@4 block:0 B""",
    "two tries, and another thread does it": """
        2000-2100 101@1 enter 0x1
        2005-2007 201@4 block:0 K
        2110-2112 201@4 block:0 K
        2120-2122 202@5 block:0 S
        9000-9002 202@5 track S""",
    "an AUG that an armed entry made busy, before a BLOCK by a clock that is behind": f"""
        2000-2003 102@2 enter 0x4d
        {faults(2010, 7, "7")}
        2103-2105 202@5 aug:7 B
        2100-2108 201@4 block:0 S
        2114-2118 101@1 enter 0x30
        2119-2120 101@1 enter B
        2120-2122 202@5 aug:7 S""",
    "a guest accepts a page while it is blocked": """
        2000-2100 101@1 enter 0x1
        2005-2007 201@4 block:0 K
        2110-2112 201@4 block:0 S
        2114-2116 201@4 track S
        2118-2120 201@4 remove:0 S""",
    "a vCPU moves to another CPU": """
        2000-2010 101@1 enter 0x1
        2020-2022 300@1 flush:101 S
        2030-2040 101@3 enter 0x1""",
    "entries beside a TRACK": """
        2000-2006 201@4 track S
        2002-2004 101@1 enter D
        2003-2005 102@2 enter D
        2006-2050 101@1 enter 0xc""",
    "a timeout, and an event was lost before it": """
        2005-1500000 102@2 enter Z
        2010-2012 202@5 block:0 K
        9000 @5 lost
        1500010-1500020 102@2 enter 0xc""",
    "a timeout, and a call that failed took the entry before it": """
        2005-32000 102@2 enter Z
        2010-2012 202@5 block:0 K
        2020-2022 203@6 aug:0 0xc0000b0600000001
        32010-32020 102@2 enter 0xc""",
    "a timeout of the TD that has the address of one that ended": """
        2005-2040 102@2 enter 0x1
        2010-2012 202@5 block:0 K
        5000-5002 91@0 init S
        6000-6002 91@0 finalize S
        7000-1600000 702@2 enter Z
        1600010-1600020 702@2 enter 0xc""",
    "a BLOCK that another thread made of the range around the page": """
        2000-2002 201@4 block:0 B
        2010-2012 202@5 block:0^1 S
        2020-2022 202@5 remove:0 T
        2030-2032 202@5 track S
        2034-2036 202@5 remove:0 S""",
    "a BLOCK that was tried again, which was not recorded": """
        2000-2002 201@4 block:0 B
        2005- 201@4 block:0
        2020-2022 201@4 remove:0 T""",
    "a table and a page at one address": """
        2000-2006 202@5 sept:0x200^1 S
        2002-2004 101@1 aug:0x200 K
        2010-2012 101@1 aug:0x200 S""",
    "an AUG beside a guest that accepts": """
        2000-2050 102@2 enter 0x1
        2010-2012 101@1 aug:7 K
        2020-2022 101@1 aug:7 S""",
    "AUGs of one page that touch": """
        2000-2004 202@5 aug:7 S
        2004-2006 101@1 aug:7 K
        2010-2012 101@1 aug:7 S""",
    "vCPUs that fault on pages which are being removed": f"""
        {faults(2001, 9, "20")}
        2000-2004 201@4 block:20 S
        2006-2010 201@4 track S
        2091-2094 101@1 enter B
        2090-2096 201@4 block:21 S
        2098-2100 201@4 remove:20 S
        2110-2150 101@1 enter 0xc""",
    "a host that fails to split a range, five times": rounds(
        5, "96-99 201@4 demote:0x200^1 J\n101-105 201@4 unblock:0x200^1 S\n" + REFUSED, "0x200^1"
    ),
    "probes of AUG that were switched off within one": """
        2000- 202@5 aug:7
        2010-2012 201@4 block:0 S
        -2030 202@5 aug:7 S
        2040-2042 202@5 aug:8 S""",
    "a host that fails to block the next page and takes all back, four times": rounds(
        4, "96-98 201@4 block:1 K\n101-105 201@4 unblock:0 S\n" + REFUSED
    ),
    "a page that is unblocked for the vCPU that faulted on it": "\n".join(
        f"""{at}-{at + 2} 201@4 block:0 S
        {at + 4}-{at + 6} 201@4 track S
        {at + 10}-{at + 13} 101@1 enter 0x30
        {at + 14} 101@1 ?0
        {at + 16}-{at + 18} 101@1 unblock:0 S
        {at + 30}-{at + 80} 101@1 enter 0xc"""
        for at in range(2000, 4400, 400)
    ),
    "a busy AUG that another vCPU did, and a timeout later": """
        1990-1500000 102@2 enter Z
        2010-2012 101@1 aug:7 K
        2020-2022 203@3 aug:7 S
        1500010-1500020 102@2 enter 0xc""",
    "a timeout of another TD": f"""
        {OTHER}
        1990-1500000 302@10#2 enter Z
        2010-2012 201@4 block:0 K""",
    "a BLOCK of another TD": f"""
        {OTHER}
        2000-2020 401@11#2 block:7 S
        2005-2007 202@5 aug:7 B
        2030-2032 202@5 aug:7 S""",
    "a VM that is stopped after two tries, and goes on": """
        2000-2020 101@1 enter 0x1
        2005-2007 201@4 block:0 K
        2030-2032 201@4 block:0 K
        900000-900010 101@1 enter 0xc
        900020-900022 201@4 block:0 S""",
    "an AUG after a REMOVE, by a clock that is behind": """
        2000-2004 201@4 block:0 S
        2006-2008 201@4 track S
        2010-2014 201@4 remove:0 S
        2011-2013 101@1 aug:0 K
        2020-2022 101@1 aug:0 S""",
    "twelve faults and three failed entries under KVM's events": f"""
        2000 103@3 >
        2003 103@3 <HLT
        {KVM_FAULTS}
        2300 103@3 >
        2301 103@3 <FAILED
        2310 103@3 >
        2311 103@3 <FAILED
        2400 103@3 >
        2450 103@3 <HLT""",
    "a page that another TD's reclaim holds": """
        2000-2002 91@0 reclaim:7 K
        2010-2012 91@0 reclaim:7 S""",
    "a page that is to become a vCPU": """
        2000-2002 91@0 vpcreate K
        2010-2012 91@0 vpcreate S""",
    "a TD whose FINALIZE was not probed": """
        2000-2002 91@0 init S
        9000-9002 101@1 sept:0x400^1 B
        9010-9012 101@1 sept:0x400^1 S
        9020-9022 101@1 aug:0x400 S""",
    "a vCPU that entered after the TRACK before": """
        2000-2003 201@4 track S
        2003-2400 101@1 enter 0xc
        2300-2302 201@4 track P""",
    "an update of the module": """
        2000-2002 101@1 aug:7 Y
        2010-2012 201@4 block:0 Y
        2020-2022 201@4 track Y
        2050-2052 101@1 aug:7 S""",
}
GUILTY = {
    "a BLOCK beside an AUG": (
        "mmu_lock_excludes",
        "2000-2020 201@4 block:0 S\n2005-2007 202@5 aug:7 B\n2030-2032 202@5 aug:7 S",
    ),
    "a BLOCK that is busy with every vCPU kicked out": (
        "busy_after_kick",
        "2000-2020 101@1 enter 0x1\n2001-2021 102@2 enter 0x1\n2005-2007 201@4 block:0 B\n"
        "2030-2032 201@4 block:0 B\n90000-90002 300@1 flush:101 S\n90020-90022 91@0 reclaim:7 S",
    ),
    "two TRACKs with a vCPU inside": (
        "track_without_kick",
        "2000-2400 101@1 enter 0xc\n2100-2103 201@4 track S\n2300-2302 201@4 track P",
    ),
    "a table that is busy while the TD is built": (
        "busy_before_finalize",
        "5000-5001 92@0#2 create S\n5003-5004 92@0#2 init S\n5005-5007 92@0#2 sept:0^3 S\n"
        "5014-5018 92@0#2 sept:0x40000^2 S\n5015-5017 95@3#2 sept:0^2 B\n"
        "6000-6002 92@0#2 finalize S",
    ),
    "two AUGs of one page": (
        "aug_busy_on_entry",
        "2000-2010 202@5 aug:7 S\n2003-2005 101@1 aug:7 K\n2020-2022 101@1 aug:7 S",
    ),
    "a busy BLOCK that was dropped": (
        "dropped_block",
        "2000-2002 201@4 block:0 B\n2004-2006 201@4 track S\n2008-2010 201@4 remove:0 T",
    ),
    "a page that is added beside a running vCPU": (
        "tdr_busy",
        "2000-2100 101@1 enter 0xc\n2010-2012 201@4 add:64 R",
    ),
    "a vCPU that is flushed while it runs": (
        "tdvpr_busy",
        "2000-2100 101@1 enter 0xc\n2010-2012 201@4 flush:101 K",
    ),
    # The thread makes no other call: what it did later does not matter.
    "an entry that is left busy until the guest's calls time out": (
        "entry_left_busy",
        "2005-1600000 102@2 enter Z\n2010-2012 202@5 block:0 K\n1600010-1600020 102@2 enter 0xc",
    ),
    "a page that is blocked and given back, with a vCPU kept out until then": (
        "blocked_for_nothing",
        rounds(5, "101-105 201@4 unblock:0 S\n" + REFUSED),
    ),
}


# The innocent traces nearest to each rule that accuses.
NEAREST = {
    "tdr_busy": ["a page that another TD's reclaim holds"],
    "tdvpr_busy": ["a page that is to become a vCPU", "a vCPU moves to another CPU"],
    "busy_before_finalize": ["a TD whose FINALIZE was not probed"],
    "busy_after_kick": [
        "a loop of tries of which the recording shows two, beside a timer",
        "a VM that is stopped after two tries, and goes on",
    ],
    "track_without_kick": ["a vCPU that entered after the TRACK before"],
    "aug_busy_on_entry": ["a table and a page at one address", "AUGs of one page that touch"],
    "dropped_block": ["a BLOCK that another thread made of the range around the page"],
    "mmu_lock_excludes": [
        "a BLOCK of another TD",
        "an AUG that an armed entry made busy, before a BLOCK by a clock that is behind",
    ],
    "entry_left_busy": ["a timeout, and a call that failed took the entry before it"],
    "blocked_for_nothing": ["a host that fails to split a range, five times"],
}


def found(text: str, folder: Path, before: str = BUILT) -> Findings:
    path = folder / "trace.txt"
    path.write_text(written(f"{before}\n{text}"))
    return tdxtrace.analyze(tdxtrace.read_trace(path))


def accused(findings: Findings) -> list[str]:
    """Rules of the accusations: verdicts, and broken rules that are sure."""
    verdicts = findings.verdicts.filter(pl.col("verdict").is_in(["BUG", "HOSTILE"]))
    sure = findings.broken_rules.filter(pl.col("confidence") != "weak")
    return [*verdicts["rule"], *sure["rule"]]


@pytest.mark.parametrize("name", INNOCENT)
def test_nobody_innocent_is_accused(name: str, tmp_path: Path) -> None:
    assert accused(found(INNOCENT[name], tmp_path)) == []


@pytest.mark.parametrize("name", GUILTY)
def test_nobody_guilty_is_cleared(name: str, tmp_path: Path) -> None:
    rule, text = GUILTY[name]
    assert rule in accused(found(text, tmp_path))


def test_every_rule_that_accuses_has_a_guilty_and_an_innocent_trace() -> None:
    accusing = {*BUG_RULES, "entry_left_busy", "blocked_for_nothing"}
    assert set(NEAREST) == accusing
    assert {name for names in NEAREST.values() for name in names} <= set(INNOCENT)
    assert {rule for rule, _ in GUILTY.values()} == accusing


@pytest.mark.parametrize("rule", BUG_RULES)
def test_the_docstring_of_a_rule_names_evidence_absence_and_innocence(rule: str) -> None:
    homes = broken_rules, kicks, mmu_lock, td_building
    (function,) = {getattr(home, rule) for home in homes if hasattr(home, rule)}
    text = function.__doc__.lower()
    assert all(word in text for word in ("evidence", "absence", "nearest innocent trace: "))


def test_an_aug_beside_a_block_is_no_bug_where_no_entry_was_recorded(tmp_path: Path) -> None:
    """An armed entry may have made the AUG busy, and the BLOCK's CPU has a clock of its own."""
    _, text = GUILTY["a BLOCK beside an AUG"]
    assert accused(found(text, tmp_path, WITHOUT_ENTRIES)) == []


@pytest.mark.parametrize(("first", "strength"), [(2295, "weak"), (2305, "weak"), (9000, "strong")])
def test_a_track_by_another_clock_may_have_failed_an_entry(
    first: int, strength: str, tmp_path: Path
) -> None:
    """It ended, or began, some microseconds from the entry, which 12 faults preceded."""
    text = f"""
        2000 103@3 >
        2003 103@3 <HLT
        {KVM_FAULTS}
        2300 103@3 >
        2301 103@3 <FAILED
        2400 103@3 >
        2450 103@3 <HLT
        {first}-{first + 4} 201@4 track S"""
    steps = found(text, tmp_path, WITHOUT_ENTRIES.replace("1034-1036 91@0 track S", "")).zero_steps
    assert steps.select("form", "strength").rows() == [("failed_vmentry", strength)]


def test_a_recording_that_ends_after_two_tries_leaves_it_undecided(tmp_path: Path) -> None:
    _, text = GUILTY["a BLOCK that is busy with every vCPU kicked out"]
    cut = "\n".join(text.splitlines()[:4])
    findings = found(cut, tmp_path)
    assert accused(findings) == []
    assert findings.broken_rules.select("rule", "confidence").rows() == [
        ("busy_after_kick", "weak")
    ]


def test_a_level_that_was_not_recorded_makes_the_holder_of_an_entry_unsure(tmp_path: Path) -> None:
    """The table above the page and the page have one address, and are two entries."""
    text = "2000-2006 202@5 sept:0x200^- S\n2002-2004 101@1 aug:0x200^- K"
    (row,) = found(text, tmp_path).busy_causes.filter(rank=1).to_dicts()
    assert (row["cause"], row["confidence"]) == ("host_conflict", "weak")
