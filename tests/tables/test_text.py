"""Escaping of untrusted text."""

from __future__ import annotations

import html
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.tables.text import escape, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("CPU 0/KVM", "CPU 0/KVM"),
        ("", ""),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("\x00\x07\x7f", "\\x00\\x07\\x7f"),
        # Reordered, hidden or without a glyph.
        ("\u202eevil", "\\u202eevil"),
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\ue000\U000f0000", "\\ue000\\U000f0000"),
        ("\udcff", "\\udcff"),
        # Letters of any script stay.
        ("größe 大小 é", "größe 大小 é"),
        ("[red]a</b>", "[red]a</b>"),
    ],
)
def test_control_and_format_characters_are_escaped(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_long_text_ends_in_an_ellipsis() -> None:
    assert one_line("a" * 50, 10) == "a" * 9 + "…"
    assert one_line("a" * 10, 10) == "a" * 10
    assert one_line("\x1b" * 50, 10) == "\\x1b\\x1b\\…"


@given(st.text(), st.integers(1, 60))
def test_any_text_is_one_printable_line_of_at_most_the_width(text: str, width: int) -> None:
    shown = one_line(text, width)
    assert len(shown) <= width
    assert all(unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in shown)
    shown.encode("utf-8")


@given(st.text(max_size=50))
def test_escaped_text_has_no_markup_and_the_same_content(text: str) -> None:
    escaped = escape(text)
    assert not set("<>\"'") & set(escaped)
    assert html.unescape(escaped) == one_line(text)
