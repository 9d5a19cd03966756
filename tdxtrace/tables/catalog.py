"""All tables of tdxtrace, and the version of their schemas.

``schemas/*.json`` (``python -m tdxtrace.tables.contract``) and ``schemas/README.md``
(``python -m tdxtrace.tables.reference``) are generated from here; a test fails when they differ.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.fleet import FLEET_TABLES
from tdxtrace.tables.histograms import HISTOGRAM_TABLES
from tdxtrace.tables.limits import COMPARISONS
from tdxtrace.tables.schema import Table
from tdxtrace.tables.truth import TRUTH_TABLES

# Increment when a table, column, type, key or enum value changes; descriptions do not count.
#
# 1: first published.
# 2: table kernel_messages, one more file in a stored trace.
# 3: truth of each answer: truth_holders, truth_broken_rules, truth_actors, causes of zero-steps.
#    kernel_messages: other messages about TDX.
#    attempts: source of each TD, unit of dependence.
#    retry_chains: begin_lost.
#    limits: unit of dependence, drift, requests left out, recorded policy.
#    host_events: ports, ranges of memory, and their values.
#    table loader_calls, one more file in a stored trace.
#    table limit_statements.
#    tables accept_rates, boot_phases, tdvmcalls, module_updates.
#    tables of facts and fleets.
SCHEMA_VERSION: Final = 3

TABLES: Final[tuple[Table, ...]] = (
    *EVENT_TABLES,
    *FINDING_TABLES,
    *TRUTH_TABLES,
    COMPARISONS,
    *FLEET_TABLES,
    *HISTOGRAM_TABLES,
)
