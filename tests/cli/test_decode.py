"""``tdxtrace decode``: explanation of status words from logs."""

from __future__ import annotations

import pytest
from support.running import answered, refused, tdxtrace


def decoded(*words: str) -> str:
    done = answered("decode", *words)
    assert max(map(len, done.lines)) <= 80
    return done.text


@pytest.mark.parametrize(
    "word",
    [
        "0x8000020000000092",
        "0X8000020000000092",
        "8000020000000092",
        "9223374235878031506",
        "0x8000020000000092,",
    ],
)
def test_one_word_in_every_spelling(word: str) -> None:
    text = decoded(word)
    assert text.startswith("0x8000020000000092  TDX_OPERAND_BUSY, operand 0x92 SEPT_TREE")
    assert len(text.splitlines()) <= 24


def test_a_signed_word_follows_two_dashes() -> None:
    """A word that begins with a dash looks like an option."""
    assert decoded("--", "-9223369837831520110").startswith("0x8000020000000092")


def test_a_signed_word_is_read_as_it_stands_in_a_log() -> None:
    assert decoded("-9223369837831520110").startswith("0x8000020000000092")


def test_the_leaf_says_what_the_operand_is() -> None:
    armed = "at least 7 private EPT violations"
    assert armed in decoded("0x8000020000000092", "--leaf", "TDH.VP.ENTER")
    assert armed not in decoded("0x8000020000000092", "--leaf", "TDH.MEM.PAGE.AUG")
    assert "SEPT entry" in decoded("0x8000020000000001", "--leaf", "tdh_mem_page_aug")
    assert "TDVPR" in decoded("0x8000020000000001", "--leaf", "TDH_VP_ENTER")


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        ("38", "38 TDH.MEM.TRACK, version 0"),
        ("0x26", "38 TDH.MEM.TRACK, version 0"),
        ("0x10016", "22 TDH.VP.INIT, version 1"),
        ("65558", "22 TDH.VP.INIT, version 1"),
        ("tdh_vp_init", "22 TDH.VP.INIT, version 0"),
        ("250", "250 (unknown), version 0"),
    ],
)
def test_leaves_by_name_or_number_with_version_bits(leaf: str, said: str) -> None:
    assert said in decoded("0x8000020000000080", "--leaf", leaf)


@pytest.mark.parametrize("leaf", ["SEAMLDR.INSTALL", "seamldr_install", "0x8000000000000001"])
def test_a_leaf_with_bit_63_is_one_of_the_loader(leaf: str) -> None:
    text = decoded("0x8000000000030000", "--leaf", leaf)
    assert text.startswith("0x8000000000030000  PSEAMLDR_EINTERRUPT\n")
    assert "0x8000000000000001 SEAMLDR.INSTALL of the P-SEAMLDR" in text
    assert "same call again" in text
    assert "PSEAMLDR_EINTERRUPT" not in decoded("0x8000000000030000", "--leaf", "1")


def test_demote_starts_again_where_other_leaves_go_on() -> None:
    text = decoded("0x8000020600000000", "--leaf", "TDH.MEM.PAGE.DEMOTE")
    assert "it starts from the beginning" in text
    assert "1.5.20 to 1.5.25" in text
    assert "operand" not in text.splitlines()[0]
    assert "it continues where it stopped" in decoded(
        "0x8000020600000000", "--leaf", "TDH.EXPORT.MEM"
    )


def test_an_exit_is_named() -> None:
    assert "EPT_VIOLATION" in decoded("0x30", "--leaf", "TDH.VP.ENTER")
    assert "HLT" in decoded("12", "--leaf", "0")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("0", "TDX_SUCCESS"),
        ("0x8000020100000000", "TDX_PREVIOUS_TLB_EPOCH_BUSY"),
        ("0x8000020300000000", "TDX_RND_NO_ENTROPY"),
        ("0xc0000b0800000001", "TDX_TLB_TRACKING_NOT_DONE"),
        ("0x9000020500000000", "TDX_HOST_PRIORITY_BUSY_TIMEOUT"),
        ("0xe000020000000092", "unknown code"),
        ("0xb000020000000092", "TDX_OPERAND_BUSY"),
        ("0xdeadbeefdeadbeef", "unknown code"),
    ],
)
def test_words_are_named_and_bits_61_and_60_masked(word: str, name: str) -> None:
    text = decoded(word)
    assert name in text.splitlines()[0]
    assert len(text.splitlines()) <= 24


def test_several_words_are_explained_one_after_the_other() -> None:
    parts = decoded("0x8000020000000092", "0x30", "9223374235878031506").split("\n\n")
    assert [part.split()[0] for part in parts] == [
        "0x8000020000000092",
        "0x0000000000000030",
        "0x8000020000000092",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("xyz",), "not a status word: 'xyz'"),
        (("0x18000020000000092",), "not a status word"),
        (("99999999999999999999",), "not a status word"),
        (("0x30", "nothing"), "not a status word: 'nothing'"),
        (("0x30", "--leaf", "TDH.VP.ENTRE"), "TDH.VP.ENTER"),
        (("0x30", "--leaf", "0x8000000100000000"), "no TDX module leaf"),
        (("\x1b[31m",), "not a status word"),
    ],
)
def test_an_unknown_word_is_refused_with_the_known_ones(words: tuple[str, ...], said: str) -> None:
    assert said in refused(2, "decode", *words)


def test_no_word_at_all_is_refused() -> None:
    assert tdxtrace("decode").status == 2
