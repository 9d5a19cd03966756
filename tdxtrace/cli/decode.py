"""``tdxtrace decode WORD``: what a status word means, without any trace."""

from __future__ import annotations

from typing import Annotated

import typer


def decode_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="STATUS...",
            help="Status words: hex or decimal, signed or not.",
            show_default=False,
        ),
    ],
    leaf: Annotated[
        str | None,
        typer.Option("--leaf", metavar="LEAF", help="Leaf that answered so: name or number."),
    ] = None,
) -> None:
    """Say what a SEAMCALL's completion status (RAX) means.

    Example: tdxtrace decode 0x8000020000000092 --leaf TDH.VP.ENTER
    """
    from tdxtrace.errors import QueryError
    from tdxtrace.tdx.explain import as_text, explain, parse_status
    from tdxtrace.tdx.leaves import parse_leaf

    try:
        number, version = (None, 0) if leaf is None else parse_leaf(leaf)
        statuses = [parse_status(word) for word in words]
    except ValueError as error:
        raise QueryError(str(error)) from None
    texts = [as_text(explain(status, number, version)) for status in statuses]
    typer.echo("\n\n".join(texts))
