"""User-defined policies from a TOML file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tdxtrace.errors import QueryError
from tdxtrace.recommend.policy_definitions import (
    ANSWERS,
    ANY_LEAF,
    AT_LIMIT,
    MAX_CALLS,
    DoublingLimit,
    LeafPolicy,
    RetryPolicy,
)
from tdxtrace.tables.settings import parse_settings, read_settings
from tdxtrace.tables.text import one_line
from tdxtrace.tables.times import parse_duration
from tdxtrace.tdx.leaves import leaf_table, parse_leaf

_POLICY_KEYS: Final = (
    "calls",
    "budget",
    "answers",
    "then",
    "otherwise",
    "kicks",
    "initial",
    "factor",
)
_KEYS: Final = (*_POLICY_KEYS, "bug", "leaves", "source")
_DOUBLING_KEYS: Final = ("initial", "factor", "bug")
_CHOICES: Final = {"answers": ANSWERS, "then": AT_LIMIT, "otherwise": AT_LIMIT}


def read_policies(path: Path) -> dict[str, RetryPolicy]:
    """Read policies from a TOML file, one table ``[policy.NAME]`` each.

    Keys, all optional: ``calls`` (maximum number of calls), ``budget`` (maximum time, "1ms"),
    ``answers`` (retry after "sept", "busy" or "any"), ``then`` and ``otherwise`` ("kill",
    "return" or "again"), ``kicks`` (true or false), ``initial``, ``factor`` and ``bug`` (the
    doubling limit of the mail), ``leaves`` (leaves that it covers; default all), ``source``
    (where the policy was proposed).

    Raises:
        InputError: If the file cannot be read.
        QueryError: If a key or value is invalid; the message suggests the nearest valid word.
    """
    shown = one_line(str(path))
    given = parse_settings(read_settings(path), shown)
    _check_keys(shown, given, ("policy",))
    policies = given.get("policy")
    if not isinstance(policies, dict) or not policies:
        raise QueryError(f"{shown} has no policy; begin one with [policy.NAME]")
    return {name: _policy(shown, name, keys) for name, keys in policies.items()}


def _check_keys(where: str, given: Mapping[str, Any], words: Sequence[str]) -> None:
    for word in given:
        if word not in words:
            nearest = difflib.get_close_matches(word, words, n=1, cutoff=0)[0]
            shown = one_line(word, 60)
            raise QueryError(f"{where}: unknown word {shown!r}; nearest: {nearest}")


def _policy(path: str, name: str, keys: object) -> RetryPolicy:
    where = f"{path}, policy {one_line(name, 60)!r}"
    if not isinstance(keys, dict):
        raise QueryError(f"{path}: write [policy.{one_line(name, 60)}] and its words below it")
    _check_keys(where, keys, _KEYS)
    source = keys.get("source", f"policy {one_line(name, 60)} of {path}")
    if not isinstance(source, str):
        raise QueryError(f"{where}: source must be text")
    rule = LeafPolicy(
        calls=_number(where, keys, "calls"),
        budget_ns=_budget(where, keys),
        **{
            word: _choice(where, keys[word], word, words)
            for word, words in _CHOICES.items()
            if word in keys
        },
        kicks=_flag(where, keys),
        doubling=_doubling_limit(where, keys),
    )
    return RetryPolicy(
        one_line(name, 60), one_line(source), dict.fromkeys(_leaves(where, keys), rule)
    )


def _number(where: str, keys: Mapping[str, Any], word: str, minimum: int = 1) -> int | None:
    value = keys.get(word)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_CALLS:
        raise QueryError(f"{where}: {word} must be a whole number from {minimum} to {MAX_CALLS}")
    return value


def _budget(where: str, keys: Mapping[str, Any]) -> int | None:
    value = keys.get("budget")
    if value is None:
        return None
    if not isinstance(value, str):
        raise QueryError(f'{where}: budget must be a time in quotes, such as "1ms"')
    try:
        return parse_duration(value)
    except QueryError as error:
        raise QueryError(f"{where}: {error}") from None


def _choice(where: str, value: object, word: str, words: Sequence[str]) -> str:
    if value not in words:
        nearest = difflib.get_close_matches(str(value), words, n=1, cutoff=0)[0]
        shown = one_line(str(value), 60)
        raise QueryError(f"{where}: {word} cannot be {shown!r}; nearest: {nearest}")
    return str(value)


def _flag(where: str, keys: Mapping[str, Any]) -> bool:
    value = keys.get("kicks", False)
    if not isinstance(value, bool):
        raise QueryError(f"{where}: kicks must be true or false")
    return value


def _doubling_limit(where: str, keys: Mapping[str, Any]) -> DoublingLimit | None:
    given = {
        word: number
        for word in _DOUBLING_KEYS
        if (number := _number(where, keys, word, 2 if word == "factor" else 1)) is not None
    }
    return DoublingLimit(**given) if given else None


def _leaves(where: str, keys: Mapping[str, Any]) -> list[str]:
    names = keys.get("leaves", [ANY_LEAF])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise QueryError(f'{where}: leaves must be a list, such as ["TDH.MEM.PAGE.AUG"]')
    try:
        return [name if name == ANY_LEAF else _canonical(name) for name in names]
    except ValueError as error:
        raise QueryError(f"{where}: {one_line(str(error))}") from None


def _canonical(name: str) -> str:
    number = parse_leaf(name)[0]
    table = leaf_table()
    known = table["name"].to_list()[table["leaf"].index_of(number) or 0]
    if parse_leaf(known)[0] != number:
        raise ValueError(f"no leaf has the number {number}")
    return str(known)
