"""What can go wrong, in four words: the input, its format, a table, the question."""

from __future__ import annotations


class TdxtraceError(Exception):
    """Base of every error that is the user's to mend; the message is one line."""


class InputError(TdxtraceError):
    """A file cannot be opened or read: missing, a directory, unreadable, empty."""


class FormatError(TdxtraceError):
    """A file was read but is no trace that tdxtrace understands."""


class TableError(TdxtraceError):
    """A frame does not keep the promises of the table it is said to be."""


class QueryError(TdxtraceError):
    """A filter, threshold or option names something that does not exist."""
