"""Retry policies as data: those of KVM, past and present, and those proposed on the list."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from tdxtrace.errors import QueryError
from tdxtrace.tables.text import one_line
from tdxtrace.tables.times import parse_duration

# Statuses that a policy retries: only 0x8000020000000092, OPERAND_BUSY with any operand, or any
# retryable status.
ANSWERS: Final = ("sept", "busy", "any")
# Consequence when a policy stops: the VM dies, the caller gets an error, or the fault handler or
# the guest retries.
AT_LIMIT: Final = ("kill", "return", "again")
ANY_LEAF: Final = "*"

# Leaves wrapped by tdx_seamcall_sept() of the v1 series, which the mail's loop was to replace.
# [PATCH 09/21] and [PATCH 15/21], 2024-09-04, tdx_ops.h.
SEPT_LEAVES: Final = (
    "TDH.MEM.PAGE.ADD",
    "TDH.MEM.SEPT.ADD",
    "TDH.MEM.SEPT.REMOVE",
    "TDH.MEM.PAGE.AUG",
    "TDH.MEM.RANGE.BLOCK",
    "TDH.MEM.PAGE.REMOVE",
    "TDH.MEM.RANGE.UNBLOCK",
)
MAX_CALLS: Final = 2**32 - 1  # the mail's "max" is a u32


@dataclass(frozen=True, slots=True)
class DoublingLimit:
    """A limit that is multiplied when reached; at ``bug`` busy answers the VM dies.

    Exactly as in the mail (P. Bonzini, 2024-09-10), including its quirks:

    - the limit is one variable of the host, shared by all VMs, and never lowered;
    - it is read again at each busy answer and compared for equality, so a request that reaches a
      limit just raised by another CPU continues to the new limit without a warning;
    - the first busy answer is only counted: a limit of 1 is never reached;
    - the VM dies at ``bug`` busy answers only if the limit has exactly that value: doubled from
      10, it goes from 640 to 1280 and skips 1024; at ``bug`` the limit is not raised, so each
      later request that reaches it also kills its VM;
    - there is no delay and no time limit.
    """

    initial: int = 16
    factor: int = 2
    bug: int = 1024


@dataclass(frozen=True, slots=True)
class LeafPolicy:
    """Retry policy for one leaf; None means no limit."""

    calls: int | None = None
    budget_ns: int | None = None
    answers: str = "busy"
    then: str = "return"
    otherwise: str = "kill"
    """Consequence of a retryable status that is not among ``answers``."""
    kicks: bool = False
    doubling: DoublingLimit | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Rules by leaf; the rule of ANY_LEAF, if present, applies to leaves without their own."""

    name: str
    source: str
    rules: Mapping[str, LeafPolicy] = field(default_factory=dict)

    def rule(self, leaf: str | None) -> LeafPolicy | None:
        """Return the rule for a leaf; None if the policy does not cover it."""
        return self.rules.get(leaf or ANY_LEAF, self.rules.get(ANY_LEAF))


_ENDLESS: Final = LeafPolicy(answers="any")
_ONCE: Final = LeafPolicy(calls=1)
_ONCE_OR_DEAD: Final = LeafPolicy(calls=1, then="kill")
# One call, then all vCPUs are kicked out and held off, then one more call: 6.16
# tdx_no_vcpus_enter_start() in tdx_sept_zap_private_spte, tdx_track, tdx_sept_drop_private_spte;
# 6.19 tdh_do_no_vcpus(); then KVM_BUG_ON.
_KICK: Final = LeafPolicy(calls=2, then="kill", kicks=True)

