"""Exceptions that tdxtrace raises for wrong options and unreadable input."""

from __future__ import annotations


class TdxtraceError(Exception):
    """Base class of all errors that the user can correct; the message is one line."""


class InputError(TdxtraceError):
    """A file cannot be opened, read or written."""


class FormatError(TdxtraceError):
    """A file is not a trace in a format that tdxtrace supports."""


class TableError(TdxtraceError):
    """A data frame or stored table does not match the declaration of its table."""


class QueryError(TdxtraceError):
    """A query, filter, threshold or option is invalid."""
