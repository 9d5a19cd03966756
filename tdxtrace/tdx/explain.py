"""Explanation of a single status word, such as one found in a log."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Final

import polars as pl

from tdxtrace.tdx.exit_reasons import exit_reason_name
from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.leaves import leaf_name
from tdxtrace.tdx.loader import LOADER_BIT, loader_leaf_table, loader_status_table
from tdxtrace.tdx.locks import Holders, holders
from tdxtrace.tdx.operands import operand_id_table, resource_table
from tdxtrace.tdx.status import HOST_RETRY, status_table
from tdxtrace.tdx.word import (
    CODE_BITS,
    ERROR_BIT,
    FATAL_BIT,
    HOST_HINT_BIT,
    LOW_BITS,
    NON_RECOVERABLE_BIT,
    TDX_OPERAND_BUSY,
    TDX_SUCCESS,
)

MAX_LINES: Final = 24
_MIN_WIDTH: Final = 40
_MAX_NAMED: Final = 6
_VP_ENTER: Final = 0
_ACCEPTED: Final = "0x and up to 16 hex digits, 16 hex digits, or a decimal of 64 bits"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Facts about one status word."""

    status: int
    leaf: int | None
    version: int
    is_loader: bool
    """Whether it is a leaf of the P-SEAMLDR, which has its own leaf numbers."""
    call: str | None
    """Name of the leaf; None if not given or not known."""
    name: str | None
    """Name of the code; None if not known."""
    status_class: str | None
    is_error: bool
    is_non_recoverable: bool
    is_fatal: bool
    is_host_hint: bool
    low32: str | None
    """Meaning of bits 31:0; None if they are 0 or have no meaning."""
    operand_id: int | None
    resource: tuple[str, ...]
    """Busy resource on this leaf; without a leaf, the resources by leaf."""
    holders: tuple[Holders, ...]
    """Possible holders; empty without a leaf."""
    retry: str
    kvm: tuple[str, ...]
    """Reactions of KVM, each prefixed with the kernel versions concerned."""
    meaning: str | None
    sources: tuple[str, ...]


def parse_status(text: str) -> int:
    """Parse a status word as found in logs.

    Exactly 16 digits without ``0x`` are hexadecimal, as in a register dump, even where all of them
    are decimal digits: a decimal number of 16 digits has some of the reserved bits 59:48 set, so it
    is not a status word.

    Args:
        text: Hexadecimal with ``0x``, 16 bare hex digits, or decimal, signed or not; a comma or
            full stop at the end is ignored.

    Returns:
        The word, 0 to 2**64 - 1.

    Raises:
        ValueError: If the text has none of these forms.

    Example:
        >>> hex(parse_status("-9223369837831520110"))
        '0x8000020000000092'
    """
    word = text.strip().rstrip(".,;:").lower()
    number = None
    if re.fullmatch(r"0x[0-9a-f]{1,16}|[0-9a-f]{16}", word):
        number = int(word, 16)
    elif re.fullmatch(r"-?[0-9]{1,20}", word):
        number = int(word)
    if number is None or not -(1 << 63) <= number < 1 << 64:
        raise ValueError(f"not a status word: {text!r}; accepted are {_ACCEPTED}")
    return number % (1 << 64)


def explain(status: int, leaf: int | None = None, version: int = 0) -> Explanation:
    """Return the known facts about a status word.

    Args:
        status: The word: RAX after the SEAMCALL.
        leaf: The leaf that returned it (0 to 65535), if known; the meaning of bits 31:0 depends on
            the leaf.
        version: The version of the leaf that was called.

    Returns:
        The facts and their sources.
    """
    call = pl.select(leaf_name(pl.lit(leaf, dtype=pl.UInt16))).item()
    fact = _fact(status) | _fact_on_leaf(status, call)
    is_busy = status & CODE_BITS == TDX_OPERAND_BUSY
    low = status & LOW_BITS
    operand_id = low if fact.get("low32") == "operand_id" and (low or not is_busy) else None
    busy_id = operand_id if is_busy else None
    meant = _resources(busy_id, leaf) if busy_id else []
    held = holders(leaf, busy_id, version) if busy_id and leaf is not None else ()
    reactions = _reactions(call, fact.get("name"), is_error=bool(status & ERROR_BIT))
    sources = [
        fact.get("source"),
        fact.get("note_source"),
        *(row["source"] for row in [*meant, *reactions]),
    ]
    return Explanation(
        status=status,
        leaf=leaf,
        version=version,
        is_loader=False,
        call=call,
        name=fact.get("name"),
        status_class=fact.get("class"),
        is_error=bool(status & ERROR_BIT),
        is_non_recoverable=bool(status & NON_RECOVERABLE_BIT),
        is_fatal=bool(status & FATAL_BIT),
        is_host_hint=bool(status & HOST_HINT_BIT),
        low32=_low32(status, leaf, fact.get("low32")),
        operand_id=operand_id,
        resource=tuple(row["text"] for row in meant),
        holders=held,
        retry=HOST_RETRY[fact.get("host_retry") or "unknown"],
        kvm=tuple(f"{row['kernels']}: {row['reaction']}" for row in reactions),
        meaning=_meaning(status, leaf, fact),
        sources=tuple(dict.fromkeys(source for source in sources if source)),
    )


