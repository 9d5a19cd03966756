"""The ``verdicts`` table: BUG, EXPECTED, HOSTILE or UNDECIDED, per group of findings."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.verdicts.busy import JUDGED, on_broken_rules, on_busy
from tdxtrace.analysis.verdicts.outcomes import on_abandoned, on_loops, on_messages
from tdxtrace.analysis.verdicts.zero_steps import on_zero_steps
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tables.verdicts import VERDICTS

_VERDICT_ORDER: Final = {"BUG": 0, "HOSTILE": 1, "UNDECIDED": 2, "EXPECTED": 3}


def verdicts(findings: Findings, trace: Trace, *, generation: str | None = None) -> pl.DataFrame:
    """Judge every busy answer, zero-step episode, abandoned request, loop and message.

    Findings with the same explanation form one group: the verdict, one sentence, up to five
    rows of evidence, the rule that decided and its source.  A false accusation is worse than
    none: BUG and HOSTILE require certain evidence; otherwise the verdict is UNDECIDED and states
    which capture would decide it.

    Only the host can be HOSTILE (:func:`~.zero_steps.on_zero_steps`).  A guest is never judged,
    because a host trace does not distinguish a hostile guest from an honest one:

    * A guest can disturb the host's calls by holding Secure EPT entries only, in
      TDG.MEM.PAGE.ACCEPT, ATTR.RD and ATTR.WR.  TDCALLs cause no event; that a guest held an entry
      is inferred from the absence of another holder, and a call without a probe is absent too.
    * In generation C the host's first failed try keeps all guests out until a host call takes
      the entry, so a guest causes one busy try, like any guest that accepts memory.  Generation A
      has no such lock.  In B a write of the whole entry ends host priority: an ACCEPT of 2 MB does
      that at each interrupt.  An honest L1 VMM may set the attributes of its L2 guests' pages at
      any time.
    * RDX after such an answer shows whether the page was accepted (1.5.01
      set_arch_septe_details_in_vmm_regs; recorded only if a probe fetches it).  An honest guest
      does not accept a page again, but an L1 VMM still reads and sets its attributes, and no
      trace shows whether the TD has L2 guests.
    * Frequency, duration and KVM giving up do not distinguish them: one honest ACCEPT of 2 MB
      clears 512 pages, and outlasts the 17 calls of the series of 2024-09, about 12 us; KVM since
      6.16 calls once more after it has kicked all vCPUs, so that no guest makes it give up.

    If a guest would have had to hold an entry for longer than one TDCALL, the verdict on these
    busy answers is therefore UNDECIDED.  (intel/tdx-module 1.5.01 and 1.5.20
    src/common/helpers/tdx_locks.h, tdg_mem_page_accept.c, tdg_mem_page_attr_wr.c; Linux 6.16
    arch/x86/kvm/vmx/tdx.c; a failed call takes 2,000 cycles, S. Christopherson, 2024-09-10.)

    Args:
        findings: Causes of busy answers and zero-steps, abandoned requests, loops.
        trace: The events that the findings are based on.
        generation: Lock generation of the module; None if unknown.

    Returns:
        The ``verdicts`` table: BUG first, then HOSTILE, UNDECIDED, EXPECTED; larger groups first
        within each verdict.

    Raises:
        TableError: If an argument lacks a column or has a column of another type.
    """
    causes = BUSY_CAUSES.pick(findings.scan("busy_causes"), *JUDGED)
    parts = [
        on_busy(causes, findings.broken_rules),
        on_broken_rules(findings.broken_rules, causes),
        on_zero_steps(findings.zero_steps, findings.zero_step_causes, trace, generation),
        on_abandoned(findings.abandoned_requests),
        on_loops(findings.progress_loops),
        on_messages(trace.kernel_messages),
    ]
    rank = pl.col("verdict").cast(pl.String).replace_strict(_VERDICT_ORDER, return_dtype=pl.Int8)
    found = pl.concat([VERDICTS.empty(), *parts])
    return VERDICTS.conform(
        found.sort(rank, -pl.col("n_rows").cast(pl.Int64), "source", "what", maintain_order=True)
    )
