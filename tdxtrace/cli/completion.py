"""What a shell completes: names that are known without a trace."""

from __future__ import annotations


def leaves(incomplete: str) -> list[str]:
    """Names of SEAMCALL leaves, with or without TDH, as the word begins."""
    from tdxtrace.tdx.leaves import leaf_table

    word = incomplete.upper()
    names = leaf_table()["name"].to_list()
    short = [name.removeprefix("TDH.") for name in names]
    return sorted({name for name in [*names, *short] if name.startswith(word)})


def policies(incomplete: str) -> list[str]:
    """Names of the policies that are replayed."""
    from tdxtrace.recommend.policy_definitions import DEFAULTS

    return [name for name in DEFAULTS if name.startswith(incomplete)]


def scenarios(incomplete: str) -> list[str]:
    """Names of the scenarios that come with tdxtrace."""
    from tdxtrace.simulate.scenario import names

    return [name for name in names() if name.startswith(incomplete)]


def formats(incomplete: str) -> list[str]:
    """Names of the formats that are read."""
    from tdxtrace.tables.formats import INPUT_FORMATS

    return [name for name in INPUT_FORMATS if name.startswith(incomplete)]
