"""The true cause of a zero-step episode: the reason of the faults that armed the gate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from tdxtrace.simulate.journal import Actor, CountedFault, Episode
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import STEPPING_EPF_THRESHOLD

# Workers that block a page and unblock it unchanged, for any purpose.
_CHURNING: Final = frozenset({"churn_blocks", "churn_sizes", "watch_page"})
_NAMES: Final = (
    "memory_fault",
    "refused",
    "churned",
    "invalidated",
    "raced",
    "left_loop",
    "pending",
    "served",
    "other",
)
# Cause of a fault on a page that was neither blocked nor pending, by KVM's handling of it.
_BY_HANDLING: Final = {
    "memory_fault": "memory_fault",
    "refused": "refused",
    "invalidating": "invalidated",
    "frozen": "raced",
    "busy": "left_loop",
    "served": "served",
    # Another thread had installed the page before this fault was served.
    "spurious": "served",
}


def true_step_cause(
    episode: Episode, actors: Mapping[tuple[int, str], Actor]
) -> tuple[str, int, *tuple[int, ...], int | None, bool]:
    """Determine the cause of an episode from the faults at its RIP up to the arming.

    The cause of a fault is the reason why the guest could not access the page: a block in force
    (churned or invalidated, depending on the worker), else a page that waits for ACCEPT, else
    KVM's handling of the fault.  The cause of the episode is that of more than half of the faults.

    Args:
        episode: The episode.
        actors: The actors of the run, by thread and side.

    Returns:
        The columns of ``truth_zero_steps`` from ``cause`` on.
    """
    faults = episode.faults[: STEPPING_EPF_THRESHOLD + 1]
    causes = Counter(_cause_of(fault, actors) for fault in faults)
    most, n = max(causes.items(), key=lambda item: item[1])
    blockers = Counter(
        fault.blocked_by.thread.tid
        for fault in faults
        if _is_blocked(fault) and fault.blocked_by is not None and fault.blocked_by.thread
    )
    blocker = blockers.most_common(1)[0][0] if blockers else None
    n_attacked = sum(_is_attack(episode, fault, actors) for fault in faults)
    return (
        most if 2 * n > len(faults) else "mixed",
        len({fault.gpa for fault in faults}),
        *(causes[name] for name in _NAMES),
        blocker,
        2 * n_attacked > len(faults),
    )


def _is_blocked(fault: CountedFault) -> bool:
    return fault.state in (abi.BLOCKED, abi.PENDING_BLOCKED, abi.NL_BLOCKED)


def _cause_of(fault: CountedFault, actors: Mapping[tuple[int, str], Actor]) -> str:
    if fault.handling == "memory_fault":
        return "memory_fault"
    if _is_blocked(fault):
        thread = fault.blocked_by.thread if fault.blocked_by is not None else None
        by = actors.get((thread.tid, "host")) if thread is not None else None
        return "churned" if by is not None and by.kind in _CHURNING else "invalidated"
    if fault.state == abi.PENDING and fault.handling != "served":
        return "pending"
    return _BY_HANDLING.get(fault.handling, "other")


def _is_attack(
    episode: Episode, fault: CountedFault, actors: Mapping[tuple[int, str], Actor]
) -> bool:
    """Return whether a hostile actor blocked the page of a fault, or did not handle the fault."""
    own = actors.get((episode.thread.tid, "host"))
    if fault.handling == "refused" and own is not None:
        return own.conduct == "hostile"
    thread = fault.blocked_by.thread if fault.blocked_by is not None else None
    by = actors.get((thread.tid, "host")) if thread is not None else None
    return _is_blocked(fault) and by is not None and by.conduct == "hostile"
