"""A word of an event goes to the column of the field that its layout names."""

from __future__ import annotations

from tdxtrace.ingest.batch import BoolArray, I32Array, I64Array, U64Array


def copy_fields(
    event: I64Array,
    layout: I32Array,
    first_word: I64Array,
    words: U64Array,
    begin: I64Array,
    column: I64Array,
    position: I64Array,
    value: U64Array,
    seen: BoolArray,
) -> None:
    """Copy fields of one event per row; what a column had before is replaced.

    Args:
        event: Place of each row's event; -1: none, and nothing is copied.
        layout: By event: number of its layout.
        first_word: By event: place of its first word.
        words: The words of all events.
        begin: By layout, and one more: where its fields begin in the next two.
        column: Column that a field goes to.
        position: Which word of the event the field is.
        value: One row per column, one entry per row of the table.
        seen: Where a value was copied to, of the same shape.
    """
    for row in range(len(event)):
        at = event[row]
        if at < 0:
            continue
        mine = layout[at]
        first = first_word[at]
        for field in range(begin[mine], begin[mine + 1]):
            to = column[field]
            value[to, row] = words[first + position[field]]
            seen[to, row] = True
