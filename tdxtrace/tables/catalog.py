"""Every table of tdxtrace, in one list.

``schemas/*.json`` and the column reference in the README are generated from
here (``python -m tdxtrace.tables.contract``); a test fails when they differ.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.tables.comparisons import COMPARISONS
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.schema import Table
from tdxtrace.tables.truth import TRUTH_TABLES

# Raise this whenever a generated contract changes in a way a reader can see.
#
# 1: first published.
# 2: kernel_messages, so that a stored trace has one more file.
SCHEMA_VERSION: Final = 2

TABLES: Final[tuple[Table, ...]] = (*EVENT_TABLES, *FINDING_TABLES, *TRUTH_TABLES, COMPARISONS)
