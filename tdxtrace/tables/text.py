"""Escaping of untrusted text from a trace for terminals and HTML."""

from __future__ import annotations

import html
import math
import unicodedata

# Unicode categories that move the cursor, hide text or reorder it: control characters
# (ESC among them), format characters (bidirectional overrides), surrogates,
# private use, line and paragraph separators.  Unicode 15, chapter 4.5.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def one_line(text: str, width: int = 200) -> str:
    r"""Return ``text`` as one printable line of at most ``width`` characters.

    Example:
        >>> print(one_line("CPU 0/KVM\x1b[31m"))
        CPU 0/KVM\x1b[31m
    """
    shown = "".join(
        c.encode("unicode_escape").decode("ascii") if unicodedata.category(c) in _UNSAFE else c
        for c in text[: width + 1]
    )
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def encoded(text: str) -> bytes:
    r"""Return ``text`` as UTF-8; surrogates of undecodable file names are escaped (``\udce9``)."""
    return text.encode("utf-8", "backslashreplace")


def escape(text: str) -> str:
    """Return :func:`one_line` of ``text``, escaped for HTML."""
    return html.escape(one_line(text))


def round_up_two_digits(value: float) -> float:
    """Return a number with two significant digits, never smaller than it.

    Args:
        value: A number above 0.

    Example:
        >>> [round_up_two_digits(x) for x in (0.02431, 0.5, 12_842_537)]
        [0.025, 0.5, 13000000.0]
    """
    digits = 1 - math.floor(math.log10(value))
    scale = 10.0**digits
    # An excess of less than 1e-6 is a floating-point rounding error.
    return round(math.ceil(value * scale - 1e-6) / scale, digits)
