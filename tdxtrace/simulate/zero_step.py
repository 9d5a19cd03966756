"""Zero-step mitigation of one vCPU: counted faults, logged pages, the gate at entry.

Sources: intel/tdx-module ``src/td_transitions/td_exit_stepping.{c,h}``
(``vmexit_stepping_filter``, ``td_exit_epf_stepping_log``, ``td_entry_stepping_filter``),
``tdh_vp_enter.c`` (``handle_stepping_filter``); the constants are the same in every
release from 1.0.00 to 1.5.25.
"""

from __future__ import annotations

from typing import Final

# STEPPING_EPF_THRESHOLD: counted EPT violations at one RIP before pages are logged.
STEPPING_EPF_THRESHOLD: Final = 6
# EPF_GPA_LIST_SIZE: pages logged at most.
EPF_GPA_LIST_SIZE: Final = 32


class ZeroStep:
    """The state a vCPU carries from exit to exit; only progress of RIP clears it."""

    __slots__ = ("counter", "entry_rip", "pages")

    def __init__(self) -> None:
        self.counter = 0
        self.pages: list[int] = []
        self.entry_rip = 0

    @property
    def armed(self) -> bool:
        """Whether the next TDH.VP.ENTER has to pass the gate."""
        return bool(self.pages)

    def on_entry(self, rip: int) -> None:
        """Note where the guest stands; every entry that reaches the filter does, refused or not."""
        self.entry_rip = rip

    def on_exit(self, rip: int) -> None:
        """See a VM exit, also one handled inside the module: a new RIP clears the state."""
        if rip != self.entry_rip:
            self.counter = 0
            self.pages.clear()

    def on_counted_fault(self, page: int | None) -> bool:
        """Count an EPT violation on a private page that becomes a TD exit.

        Not to be called for what does not count: a shared page, a pending page that
        the guest takes as #VE, and a violation of TDG.MEM.PAGE.ACCEPT or ATTR.

        Args:
            page: What faulted; None for a shared page, which generation A counts
                but does not log (1.0.03 ``vmexit_stepping_filter``).

        Returns:
            Whether this fault armed the gate: the seventh at one RIP does.
        """
        if self.counter < STEPPING_EPF_THRESHOLD:
            self.counter += 1
            return False
        was_armed = self.armed
        if page is not None and page not in self.pages and len(self.pages) < EPF_GPA_LIST_SIZE:
            self.pages.append(page)
        return self.armed and not was_armed
