"""Shell completion of values that do not depend on a trace."""

from __future__ import annotations


def leaves(incomplete: str) -> list[str]:
    """Return names of SEAMCALL leaves, with and without TDH, that begin with ``incomplete``."""
    from tdxtrace.tdx.leaves import leaf_table

    word = incomplete.upper()
    names = leaf_table()["name"].to_list()
    short = [name.removeprefix("TDH.") for name in names]
    return sorted({name for name in [*names, *short] if name.startswith(word)})


def policies(incomplete: str) -> list[str]:
    """Return names of the default policies that begin with ``incomplete``."""
    from tdxtrace.recommend.policy_definitions import DEFAULTS

    return [name for name in DEFAULTS if name.startswith(incomplete)]


def scenarios(incomplete: str) -> list[str]:
    """Return names of the scenarios of tdxtrace that begin with ``incomplete``."""
    from tdxtrace.simulate.scenario import names

    return [name for name in names() if name.startswith(incomplete)]


def formats(incomplete: str) -> list[str]:
    """Return names of the input formats that begin with ``incomplete``."""
    from tdxtrace.tables.formats import INPUT_FORMATS

    return [name for name in INPUT_FORMATS if name.startswith(incomplete)]
