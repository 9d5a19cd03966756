"""Target of a limit: the ratio of requests that may exceed it, and the confidence."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Final

from tdxtrace.errors import QueryError
from tdxtrace.tables.text import one_line

_YEAR_S: Final = 365.25 * 86_400.0
_PERIODS: Final = {
    "hour": 3_600.0,
    "day": 86_400.0,
    "week": 7 * 86_400.0,
    "month": _YEAR_S / 12,
    "year": _YEAR_S,
}
_NUMBER: Final = r"\d[\d,]*(?:\.\d+)?"
_RATE: Final = re.compile(
    rf"(?<![\d,])(?P<n>{_NUMBER})(?:\s+(?P<what>[a-z]+))?\s+(?P<per>[a-z]+)(?:\s+(?P<many>{_NUMBER}))?"
    rf"\s+(?:(?P<whose>[a-z]+)-)?(?P<period>[a-z]+)(?:\s+of\s+(?P<gb>{_NUMBER})\s*(?P<unit>[a-z]+))?",
    re.IGNORECASE,
)
# Allowed words of a rate by position; the first one is the default suggestion.
_WORDS: Final = {
    "what": ("vm", "vms"),
    "per": ("per", "in"),
    "whose": ("host", "vm"),
    "period": (*_PERIODS, "boot"),
    "unit": ("gb", "gib"),
}
_EXAMPLES: Final = '"1 VM per year", "1 per 1000 VM-hours" or "1 in 1000 boots"'

# A boot maps all memory of a VM in pages of 4 KB, with one TDH.MEM.PAGE.AUG each, if the kernel
# maps no larger pages (Linux 6.16 arch/x86/kvm/vmx/tdx.c tdx_sept_set_private_spte: only
# PG_LEVEL_4K). 4 GB is chosen by the project: a common guest, though no hypervisor's default.
BOOT_GB: Final = 4.0
_PAGES_PER_GB: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Rate:
    """Rate of requests that may need more than their limit, per time or per boot."""

    allowed: float
    """Per second of a host or a VM, or per boot."""
    of: str = "host"
    """``host``, ``vm`` or ``boot``."""
    boot_gb: float = BOOT_GB
    """Memory of the VM that boots, in GB of 2^30 bytes."""
    counts_vms: bool = False
    """Whether lost VMs are counted instead of requests."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """Recorded time and pages, by which a rate is converted to a ratio of requests."""

    host_s: float | None
    """Recorded time of all hosts in s; None: the unit of the clock is unknown."""
    vm_s: float | None
    """Sum over TDs of the time from first to last request, in s; None: as above, or no TD known."""
    n_pages: int
    """Pages of 4 KB that were added to running TDs."""

    def of(self, rate: Rate) -> float | None:
        """Return the denominator of a rate: seconds or number of boots; None if unknown."""
        if rate.of == "boot":
            return self.n_pages / (rate.boot_gb * _PAGES_PER_GB) or None
        return (self.vm_s if rate.of == "vm" else self.host_s) or None

    def why_unknown(self, rate: Rate) -> str:
        """Return why :meth:`of` is None."""
        if rate.of == "boot":
            return "number of boots unknown: no TDH.MEM.PAGE.AUG was recorded"
        if self.host_s is not None and rate.of == "vm":
            return "time of VMs unknown: no TD was identified"
        return "length of the recording unknown: the clock has no unit"


@dataclass(frozen=True, slots=True)
class Target:
    """Ratio of requests that may need more than the limit, and its confidence.

    The defaults, 1e-6 and 95 %, are those of the project's task; the list agreed on none.
    """

    ratio: float = 1e-6
    confidence: float = 0.95
    rate: Rate | None = None
    """Rate of requests of all leaves that may exceed their limit; replaces ``ratio``."""

    def __post_init__(self) -> None:
        """Validate the numbers.

        Raises:
            QueryError: If a number is not between 0 and 1.
        """
        if not 0 < self.ratio < 1:
            raise QueryError(
                f"--target {self.ratio:g} is not a ratio that a limit can keep; "
                "choose one above 0 and below 1, such as 1e-6"
            )
        if not 0.5 <= self.confidence < 1:
            raise QueryError(
                f"--confidence {self.confidence:g} is out of range; "
                "choose one from 0.5 to below 1, such as 0.95"
            )

    def for_leaf(self, n_requests: int, n_leaves: int, exposure: Exposure) -> float | None:
        """Return the ratio for a leaf; None for a rate whose denominator is unknown.

        A rate is divided evenly among the leaves: if each leaf keeps its part, all together keep
        the rate.
        """
        if self.rate is None:
            return self.ratio
        seen = exposure.of(self.rate)
        if seen is None:
            return None
        return min(self.rate.allowed / n_leaves * seen / n_requests, 0.5)

    def confidence_of_leaf(self, n_leaves: int) -> float:
        """Return the confidence that the limit of one leaf needs.

        A rate is kept if all leaves keep their parts, so the probability of failure is divided
        evenly among them (C. E. Bonferroni). A ratio applies to each leaf alone.
        """
        if self.rate is None:
            return self.confidence
        return 1 - (1 - self.confidence) / max(n_leaves, 1)


def parse_target(
    *, target: float | None = None, confidence: float = 0.95, at_most: str | None = None
) -> Target:
    """Parse the options for a target.

    Args:
        target: Ratio of requests that may need more than the limit; 1e-6 by default.
        confidence: Confidence of the limit.
        at_most: A rate such as "1 VM per year" or "1 in 1000 boots", instead of ``target``.

    Raises:
        QueryError: If both ``target`` and ``at_most`` are given, or one of them is malformed.
    """
    if target is not None and at_most is not None:
        raise QueryError("--target and --at-most exclude each other; choose one")
    rate = parse_rate(at_most) if at_most is not None else None
    return Target(1e-6 if target is None else target, confidence, rate)


def parse_rate(text: str) -> Rate:
    """Parse a rate such as "1 VM per year", "1 per 1000 VM-hours" or "1 in 1000 boots of 16 GB".

    A rate without a unit of "host-" or "VM-" is per host.

    Raises:
        QueryError: If the rate is malformed; the message suggests the nearest valid word.

    Example:
        >>> round(1 / parse_rate("1 VM per hour").allowed)
        3600
        >>> parse_rate("1 in 1000 boots")
        Rate(allowed=0.001, of='boot', boot_gb=4.0, counts_vms=False)
    """
    found = _RATE.fullmatch(text.strip())
    shown = one_line(text, 60)
    if found is None:
        raise QueryError(f"not a rate: {shown!r}; write it as in {_EXAMPLES}")
    words = {name: (found[name] or "").lower() for name in _WORDS}
    words["period"] = words["period"].removesuffix("s")
    for name, known in _WORDS.items():
        if found[name] is not None and words[name] not in known:
            nearest = difflib.get_close_matches(words[name], known, n=1, cutoff=0)[0]
            nearest = nearest.upper() if nearest in ("vm", "gb") else nearest
            raise QueryError(f"unknown word {words[name]!r} in {shown!r}; nearest: {nearest}")
    n, many, gb = (_number(found[name]) for name in ("n", "many", "gb"))
    is_boot = words["period"] == "boot"
    if (found["gb"] and not is_boot) or (found["whose"] and is_boot):
        raise QueryError(f"not a rate: {shown!r}; write it as in {_EXAMPLES}")
    if not all(value is None or 0 < value < math.inf for value in (n, many, gb)):
        raise QueryError(f"{shown!r} can never be kept; its numbers must be above 0 and finite")
    allowed = (n or 0.0) / (many or 1.0)
    counts_vms = bool(found["what"])
    if is_boot:
        return Rate(allowed, "boot", gb or BOOT_GB, counts_vms)
    return Rate(
        allowed / _PERIODS[words["period"]], words["whose"] or "host", counts_vms=counts_vms
    )


def _number(text: str | None) -> float | None:
    return None if text is None else float(text.replace(",", ""))