def explain_loader(status: int, leaf: int) -> Explanation:
    """Return the known facts about a status word that the P-SEAMLDR returned.

    Args:
        status: The word: RAX after the SEAMCALL.
        leaf: The leaf that returned it, without bit 63.

    Returns:
        The facts and their sources.  Words that the kernel makes if the instruction itself fails
        are explained too; status words of the module are not.
    """
    rows = loader_status_table().filter(pl.col("status") == status).to_dicts()
    fact = rows[0] | {"class": "loader"} if rows else _fact(status)
    if not rows and fact.get("class") != "software":
        fact = {}
    named = loader_leaf_table().filter(pl.col("leaf") == leaf)["name"].to_list()
    return Explanation(
        status=status,
        leaf=leaf,
        version=0,
        is_loader=True,
        call=named[0] if named else None,
        name=fact.get("name"),
        status_class=fact.get("class"),
        is_error=bool(status & ERROR_BIT),
        is_non_recoverable=False,
        is_fatal=False,
        is_host_hint=False,
        low32=None,
        operand_id=None,
        resource=(),
        holders=(),
        retry=HOST_RETRY[fact.get("host_retry") or "unknown"],
        kvm=(),
        meaning=fact.get("meaning"),
        sources=(fact["source"],) if fact else (),
    )


def as_text(explanation: Explanation, width: int = 78) -> str:
    """Format an explanation as plain text for one screen.

    Args:
        explanation: Result of :func:`explain` or :func:`explain_loader`.
        width: Columns of the screen; fewer than 40 count as 40.

    Returns:
        At most 24 lines of at most ``width`` columns; omissions are marked with "...".
    """
    width = max(width, _MIN_WIDTH)
    sections = [_section(label, texts, width) for label, texts in _parts(explanation) if texts]
    cut = set()
    while sum(map(len, sections)) > MAX_LINES:
        longest = max(range(len(sections)), key=lambda place: len(sections[place]))
        sections[longest].pop()
        cut.add(longest)
    for place in cut:
        sections[place][-1] = wrap(sections[place][-1], width - 4)[0] + " ..."
    return "\n".join(line for section in sections for line in section)


def _fact(status: int) -> dict[str, Any]:
    """Return the row of the status table for the whole word, else for its code; else empty."""
    rows = status_table().to_dicts()
    for row in rows:
        if row["status"] & LOW_BITS and row["status"] == status:
            return row
    for row in rows:
        if not row["status"] & LOW_BITS and row["status"] & CODE_BITS == status & CODE_BITS:
            return row
    return {}


def _fact_on_leaf(status: int, call: str | None) -> dict[str, Any]:
    """Return host_retry, note and their source of a code on this leaf; empty if not special."""
    for row in facts("status_by_leaf", status=pl.UInt64).to_dicts():
        if (row["status"], row["call"]) == (status & CODE_BITS, call):
            return {name: row[name] for name in ("host_retry", "note")} | {
                "note_source": row["source"]
            }
    return {}


def _meaning(status: int, leaf: int | None, fact: dict[str, Any]) -> str | None:
    """Return the meaning of a word of the module; without one, a hint if the P-SEAMLDR has it.

    The hint is given only if no leaf was named; it is no answer, as an unknown code of the module
    may have the same bits 31:0.
    """
    if fact or leaf is not None:
        return ". ".join(filter(None, [fact.get("meaning"), fact.get("note")])) or None
    rows = loader_status_table().filter(pl.col("status") == status)
    if rows.is_empty():
        return None
    return f"unknown for the module; from the P-SEAMLDR it is {rows['name'].item()} (use --leaf)"


def _low32(status: int, leaf: int | None, holds: str | None) -> str | None:
    """Return the meaning of bits 31:0; ``holds`` is column low32 of the status table."""
    low = status & LOW_BITS
    is_success = status & CODE_BITS == TDX_SUCCESS
    if holds == "operand_id" and (low or status & CODE_BITS != TDX_OPERAND_BUSY):
        named = operand_id_table().filter(pl.col("operand_id") == low)["name"]
        return f"operand {low:#x} {named.item() if named.len() else '(unknown)'}"
    reason = f"exit {pl.select(exit_reason_name(pl.lit(low, dtype=pl.UInt32))).item()}"
    if holds == "exit_reason" and (leaf == _VP_ENTER or not is_success):
        return reason
    if not low:
        return None
    if is_success and leaf is None:
        return f"{reason}, if TDH.VP.ENTER returned it"
    plain = holds in {None, "none", "unknown", "operand_id", "exit_reason"}
    return f"low half {low:#x}" if plain else f"{holds} {low:#x}"


