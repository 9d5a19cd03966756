"""Cells by which a histogram counts attempts: one by one, then by powers of two."""

from __future__ import annotations

from typing import Final

EXACT: Final = 64
"""Up to so many attempts each number has a cell of its own; a choice."""
DOUBLINGS: Final = 14
"""Powers of two above EXACT, to 2^20; the last cell has no upper end."""
EXACT_LIMITS: Final = (
    *range(1, EXACT + 1),
    *(EXACT * (1 << n) - 1 for n in range(1, DOUBLINGS + 1)),
)
"""Last numbers of the cells: limits of which a histogram shows exactly who needs more."""


def cell_of(n_attempts: int) -> int:
    """Return the number under which attempts are counted: 65 for 65 to 127, else a power of two.

    Example:
        >>> [cell_of(n) for n in (1, 64, 65, 127, 128, 300, 1 << 30)]
        [1, 64, 65, 65, 128, 256, 1048576]
    """
    if n_attempts <= EXACT:
        return n_attempts
    return max(EXACT + 1, min(EXACT << DOUBLINGS, 1 << n_attempts.bit_length() - 1))


def max_attempts_in(cell: int) -> int:
    """Return the most attempts that are counted under a number, except of the last cell.

    Example:
        >>> [max_attempts_in(cell) for cell in (1, 64, 65, 128)]
        [1, 64, 127, 255]
    """
    return cell if cell <= EXACT else (1 << cell.bit_length()) - 1