MAINLINE: Final = RetryPolicy(
    "mainline",
    "Linux 6.16 and later, arch/x86/kvm/vmx/tdx.c and arch/x86/virt/vmx/tdx/tdx.c",
    {
        # -EBUSY, RET_PF_RETRY, and the loop in tdx_handle_ept_violation: unlimited.
        "TDH.MEM.PAGE.AUG": LeafPolicy(then="again"),
        "TDH.MEM.SEPT.ADD": LeafPolicy(then="again"),
        # EXIT_FASTPATH_EXIT_HANDLED, and vcpu_run enters again: unlimited.
        "TDH.VP.ENTER": LeafPolicy(then="again"),
        "TDH.MEM.RANGE.BLOCK": _KICK,
        "TDH.MEM.TRACK": _KICK,
        "TDH.MEM.PAGE.REMOVE": _KICK,
        "TDH.MEM.PAGE.DEMOTE": _KICK,  # RFC series only, tdh_do_no_vcpus()
        "TDH.MEM.PAGE.ADD": _ONCE,  # -EBUSY ends the ioctl
        "TDH.MR.EXTEND": _ONCE_OR_DEAD,  # any error: 6.19 TDX_BUG_ON_2
        "TDH.PHYMEM.PAGE.WBINVD": _ONCE_OR_DEAD,
        "TDH.VP.FLUSH": _ONCE_OR_DEAD,
        "TDH.MNG.KEY.CONFIG": _ONCE_OR_DEAD,
        # TDX_SEAMCALL_RETRIES in smp_func_do_phymem_cache_wb.
        "TDH.PHYMEM.CACHE.WB": LeafPolicy(calls=10_000, answers="any"),
        "TDH.SYS.DISABLE": _ENDLESS,
        ANY_LEAF: _ONCE,
    },
)
# SEAMCALL_RETRY_MAX is 16 and tested before the decrement: 17 calls, retried only after
# 0x8000020000000092.  Then PAGE.AUG and SEPT.ADD return -EAGAIN to the MMU; PAGE.REMOVE and TRACK
# are called in endless loops; a failing RANGE.BLOCK is a KVM_BUG_ON (R. Edgecombe, 2024-09-09).
V1_SERIES: Final = RetryPolicy(
    "v1-series",
    "[PATCH 09/21] KVM: TDX: Retry seamcall when TDX_OPERAND_BUSY with operand SEPT, 2024-09-04",
    {
        **dict.fromkeys(SEPT_LEAVES, LeafPolicy(calls=17, answers="sept")),
        "TDH.MEM.PAGE.AUG": LeafPolicy(calls=17, answers="sept", then="again"),
        "TDH.MEM.SEPT.ADD": LeafPolicy(calls=17, answers="sept", then="again"),
        "TDH.MEM.RANGE.BLOCK": LeafPolicy(calls=17, answers="sept", then="kill"),
        "TDH.MEM.PAGE.REMOVE": LeafPolicy(answers="sept"),
        "TDH.MEM.TRACK": LeafPolicy(),
        "TDH.PHYMEM.PAGE.WBINVD": LeafPolicy(),
        "TDH.VP.ENTER": LeafPolicy(then="again"),
    },
)
# The loop wraps the S-EPT calls; a busy TDH.VP.ENTER takes and drops mmu_lock and enters again,
# without a limit.  The sketch does not check the status: any failing call is repeated.
SEED_LOOP: Final = RetryPolicy(
    "seed-loop",
    "P. Bonzini, Re: [PATCH 09/21] KVM: TDX: Retry seamcall ..., 2024-09-10",
    {
        **dict.fromkeys(
            SEPT_LEAVES, LeafPolicy(answers="any", then="kill", doubling=DoublingLimit())
        ),
        "TDH.VP.ENTER": LeafPolicy(answers="any", then="again"),
    },
)
ENDLESS: Final = RetryPolicy(
    "endless",
    "TDH.MEM.TRACK of the v1 series, for every call (Yan Zhao, 2024-09-14)",
    {ANY_LEAF: _ENDLESS},
)
_NAMED: Final = {p.name: p for p in (SEED_LOOP, V1_SERIES, MAINLINE, ENDLESS)}
# 5: P. Bonzini, "just to be safe", September 2024.  16: the mail's first limit.  10000:
# TDX_SEAMCALL_RETRY_MAX of an out-of-tree kernel, after any recoverable error.  1 ms: about the
# longest time for which ``need_resched`` work is expected to hold a CPU (one tick at HZ=1000);
# chosen by the project.
DEFAULTS: Final = (
    *("seed-loop", "v1-series", "mainline", "fixed-5", "fixed-16", "fixed-10000"),
    *("budget-1ms", "endless"),
)
_PATTERNS: Final = ("fixed-N", "budget-TIME")
_FIXED: Final = re.compile(r"fixed-(?P<n>[1-9]\d{0,9})")


def policy_named(name: str, own: Mapping[str, RetryPolicy] | None = None) -> RetryPolicy:
    """Return a policy by name.

    Args:
        name: A predefined policy, one of ``own``, ``fixed-N`` (calls) or ``budget-TIME``, such as
            ``fixed-5`` or ``budget-1ms``.
        own: Policies from the user's file, by name.

    Raises:
        QueryError: If no policy has that name; the message suggests the nearest name.
    """
    policies = {**_NAMED, **(own or {})}
    if name in policies:
        return policies[name]
    fixed = _FIXED.fullmatch(name)
    if fixed is not None and int(fixed["n"]) <= MAX_CALLS:
        rule = LeafPolicy(calls=int(fixed["n"]), answers="any")
        return RetryPolicy(name, f"at most {fixed['n']} calls, for every leaf", {ANY_LEAF: rule})
    if name.startswith("budget-"):
        with suppress(QueryError):
            budget_ns = parse_duration(name.removeprefix("budget-"))
            rule = LeafPolicy(budget_ns=budget_ns, answers="any")
            return RetryPolicy(name, "no further call after this time", {ANY_LEAF: rule})
    words = (*policies, *_PATTERNS)
    nearest = difflib.get_close_matches(name, words, n=1, cutoff=0)[0]
    raise QueryError(
        f"no policy '{one_line(name, 60)}'; nearest: {nearest}; all: {', '.join(words)}"
    )
