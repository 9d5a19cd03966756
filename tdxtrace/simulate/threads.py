"""Threads of the host: who makes the calls, where, and by which clock."""

from __future__ import annotations


class Thread:
    """One task as the kernel's tools name it, with the CPU it is on and its own time.

    ``now`` runs ahead of the simulation's clock between two places where the thread
    meets others: the time it spends alone is added up and waited for in one go.
    """

    __slots__ = ("comm", "cpu", "now", "number", "tgid", "tid")

    def __init__(self, number: int, tid: int, tgid: int, comm: str) -> None:
        self.number = number
        self.tid = tid
        self.tgid = tgid
        self.comm = comm
        self.cpu = 0
        self.now = 0