def _resources(operand_id: int, leaf: int | None) -> list[dict[str, Any]]:
    """Return the resources that a busy operand can refer to: text and source."""
    rows = resource_table().filter(pl.col("operand_id") == operand_id).to_dicts()
    if leaf is None:
        return list(_by_family(rows))
    for row in rows:
        if row["leaf"] == leaf:
            alternative = row["alternative"] and f"or {row['alternative']}"
            texts = (row["resource"], alternative, row["note"])
            return [{"text": text, "source": row["source"]} for text in texts if text]
    anywhere = operand_id_table().filter(pl.col("operand_id") == operand_id)["resource"].to_list()
    known = anywhere[0] if anywhere and anywhere[0] else "unknown"
    return [{"text": f"{known}; not known to be returned by this leaf", "source": None}]


def _by_family(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each resource with its leaves; all leaves of a family are written as MEM.*."""
    families = Counter(row["call"].split(".")[1] for row in rows)
    for resource in dict.fromkeys(row["resource"] for row in rows):
        calls = [row["call"] for row in rows if row["resource"] == resource]
        parts: list[str] = []
        for family, n in Counter(call.split(".")[1] for call in calls).items():
            if n == families[family] > 1:
                parts.append(f"{family}.*")
            elif 2 * n > families[family] > 1:
                parts.append(f"most {family}.*")
            else:
                parts += [_short(call) for call in calls if call.split(".")[1] == family]
        yield {"text": f"{resource}: {', '.join(parts)}", "source": None}


def _reactions(call: str | None, name: str | None, *, is_error: bool) -> list[dict[str, Any]]:
    """Return KVM's reactions to this leaf and status, else to the status or to any error."""
    rows = facts("kvm").to_dicts()
    exact = [row for row in rows if (row["call"], row["status"]) == (call, name)]
    wider = {("*", name), ("-", name) if call is None else (call, "*")}
    return exact or [row for row in rows if is_error and (row["call"], row["status"]) in wider]


def _parts(e: Explanation) -> Iterator[tuple[str, list[str]]]:
    """Yield the sections of the text: label and paragraphs."""
    yield "", [", ".join(filter(None, [f"{e.status:#018x}  {e.name or 'unknown code'}", e.low32]))]
    flags = [(e.is_error, "error"), (e.is_non_recoverable, "non-recoverable")]
    flags += [(e.is_fatal, "fatal"), (e.is_host_hint, "host hint")]
    named = ", ".join(word for is_set, word in flags if is_set) or "none"
    yield "class", [f"{e.status_class or 'unknown'}; bits set: {named}"]
    if e.is_loader:
        yield "leaf", [f"{LOADER_BIT | (e.leaf or 0):#x} {e.call or '(unknown)'} of the P-SEAMLDR"]
    elif e.leaf is not None:
        yield "leaf", [f"{e.leaf} {e.call or '(unknown)'}, version {e.version}"]
    yield "meaning", [e.meaning or ("only the name is known" if e.name else "not known")]
    yield "busy", list(e.resource)
    yield "held by", [_held_by(held) for held in e.holders]
    yield "retry", [e.retry]
    yield "KVM", list(e.kvm)
    yield "source", list(e.sources)


def _held_by(lock: Holders) -> str:
    """Return a paragraph about the holders of a lock; a long complete list is abbreviated."""
    is_long = lock.is_all_leaves and len(lock.host) > _MAX_NAMED
    names = ", ".join(map(_short, lock.host)) or "no host call"
    host = f"every call that takes it ({len(lock.host)})" if is_long else names
    guests = ", ".join(map(_short, lock.guest))
    guest = f"; guest: {guests}" if guests else ""
    return f"[{'/'.join(lock.generations)}] {lock.lock}, same {lock.scope}: {host}{guest}"


def _section(label: str, texts: list[str], width: int) -> list[str]:
    """Return the lines of a section, with the label before the first."""
    margin = 9 if label else 0
    lines = [line for text in texts for line in wrap(text, width - margin)]
    return [f"{label if not n else '':{margin}}{line}".rstrip() for n, line in enumerate(lines)]


def _short(call: str) -> str:
    """Name of a call without the prefix TDH. or TDG."""
    return call[4:]
