"""Threads of the host: who makes the calls, where, and by which clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdxtrace.simulate.draws import Draws

if TYPE_CHECKING:
    from tdxtrace.simulate.journal import Request


class Thread:
    """One task as the kernel's tools name it, with the CPU it is on and its own time.

    ``now`` runs ahead of the simulation's clock between two places where the thread
    meets others: the time it spends alone is added up and waited for in one go.
    """

    __slots__ = (
        "comm",
        "cpu",
        "draws",
        "n_calls",
        "n_entries",
        "now",
        "parked",
        "pending",
        "tgid",
        "tid",
    )

    def __init__(self, tid: int, tgid: int, comm: str, draws: Draws) -> None:
        self.draws = draws
        self.tid = tid
        self.tgid = tgid
        self.comm = comm
        self.cpu = 0
        self.now = 0
        # Calls made, and vCPU entries among them: what happened between two attempts.
        self.n_calls = 0
        self.n_entries = 0
        # Where an interrupt handler may run on its processor: it waits for something.
        self.parked = False
        # A request of this thread that was answered busy and is not settled yet.
        self.pending: Request | None = None
