"""What is kept of a leaf and of a vCPU while watching."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

# Attempts from here on are counted together: beyond what any recommendation needs.
MOST_ATTEMPTS: Final = 1024


@dataclass(slots=True)
class Leaf:
    """One leaf's requests."""

    n_requests: int = 0
    n_calls: int = 0
    n_busy: int = 0
    n_retried: int = 0
    max_attempts: int = 0
    max_ns: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    """Requests by the attempts they took, MOST_ATTEMPTS meaning that or more."""

    def quantile(self, share: float) -> int:
        """Attempts that were enough for this share of the requests; 0 without requests."""
        left = share * self.n_requests
        for attempts in sorted(self.attempts):
            left -= self.attempts[attempts]
            if left <= 0:
                return attempts
        return self.max_attempts

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "requests": self.n_requests,
            "seamcalls": self.n_calls,
            "busy": self.n_busy,
            "retried": self.n_retried,
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "max_attempts": self.max_attempts,
            "max_ns": self.max_ns,
            "outcomes": dict(self.outcomes),
        }


@dataclass(slots=True)
class Vcpu:
    """One thread's entries."""

    n_refused: int = 0
    """TDH.VP.ENTER answered BUSY with operand SEPT: zero-step mitigation."""
    episodes: int = 0
    """Runs of refused entries."""
    n_failed: int = 0
    """kvm_exit with reason -1: zero-step mitigation, a TRACK, or another error."""
    is_refused: bool = False

    def to_dict(self) -> dict[str, int]:
        """The same as plain data."""
        return {"refused": self.n_refused, "episodes": self.episodes, "failed": self.n_failed}
